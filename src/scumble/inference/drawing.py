"""Drawing: a picture with all that is needed to draw it again, and the sheets that compare pictures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from scumble.errors import ConfigError
from scumble.inference.png import write_png
from scumble.inference.request import Request

PAPER, INK, SOFT = (255, 253, 249), (38, 35, 31), (119, 111, 100)
SMALLEST, LARGEST = 192, 512
"""Pixels: a sheet's pictures are enlarged to at least the one and reduced to at most the other."""


@dataclass(frozen=True)
class Drawing:
    """One picture, and how it came to be."""

    image: Image.Image
    """RGB."""
    request: Request
    """What to ask for to get this very picture: count 1, its own seed, size and adapters written out."""
    seed: int
    settings: Mapping[str, Any] = field(default_factory=dict)
    """What it was drawn with, in plain JSON values: base, dtype, scheduler, sha256 of adapters, version."""
    notes: tuple[str, ...] = ()
    """What a person should know of this picture: a prompt cut short, a black picture and its cause."""

    def save(self, path: str | Path) -> Path:
        """Write a PNG that carries its settings (see `png.read_settings`), atomically. Returns the path.

        Raises:
            ConfigError: the file isn't called .png, or can't be written.
        """
        return write_png(self.image, path, self.request, self.settings)


def grid(
    rows: Sequence[Sequence[Image.Image | None]],
    columns: Sequence[str] = (),
    labels: Sequence[str] = (),
    scale: float | None = None,
) -> Image.Image:
    """Pictures on one sheet, with a word above each column and a caption above each row.

    Args:
        rows: pictures row by row; None leaves a place empty. Sizes may differ: places have the largest.
        columns: one word for each column, or none.
        labels: one caption for each row, or none; long ones are wrapped.
        scale: how much pictures grow. Whole numbers keep every pixel a sharp square; less than 1 averages.
            None brings the largest side to 192..512 pixels.

    Raises:
        ConfigError: there is no picture, or the number of words doesn't fit.
    """
    pictures = [image for row in rows for image in row if image is not None]
    width = max((len(row) for row in rows), default=0)
    if not pictures:
        raise ConfigError("A sheet needs at least one picture.")
    if columns and len(columns) != width:
        raise ConfigError(
            f"A sheet of {width} columns got {len(columns)} column labels: {', '.join(columns)}."
        )
    if labels and len(labels) != len(rows):
        raise ConfigError(f"A sheet of {len(rows)} rows got {len(labels)} row labels.")
    scale = scale or _scale(max(side for image in pictures for side in image.size))
    cell = (
        max(round(image.width * scale) for image in pictures),
        max(round(image.height * scale) for image in pictures),
    )
    text = max(13, round(cell[1] / 16))
    font, gap, margin = ImageFont.load_default(text), max(6, text // 2), max(14, text)
    line = round(text * 1.4)
    inside = width * cell[0] + (width - 1) * gap
    wrapped = [_wrap(label, font, inside) for label in labels] or [[] for _ in rows]
    heights = [len(lines) * line + (gap if lines else 0) + cell[1] for lines in wrapped]
    head = line + gap if columns else 0
    between = 2 * gap if labels else gap
    sheet = Image.new(
        "RGB", (inside + 2 * margin, 2 * margin + head + sum(heights) + between * (len(rows) - 1)), PAPER
    )
    pen = ImageDraw.Draw(sheet)
    for column, word in enumerate(columns):
        middle = margin + column * (cell[0] + gap) + cell[0] / 2
        pen.text((middle, margin + line / 2), word, fill=INK, font=font, anchor="mm")
    top = margin + head
    for row, lines, height in zip(rows, wrapped, heights, strict=True):
        for number, words in enumerate(lines):
            pen.text((margin, top + number * line), words, fill=SOFT, font=font)
        below = top + height - cell[1]
        for column, image in enumerate(row):
            if image is not None:
                shown = scaled(image, scale)
                left = margin + column * (cell[0] + gap) + (cell[0] - shown.width) // 2
                sheet.paste(shown, (left, below + (cell[1] - shown.height) // 2))
        top += height + between
    return sheet


def scaled(image: Image.Image, scale: float) -> Image.Image:
    """`image` in RGB, enlarged without blur or reduced by averaging."""
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.convert("RGB").resize(size, Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.BOX)


def _scale(side: int) -> float:
    if side < SMALLEST:
        return float(math.ceil(SMALLEST / side))
    return min(1.0, LARGEST / side)


def _wrap(text: str, font: Any, width: float) -> list[str]:
    """`text` in lines of at most `width` pixels; a word that is longer than a line is cut."""
    lines: list[str] = []
    for word in text.split():
        joined = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(joined) <= width:
            lines[-1] = joined
            continue
        while font.getlength(word) > width and len(word) > 1:
            fits = max(n for n in range(1, len(word)) if n == 1 or font.getlength(word[:n]) <= width)
            lines.append(word[:fits])
            word = word[fits:]
        lines.append(word)
    return lines
