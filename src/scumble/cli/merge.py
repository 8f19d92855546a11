"""`scumble merge`: several adapters into one file, or adapters into a base's weights."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from scumble.cli.generate import parse_use
from scumble.cli.options import Base, Out, Overwrite, SaveAs, Variant, counting
from scumble.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from scumble.adapters.mix import MixSettings
    from scumble.runs.merge import Source


def merge(
    adapters: Annotated[
        list[str],
        typer.Argument(
            metavar="FILE[:STRENGTH]...", help="Adapters; :0.5 halves one, a negative number takes it away."
        ),
    ],
    out: Out,
    into: Annotated[
        str | None,
        typer.Option(
            help="A base to merge into: 'picturebook', a diffusers folder or a .safetensors checkpoint. "
            "Unset: the adapters become one adapter."
        ),
    ] = None,
    method: Annotated[
        str,
        typer.Option(help="concat (exact), svd (cut to a rank), linear, ties or dare."),
    ] = "concat",
    rank: Annotated[
        int | None, typer.Option(min=1, help="Rank of the result. Unset: what the method needs.")
    ] = None,
    density: Annotated[
        float, typer.Option(min=0, max=1, help="Share of entries that ties and dare keep.")
    ] = 0.5,
    seed: Annotated[int, typer.Option(min=0, help="Which entries dare drops.")] = 0,
    blocks: Annotated[
        list[str] | None,
        typer.Option(
            "--block",
            metavar="[N:]PATTERN=STRENGTH",
            help="Another strength for some layers of the N-th adapter (of all without N), e.g. "
            "'2:unet.up_blocks.*=0.3'. The first that fits wins. Repeatable.",
        ),
    ] = None,
    base: Base = None,
    save_as: SaveAs = None,
    dtype: Annotated[
        str | None, typer.Option(help="fp32, fp16 or bf16. Unset: the widest of the adapters; a base's own.")
    ] = None,
    variant: Variant = None,
    overwrite: Overwrite = False,
) -> None:
    """Merge adapters into one, or into a base."""
    from rich.console import Console

    from scumble.adapters.mix import MixSettings
    from scumble.runs.merge import Source

    said = Console(stderr=True, highlight=False, soft_wrap=True)
    if density == 0:
        raise ConfigError("--density 0 keeps nothing. Write a share above 0, at most 1.")
    settings = MixSettings(method=method, rank=rank, density=density, seed=seed)
    uses = [parse_use(text) for text in adapters]
    strengths = parse_blocks(blocks or [], len(uses))
    sources = [Source(use.path, use.strength, chosen) for use, chosen in zip(uses, strengths, strict=True)]
    if into is None:
        _into_one(sources, settings, out, base, save_as, dtype, overwrite, said)
    else:
        if dtype is not None or save_as is not None or base is not None:
            raise ConfigError(
                "--dtype, --save-as and --base are for one adapter made of several; a base keeps its own dtype and "
                "layout. Leave them out, or leave out --into."
            )
        _into_base(sources, settings, into, out, variant, overwrite, said)


def parse_blocks(texts: list[str], count: int) -> list[dict[str, float]]:
    """`[N:]PATTERN=STRENGTH` -> per adapter: pattern -> strength.

    Raises:
        ConfigError: it is malformed, or there is no N-th adapter.
    """
    chosen: list[dict[str, float]] = [{} for _ in range(count)]
    for text in texts:
        found = re.fullmatch(r"(?:(\d+):)?([^=]+)=([-+.\deE]+)", text.strip())
        try:
            number, pattern, strength = int(found[1] or 0), found[2], float(found[3])  # type: ignore[index]
        except (TypeError, ValueError):
            raise ConfigError(
                f"--block {text!r} is not [N:]PATTERN=STRENGTH. Write e.g. --block '1:unet.up_blocks.*=0.5'."
            ) from None
        if number > count:
            raise ConfigError(f"--block {text!r} speaks of adapter {number}; {count} are given.")
        for index in range(count) if found[1] is None else [number - 1]:  # type: ignore[index]
            if index < 0:
                raise ConfigError(f"--block {text!r}: the first adapter is number 1.")
            chosen[index][pattern] = strength
    return chosen


def _into_one(
    sources: list[Source],
    settings: MixSettings,
    out: Path,
    base: str | None,
    save_as: str | None,
    dtype: str | None,
    overwrite: bool,
    said: Console,
) -> None:
    from scumble.adapters.mix import mix
    from scumble.runs.base_files import open_base
    from scumble.runs.rework import dtype_called, ingredient, mix_record, refuse_existing, save

    number = dtype_called(dtype)
    refuse_existing(out, overwrite, [Path(source.path) for source in sources])
    weights = None if base is None else open_base(base)
    layers = None if weights is None else weights.shapes
    read = [ingredient(source.path, source.strength, source.blocks, layers) for source in sources]
    mixed = mix([one.part for one in read], settings, weights)
    file = save(mixed.state, out, dialect=save_as, dtype=number, work=mix_record(settings), sources=read)
    kept = min(mixed.kept.values())
    ranks = sorted({layer.rank for layer in mixed.state.layers.values()})
    said.print(
        f"{len(mixed.state.layers)} layers by {settings.method}, rank "
        f"{ranks[0] if len(ranks) == 1 else f'{ranks[0]} to {ranks[-1]}'}; "
        f"{'nothing was cut off' if kept == 1 else f'every layer keeps at least {kept:.1%} of the change'}"
    )
    if mixed.vanished:
        said.print(f"note: {len(mixed.vanished)} layers cancel and are left out", style="yellow")
    typer.echo(file)


def _into_base(
    sources: list[Source],
    settings: MixSettings,
    into: str,
    out: Path,
    variant: str | None,
    overwrite: bool,
    said: Console,
) -> None:
    from scumble.runs.merge import merge_into_base

    with counting("merging", said) as bar:
        task = bar.add_task("", total=None)
        merged = merge_into_base(
            sources,
            into,
            out,
            settings=settings,
            variant=variant,
            overwrite=overwrite,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    said.print(f"{merged.layers} layers of {into} changed", markup=False)
    for note in merged.notes:
        said.print(f"note: {note}", style="yellow", markup=False)
    typer.echo(merged.path)
