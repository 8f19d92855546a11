"""`scumble push`: upload a finished run, also after an upload that failed."""

from __future__ import annotations

from pathlib import Path

import typer


def push(
    run: Path = typer.Argument(help="A run folder with its adapter and README.md."),
    to: str | None = typer.Option(
        None, "--to", help="Repository: name or owner/name. Unset: the folder's name."
    ),
    private: bool | None = typer.Option(
        None, "--private/--public", help="For a new repository. Unset: your account's default."
    ),
) -> None:
    """Upload a finished run to the Hugging Face Hub."""
    from scumble.errors import HubError
    from scumble.runs import hub
    from scumble.runs.folder import RunFolder

    if not run.is_dir():
        raise HubError(f"There is no run folder {run}.")
    url = hub.push(run, to or run.resolve().name, files=RunFolder(run).published(), private=private)
    typer.secho(f"Uploaded: {url}", fg="green")
