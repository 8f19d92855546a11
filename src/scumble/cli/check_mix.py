"""`scumble check-mix A B`: where two adapters meet, and which will damage the other, told from their weights."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from scumble.cli.options import Base, Overwrite
from scumble.errors import printable


def check_mix(
    first: Annotated[Path, typer.Argument(help="An adapter's file, folder or Hub id.")],
    second: Annotated[Path, typer.Argument(help="The other one.")],
    picture: Annotated[
        Path | None, typer.Option("--picture", help="A PNG to draw the table into, as a heat map.")
    ] = None,
    layers: Annotated[bool, typer.Option("--layers", help="A row per layer, not per block.")] = False,
    energy: Annotated[
        float,
        typer.Option(help="Compare the directions that hold this share of each layer's squared norm."),
    ] = 0.99,
    base: Base = None,
    overwrite: Overwrite = False,
) -> None:
    """Say where two adapters meet, and which will damage the other."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from scumble.runs.check_mix import COLUMNS, check, draw
    from scumble.runs.rework import refuse_existing

    console = Console(highlight=False, soft_wrap=True)
    if picture is not None:
        refuse_existing(picture, overwrite, [first, second], "--picture")
    found = check(first, second, base=base, energy=energy, per_layer=layers)
    table = Table("layer" if layers else "block", "layers", *COLUMNS, box=None, header_style="bold")
    for row in (*found.rows, found.whole):
        values = [f"{row.values[name]:.2f}" for name in COLUMNS]
        table.add_row(
            Text(printable(row.name)), str(row.layers), *values, style="bold" if row is found.whole else ""
        )
    console.print(table)
    for line in found.notes:
        console.print(line, markup=False)
    console.print(found.verdict, markup=False, style="bold")
    if picture is not None:
        draw(found).save(picture)
        typer.echo(picture)
