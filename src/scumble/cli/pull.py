"""`scumble pull REPO [DIR]`: fetch an adapter from the Hub, with its card, settings and pictures."""

from __future__ import annotations

import shlex
from pathlib import Path

import typer

from scumble.errors import printable


def pull(
    repo: str = typer.Argument(help="Repository on the Hub: owner/name."),
    folder: Path | None = typer.Argument(None, help="Where to. Unset: a folder of the repository's name."),
    overwrite: bool = typer.Option(
        False, "--overwrite", help="Replace files that are there with another content."
    ),
) -> None:
    """Fetch an adapter from the Hugging Face Hub."""
    from scumble.runs.pull import pull as fetch

    got = fetch(
        repo, folder, overwrite=overwrite, progress=lambda name: typer.secho(f"  {name}", dim=True, err=True)
    )
    if got.left_out:
        shown = ", ".join(got.left_out[:4]) + (
            f" and {len(got.left_out) - 4} more" if len(got.left_out) > 4 else ""
        )
        typer.echo(f"left out: {shown}", err=True)
    if got.verdict.sealed and not got.verdict.intact:
        typer.secho(
            f"warning: {got.adapter} is not what was written. Look at it: scumble verify {got.adapter}",
            fg="red",
            err=True,
        )
    typer.echo(f"base: {printable(got.base) or 'not said; name one with --base'}", err=True)
    typer.secho(f"Adapter: {got.adapter}", fg="green")
    typer.echo(f'Draw with it: scumble generate --adapter {shlex.quote(str(got.folder))} "..."', err=True)
