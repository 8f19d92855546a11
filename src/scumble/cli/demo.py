"""`scumble demo`: train on the embedded base, see it work, load it in diffusers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def demo(
    style: Annotated[
        str, typer.Argument(help="What to teach: blueprint, woodcut, mosaic or neon.")
    ] = "blueprint",
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for pictures, run and grid.")] = Path(
        "runs/demo"
    ),
    steps: Annotated[int | None, typer.Option(min=1, help="Fewer steps, for a quicker look.")] = None,
    pictures: Annotated[int, typer.Option(min=1, help="How many held-out scenes to draw.")] = 12,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier demo.")] = False,
) -> None:
    """See the whole path on the embedded base: offline, in minutes.

    Writes a style's pictures, trains on them, draws base beside LoRA, and loads the file in unmodified diffusers.
    """
    from rich.console import Console
    from rich.table import Table

    from scumble.runs.demo import run_demo, table

    console = Console()
    changes = {} if steps is None else {"train__steps": steps}
    made = run_demo(style, output, pictures=pictures, overwrite=overwrite, say=console.print, **changes)
    sheet = Table("what the oracle sees", "base", "LoRA", title=f"{pictures} scenes never shown in training")
    for row in table(made):
        sheet.add_row(*row)
    console.print(sheet)
    same = (
        "the very same picture" if made.psnr == float("inf") else f"the same picture, PSNR {made.psnr:.0f} dB"
    )
    console.print(f"Unmodified diffusers draws {same} from the file.")
    for line in (f"Look at  {made.grid}", f"and      {made.report}", f"Adapter: {made.adapter}"):
        console.print(line, soft_wrap=True)
