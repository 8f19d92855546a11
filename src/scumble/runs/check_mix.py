"""Checking a mix: two adapters' files compared before anything is drawn, as a table, a picture and a verdict.

The columns of the table tell where in the weights the two meet (`adapters/overlap.py`); a block's number is the mean
over its layers, each counted by the product of the two changes' norms, so that layers which one of them hardly
touches count little. They are no measure of damage: on the picturebook, whose pictures were judged, none of them goes
with it. What does is how large one change is beside the other, `MixCheck.shares`: the larger one damages the smaller
(`benchmarks/mixes.py`). How much a pair is damaged in all, nothing here tells.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from scumble.adapters.overlap import Overlap, overlap
from scumble.adapters.state import AdapterState
from scumble.formats.inspection import block_of, blocks_of
from scumble.runs.base_files import BaseFiles, open_base
from scumble.runs.rework import ingredient

if TYPE_CHECKING:
    from PIL import Image

COLUMNS: Mapping[str, str] = {
    "reads": "right",
    "reads by chance": "chance_right",
    "writes": "left",
    "writes by chance": "chance_left",
    "agreement": "agreement",
    "conflict": "conflict",
}
"""Column -> field of LayerOverlap."""
EVEN = 1.25
"""Norms whose ratio is below this are told as alike. That far apart, the smaller one lost more in all 14 of the
picturebook's unequal pairs, 12 of them a style beside a creature; closer together in 3 of 5."""
DRAWN = ("reads", "writes", "conflict")
"""Columns of the picture."""

_CELL, _ROW, _MARGIN = 96, 18, 12
_PAPER, _INK, _DEEP = (250, 249, 246), (40, 40, 40), (178, 24, 43)


@dataclass(frozen=True)
class Row:
    """One block, or one layer."""

    name: str
    layers: int
    values: Mapping[str, float]
    """Column -> number."""


@dataclass(frozen=True)
class MixCheck:
    """How two adapters lie to each other."""

    names: tuple[str, str]
    rows: tuple[Row, ...]
    whole: Row
    notes: tuple[str, ...]
    norms: tuple[float, float] | None = None
    """Frobenius norms of the two whole changes, at strength 1; None where a base's weights would be needed."""

    @property
    def shares(self) -> tuple[float, float] | None:
        """What each has to bear: ||B|| / (||A|| + ||B||) for A, ||A|| / (||A|| + ||B||) for B. Above a half, the
        other is the larger, and damages it more than the other way round."""
        if self.norms is None or not sum(self.norms):
            return None
        one, two = self.norms
        return two / (one + two), one / (one + two)

    @property
    def verdict(self) -> str:
        """Which will damage the other, in plain words."""
        if self.norms is None:
            return "Which damages the other can't be told without the base's weights: name it with --base."
        (small, quiet), (large, loud) = sorted(zip(self.norms, self.names, strict=True))
        figures = f"norms {self.norms[0]:.3g} and {self.norms[1]:.3g}"
        if large < EVEN * small:
            return (
                f"Neither is much larger ({figures}): if they damage each other, no side is told beforehand."
            )
        times = f"{large / small:.1f} times as large" if small else "all there is"
        return (
            f"Expect {loud} to damage {quiet} more than the other way round: its change is {times} ({figures}). How "
            "much, only pictures tell."
        )


def check(
    first: str | Path,
    second: str | Path,
    *,
    base: str | Path | None = None,
    energy: float = 0.99,
    per_layer: bool = False,
) -> MixCheck:
    """Compare two adapters, before anything is drawn.

    Args:
        first, second: a file, a folder, or a Hub id.
        base: theirs, for families whose change depends on its weights.
        energy: as for `overlap`.
        per_layer: a row for every layer, not for every block.

    Raises:
        FormatError: one can't be read.
        WrongBase, AdapterError: as `overlap`.
    """
    weights = None if base is None else open_base(base)
    layers = None if weights is None else weights.shapes
    read = [ingredient(path, layers=layers) for path in (first, second)]
    found = overlap(read[0].file.state, read[1].file.state, weights, energy=energy)
    groups: dict[str, list[str]] = defaultdict(list)
    for path in found.layers:
        groups[path if per_layer else block_of(path)].append(path)
    names = read[0].file.path.name, read[1].file.path.name
    if names[0] == names[1]:  # files are often called alike, and their folders are not
        names = read[0].file.path.parent.name, read[1].file.path.parent.name
    rows = tuple(_row(name, found, paths) for name, paths in groups.items())
    norms = [_norm(one.file.state, weights) for one in read]
    whole = _row("everything", found, list(found.layers))
    sizes = None if norms[0] is None or norms[1] is None else (norms[0], norms[1])
    return MixCheck(names, rows, whole, tuple(_notes(found)), sizes)


def _norm(state: AdapterState, weights: BaseFiles | None) -> float | None:
    norms = [block.norm for block in blocks_of(state, weights)]
    known = [norm for norm in norms if norm is not None]
    return math.hypot(*known) if len(known) == len(norms) else None


def _row(name: str, found: Overlap, paths: list[str]) -> Row:
    return Row(name, len(paths), {column: found.mean(field, paths) for column, field in COLUMNS.items()})


def _notes(found: Overlap) -> list[str]:
    notes = [
        "reads, writes: how much of the narrower change's inputs and outputs the other shares (0 to 1; 'by chance' "
        "is what unrelated ones of these ranks share)",
        "conflict: how much of both happens in the same place and disagrees (0 none, 0.5 unrelated, 1 they cancel)",
        "The table says where two changes meet, not what it costs: its columns did not foretell damage.",
    ]
    alone = len(found.only_first), len(found.only_second)
    if any(alone):
        notes.append(f"{alone[0]} layers are changed by the first alone, {alone[1]} by the second alone.")
    return notes


def draw(check: MixCheck) -> Image.Image:
    """The table as a heat map, RGB: a row for every block, columns reads, writes, conflict; deep red is 1."""
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(12)
    rows = (*check.rows, check.whole)
    pen = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    width = max(int(pen.textlength(row.name, font=font)) for row in rows) + 2 * _MARGIN
    title = f"{check.names[0]}  x  {check.names[1]}"
    size = (
        max(width + _CELL * len(DRAWN) + _MARGIN, int(pen.textlength(title, font=font)) + 2 * _MARGIN),
        2 * _MARGIN + (len(rows) + 2) * _ROW + _MARGIN,
    )
    image = Image.new("RGB", size, _PAPER)
    pen = ImageDraw.Draw(image)
    pen.text((_MARGIN, _MARGIN), title, fill=_INK, font=font)
    top = _MARGIN + _ROW
    for column, name in enumerate(DRAWN):
        pen.text((width + column * _CELL + _CELL // 2, top + 2), name, fill=_INK, font=font, anchor="ma")
    for number, row in enumerate(rows):
        y = top + (number + 1) * _ROW + (_MARGIN // 2 if row is check.whole else 0)
        pen.text((_MARGIN, y + 2), row.name, fill=_INK, font=font)
        for column, name in enumerate(DRAWN):
            value = max(0.0, min(1.0, row.values[name]))
            x = width + column * _CELL
            pen.rectangle((x, y, x + _CELL - 2, y + _ROW - 2), fill=_shade(value))
            ink = _PAPER if value > 0.6 else _INK
            pen.text((x + _CELL // 2, y + 2), f"{row.values[name]:.2f}", fill=ink, font=font, anchor="ma")
    return image


def _shade(value: float) -> tuple[int, int, int]:
    r, g, b = (round(p + (d - p) * value) for p, d in zip((255, 255, 255), _DEEP, strict=True))
    return r, g, b
