"""The contact sheet: one picture that shows exactly what will be trained, each tile with its caption."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

SIDE = 192
"""Longest side of a tile, in pixels. Smaller pictures are shown enlarged by a whole number."""
MOST = 240
"""Tiles on a sheet; what is left out is said at its foot."""
_GAP = 12
_LINES = 3
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
_PAPER, _INK, _FAINT = (250, 249, 246), (40, 40, 40), (120, 120, 120)


@dataclass(frozen=True)
class Tile:
    """One cut of one picture."""

    image: Image.Image
    """As `shrunk` gives it."""
    caption: str
    """The words it is trained with."""
    note: str
    """A short line on top of the caption: file, size, crop."""


def shrunk(image: Image.Image) -> Image.Image:
    """A picture at the size of a tile."""
    longest = max(image.size)
    if longest > SIDE:
        scale = SIDE / longest
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        return image.resize(size, Image.Resampling.LANCZOS)
    times = SIDE // longest
    return image.resize((image.width * times, image.height * times), Image.Resampling.NEAREST)


def contact_sheet(tiles: Sequence[Tile], *, title: str, left_out: int = 0) -> Image.Image:
    """RGB picture of all tiles in rows, `title` above, and how many were `left_out` below."""
    font, small = ImageFont.load_default(12), ImageFont.load_default(10)
    columns = max(1, min(6, len(tiles)))
    rows = -(-len(tiles) // columns)
    cell_width, cell_height = SIDE + _GAP, SIDE + (_LINES + 1) * 14 + 2 * _GAP
    width, height = columns * cell_width + _GAP, rows * cell_height + 2 * _GAP + 20 + (20 if left_out else 0)
    sheet = Image.new("RGB", (max(width, 480), height), _PAPER)
    pen = ImageDraw.Draw(sheet)
    pen.text((_GAP, _GAP), _fit(pen, title, font, sheet.width - 2 * _GAP, 1)[0], fill=_INK, font=font)
    for index, tile in enumerate(tiles):
        row, column = divmod(index, columns)
        left, top = _GAP + column * cell_width, 2 * _GAP + 20 + row * cell_height
        sheet.paste(tile.image, (left + (SIDE - tile.image.width) // 2, top + SIDE - tile.image.height))
        pen.text((left, top + SIDE + 3), _fit(pen, tile.note, small, SIDE, 1)[0], fill=_FAINT, font=small)
        lines = _fit(pen, tile.caption or "(no words)", font, SIDE, _LINES)
        for number, line in enumerate(lines):
            ink = _INK if tile.caption else _FAINT
            pen.text((left, top + SIDE + 17 + 14 * number), line, fill=ink, font=font)
    if left_out:
        pen.text((_GAP, height - 24), f"and {left_out} more", fill=_FAINT, font=font)
    return sheet


def _fit(pen: ImageDraw.ImageDraw, text: str, font: Font, width: int, lines: int) -> list[str]:
    """`text` broken into at most `lines` lines of `width` pixels; "..." at the end when it does not fit."""
    done: list[str] = []
    line = ""
    for word in text.split():
        longer = f"{line} {word}".strip()
        if line and pen.textlength(longer, font=font) > width:
            done.append(line)
            line = word
        else:
            line = longer
    done.append(line)
    cut = len(done) > lines
    done = done[:lines]
    for index, line in enumerate(done):
        ending = "..." if cut and index == lines - 1 else ""
        short = line
        while short and pen.textlength(short + ending, font=font) > width:
            short, ending = short[:-1], "..."
        done[index] = short + ending
    return done
