"""`scumble inspect FILE`: what an adapter file holds, and with `--against BASE` whether it fits."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from scumble.cli.options import Rest
from scumble.errors import ConfigError, printable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from scumble.formats.codec import Read
    from scumble.formats.inspection import Block, Inspection
    from scumble.models.family import BaseModel


def inspect(
    file: Annotated[Path, typer.Argument(help="A .safetensors file, or a folder that holds one.")],
    against: Annotated[
        str | None,
        typer.Option(
            help="A base to check it against: a diffusers folder, a Hub id, a .safetensors checkpoint, or picturebook."
        ),
    ] = None,
    rest: Rest = None,
) -> None:
    """Say what an adapter file holds."""
    from rich.console import Console

    from scumble.formats.inspection import inspect as look

    if rest is not None and against is None:
        raise ConfigError(
            "--rest has no effect without --against: it completes the base that is compared with."
        )
    console = Console(highlight=False, soft_wrap=True)
    _show(console, look(file))
    if against is not None:
        _compare(console, file, against, rest)


def _show(console: Console, found: Inspection) -> None:
    from scumble.adapters.names import one_word
    from scumble.formats.pairs import count

    facts: list[tuple[str, str]] = [
        ("file", str(found.path)),
        ("dialect", found.dialect),
        ("base", found.base or "not said, and not visible in the shapes"),
        ("family", ", ".join(found.families)),
        ("rank", _tally(found.ranks)),
        (
            "alpha",
            _tally(found.alphas)
            + (f", rank-stabilized on {found.rank_stabilized}" * bool(found.rank_stabilized)),
        ),
        ("layers", ", ".join(f"{number} {root}" for root, number in found.layers.items())),
        ("parameters", f"{found.parameters:,}"),
        ("dtype", ", ".join(found.dtypes)),
        ("size", f"{found.size:,} bytes"),
        ("sha256", found.sha256),
    ]
    facts += [("note", note) for note in found.notes]
    facts += [("no known kind", name) for name in _first(found.unused)]
    _rows(console, facts)
    said = {name: text for name, text in vars(found.metadata).items() if name != "extra" and text}
    entries = [(name, _clip(text)) for name, text in (*said.items(), *sorted(found.metadata.extra.items()))]
    if entries:
        console.print("\nmetadata")
        _rows(console, entries)
    if found.tokens:
        console.print("\ntokens")
        _rows(
            console,
            [
                (
                    name,
                    count(number, "vector") + f", in a prompt: {one_word(name)}" * (one_word(name) != name),
                )
                for name, number in found.tokens.items()
            ],
        )
    if found.blocks:
        console.print()
        _picture(console, found.blocks)


def _picture(console: Console, blocks: Sequence[Block]) -> None:
    """A bar for every block, the longest for the block that moves farthest."""
    from rich.bar import Bar
    from rich.table import Table
    from rich.text import Text

    most = max((block.norm or 0.0 for block in blocks), default=0.0) or 1.0
    table = Table("block", "layers", "norm of the change", "", box=None, header_style="bold")
    for block in blocks:
        known = block.norm is not None
        bar = Bar(most, 0, block.norm or 0.0, width=32, color="cyan")
        table.add_row(
            Text(printable(block.name)),
            str(block.layers),
            f"{block.norm:.4g}" if known else "only with --against BASE",
            bar if known else "",
        )
    console.print(table)


def _rows(console: Console, rows: list[tuple[str, str]]) -> None:
    from rich.text import Text

    shown = [(printable(name), printable(value)) for name, value in rows]
    width = max(len(name) for name, _ in shown) + 2
    for name, value in shown:
        console.print(Text.assemble((f"{name:<{width}}", "bold"), value))


def _tally(counts: dict[Any, int]) -> str:
    """`"4"`, or `"4 (100 layers), 8 (28 layers)"`."""
    if len(counts) == 1:
        return f"{next(iter(counts)):g}"
    return ", ".join(f"{value:g} ({number} layer{'s' * (number != 1)})" for value, number in counts.items())


def _first(names: Sequence[str]) -> list[str]:
    """Ten of them, and how many more there are."""
    more = [f"... and {len(names) - 10} more"] if len(names) > 10 else []
    return [*names[:10], *more]


def _clip(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 200 else line[:197] + "..."


def _compare(console: Console, file: Path, against: str, rest: str | None) -> None:
    """Print how the file fits the base; exit code 1 when a tensor would be left out.

    Raises:
        WrongBase, UnusedTensors: the base is of another family, or nothing fits.
    """
    import torch
    from rich.text import Text

    from scumble.adapters import layers_of
    from scumble.formats.codec import read
    from scumble.inference.find_base import find_rest
    from scumble.models.loading import load_base

    rest = find_rest(file, against) if rest is None else rest
    base = load_base(against, dtype=torch.float32, device=torch.device("cpu"), rest=rest)
    if base.late:
        base.claim(read(file, allow_partial=True).state.roots)
    found = read(file, layers_of(base.roots, norms=True), allow_partial=True)
    console.print(Text(f"\nagainst {base.name}: {found.report}"))
    mine = found.state.metadata.base_fingerprint
    if mine:
        same = mine == base.fingerprint()
        console.print(
            "It was trained on this very base." if same else "It was trained on a base with other weights."
        )
    if found.state.layers:
        _act(console, base, found)
    if found.unused:
        for name in _first(found.unused):
            console.print(Text(f"unused: {printable(name)}", style="yellow"))
        raise typer.Exit(1)


def _act(console: Console, base: BaseModel, found: Read) -> None:
    """What the adapter does to this base, in numbers."""
    from scumble.adapters import layers_of
    from scumble.formats.inspection import blocks_of
    from scumble.runs.effect import measure_effect

    effect = measure_effect(base, found.state)
    console.print(
        f"effect at strength 1: the denoiser's outputs move by {effect.denoiser:.2%}, the text's embedding by "
        f"{effect.text:.2%} (rms, on fixed inputs)"
    )
    if effect.denoiser == 0.0:
        console.print("It does nothing to this base.", style="yellow")
    layers = layers_of(base.roots, norms=True)
    blocks = blocks_of(found.state, {path: layer.weight for path, layer in layers.items()})
    if any(block.norm is None for block in blocks_of(found.state)):
        _picture(console, blocks)
