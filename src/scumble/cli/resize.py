"""`scumble resize FILE`: the nearest adapter of smaller rank."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from scumble.cli.options import Base, Out, Overwrite, SaveAs


def resize(
    file: Annotated[Path, typer.Argument(help="An adapter's file, folder or Hub id.")],
    out: Out,
    rank: Annotated[int | None, typer.Option(min=1, help="At most this rank.")] = None,
    energy: Annotated[
        float | None, typer.Option(help="Keep this share of each layer's squared norm, e.g. 0.95.")
    ] = None,
    frobenius: Annotated[
        float | None, typer.Option(help="Keep this share of each layer's norm; the root of an energy.")
    ] = None,
    base: Base = None,
    save_as: SaveAs = None,
    dtype: Annotated[str | None, typer.Option(help="fp32, fp16 or bf16. Unset: as the file's.")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Give an adapter a smaller rank."""
    from rich.console import Console

    from scumble.adapters.factors import Keep
    from scumble.adapters.resize import resize as smaller
    from scumble.runs.base_files import open_base
    from scumble.runs.rework import dtype_called, ingredient, refuse_existing, save

    said = Console(stderr=True, highlight=False, soft_wrap=True)
    keep, number = Keep(rank, energy, frobenius), dtype_called(dtype)
    refuse_existing(out, overwrite, [file])
    weights = None if base is None else open_base(base)
    read = ingredient(file, layers=None if weights is None else weights.shapes)
    found = smaller(read.file.state, keep, weights)
    work = {"work": "resize", **{name: value for name, value in vars(keep).items() if value is not None}}
    written = save(found.state, out, dialect=save_as, dtype=number, work=work, sources=[read])
    before, now = (sorted(rank[side] for rank in found.ranks.values()) for side in (0, 1))
    said.print(
        f"{len(found.ranks)} layers, rank {before[0]}-{before[-1]} -> {now[0]}-{now[-1]}; kept "
        f"{min(found.kept.values()):.1%} (least) to {max(found.kept.values()):.1%} of a layer's energy"
    )
    if found.vanished:
        said.print(f"note: {len(found.vanished)} layers changed nothing and are left out", style="yellow")
    typer.echo(written)
