"""`scumble reproduce FILE`: the settings file that made an adapter, from its own header."""

from __future__ import annotations

from pathlib import Path

import typer


def reproduce(
    file: Path = typer.Argument(help="A .safetensors file that scumble trained, or a folder that holds one."),
    out: Path | None = typer.Option(None, "--out", "-o", help="Where to write it. Unset: print it."),
    output: Path | None = typer.Option(
        None, "--output", help="Folder of the new run. Unset: beside the first run's, which is kept."
    ),
) -> None:
    """Write the settings file that made an adapter."""
    from scumble.errors import ConfigError
    from scumble.runs.reproduce import reproduce as settings

    text = settings(file, output)
    if out is None:
        typer.echo(text, nl=False)
        return
    if out.exists():
        raise ConfigError(f"{out} is there already, and is kept. Name another file with --out.")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text, encoding="utf-8")
    typer.secho(f"{out}: train with it again by scumble train {out}", fg="green")
