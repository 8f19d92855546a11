"""`scumble push`: upload a run or an adapter's file, also after an upload that failed."""

from __future__ import annotations

from pathlib import Path

import typer


def push(
    source: Path = typer.Argument(
        metavar="RUN|FILE", help="A run folder with its adapter, or a .safetensors file."
    ),
    repo: str | None = typer.Argument(
        None, help="Repository: name or owner/name. Unset: the name of the folder or file."
    ),
    private: bool | None = typer.Option(
        None, "--private/--public", help="For a new repository. Unset: your account's default."
    ),
    license: str | None = typer.Option(
        None, help="Licence that the card names, e.g. creativeml-openrail-m. Unset: the run's hub.license."
    ),
    base: str | None = typer.Option(
        None, help="What a bare file was trained on, where it does not say so itself."
    ),
    prompt: list[str] = typer.Option(
        [], help="Draw this for a bare file's card, the base's picture beside the adapter's. Repeatable."
    ),
    replace_card: bool = typer.Option(
        False, "--replace-card", help="Write the model card anew, also where somebody edited it."
    ),
) -> None:
    """Upload a run or an adapter to the Hugging Face Hub."""
    from scumble.runs.publish import publish

    url = publish(
        source,
        repo,
        base=base,
        prompts=prompt,
        license=license,
        private=private,
        replace_card=replace_card,
        say=lambda text: typer.secho(f"note: {text}", fg="yellow", err=True),
    )
    typer.secho(f"Uploaded: {url}", fg="green")
