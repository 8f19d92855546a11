"""`scumble subtract A B`: what A does and B does not."""

from __future__ import annotations

from typing import Annotated

import typer

from scumble.cli.generate import parse_use
from scumble.cli.options import Base, Out, Overwrite, SaveAs


def subtract(
    first: Annotated[str, typer.Argument(metavar="A[:STRENGTH]", help="The adapter to take from.")],
    second: Annotated[str, typer.Argument(metavar="B[:STRENGTH]", help="The adapter to take away.")],
    out: Out,
    rank: Annotated[
        int | None, typer.Option(min=1, help="At most this rank. Unset: as much as the difference has.")
    ] = None,
    energy: Annotated[
        float | None, typer.Option(help="Keep this share of each layer's squared norm, e.g. 0.99.")
    ] = None,
    base: Base = None,
    save_as: SaveAs = None,
    dtype: Annotated[
        str | None, typer.Option(help="fp32, fp16 or bf16. Unset: the wider of the two.")
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Take one adapter's change out of another's."""
    from dataclasses import replace

    from rich.console import Console

    from scumble.adapters.factors import Keep
    from scumble.adapters.mix import subtract as difference
    from scumble.runs.base_files import open_base
    from scumble.runs.rework import dtype_called, ingredient, refuse_existing, save

    said = Console(stderr=True, highlight=False, soft_wrap=True)
    keep = None if rank is None and energy is None else Keep(rank, energy)
    number, uses = dtype_called(dtype), [parse_use(first), parse_use(second)]
    refuse_existing(out, overwrite, [use.path for use in uses])
    weights = None if base is None else open_base(base)
    layers = None if weights is None else weights.shapes
    one, two = (ingredient(use.path, use.strength, layers=layers) for use in uses)
    mixed, found = difference(one.part, two.part, keep, weights)
    sources = [one, replace(two, strength=-two.strength)]
    written = save(
        found.state, out, dialect=save_as, dtype=number, work={"work": "subtract"}, sources=sources
    )
    ranks = sorted(rank for _, rank in found.ranks.values())
    said.print(
        f"{len(ranks)} layers, rank {ranks[0]} to {ranks[-1]}; kept {min(found.kept.values()):.1%} (least) of a "
        f"layer's energy"
    )
    gone = len(mixed.vanished) + len(found.vanished)
    if gone:
        said.print(f"note: {gone} layers cancel and are left out", style="yellow")
    typer.echo(written)
