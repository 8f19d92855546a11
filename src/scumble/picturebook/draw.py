"""Scenes become pictures here; also free doodles and contact sheets."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

from PIL import Image, ImageDraw

from scumble.picturebook.canvas import gradient, oversampling, paint, plan
from scumble.picturebook.geometry import RGB
from scumble.picturebook.scenes import Scene

PLAIN = "plain"
SMALLEST, LARGEST = 16, 2048


def draw(scene: Scene, size: int = 64, style: str = PLAIN) -> Image.Image:
    """The picture of a scene: RGB, size x size, the same bytes in every process.

    style: "plain" or a name of `styles.STYLES`. Raises ValueError for another style or a size outside
    16..2048.
    """
    if not SMALLEST <= size <= LARGEST:
        raise ValueError(f"size must lie in {SMALLEST}..{LARGEST}, got {size}")
    scheme = plan(scene)
    if style == PLAIN:
        return paint(scheme, size)
    # Imported late: styles draw on the canvas, and plain pictures need none of them.
    from scumble.picturebook.styles import STYLES

    if style not in STYLES:
        raise ValueError(f"unknown style {style!r}; known: {', '.join((PLAIN, *STYLES))}")
    return STYLES[style](scheme, size)


def _any_color(rng: random.Random) -> RGB:
    return rng.randrange(256), rng.randrange(256), rng.randrange(256)


def _doodle_strokes(pen: ImageDraw.ImageDraw, rng: random.Random, size: int) -> None:
    for _ in range(rng.randint(3, 14)):
        x, y, heading = rng.random() * size, rng.random() * size, rng.random() * 2 * math.pi
        bend, step = rng.uniform(-0.5, 0.5), size * rng.uniform(0.02, 0.08)
        line = []
        for _ in range(rng.randint(2, 24)):
            line += [x, y]
            x, y = x + step * math.cos(heading), y + step * math.sin(heading)
            heading += bend + rng.uniform(-0.3, 0.3)
        pen.line(
            [*line, x, y],
            fill=_any_color(rng),
            width=max(1, round(size * rng.choice((0.006, 0.012, 0.02, 0.04, 0.07)))),
            joint="curve",
        )


def _doodle_hatching(pen: ImageDraw.ImageDraw, rng: random.Random, size: int) -> None:
    color, other = _any_color(rng), _any_color(rng)
    left, top = rng.uniform(-0.1, 0.6) * size, rng.uniform(-0.1, 0.6) * size
    wide, high = rng.uniform(0.2, 0.9) * size, rng.uniform(0.2, 0.9) * size
    gap, slope = size * rng.uniform(0.025, 0.1), rng.uniform(-1.0, 1.0)
    width = max(1, round(gap * rng.uniform(0.15, 0.6)))
    for index in range(int(wide / gap)):
        x = left + index * gap
        pen.line((x, top, x + slope * high, top + high), fill=color if index % 2 else other, width=width)


def _doodle_grid(pen: ImageDraw.ImageDraw, rng: random.Random, size: int) -> None:
    color, gap = _any_color(rng), size * rng.uniform(0.05, 0.2)
    shift = rng.random() * gap
    width = max(1, round(size * rng.choice((0.006, 0.012, 0.02))))
    for index in range(int(size / gap) + 1):
        at = shift + index * gap
        pen.line((at, 0, at, size), fill=color, width=width)
        pen.line((0, at, size, at), fill=color, width=width)


def _doodle_tiles(pen: ImageDraw.ImageDraw, rng: random.Random, size: int) -> None:
    count = rng.randint(3, 14)
    step, base, gap = size / count, _any_color(rng), rng.uniform(0.0, 0.15)
    reach = rng.choice((30, 90, 255))
    for row in range(count):
        for column in range(count):
            if rng.random() < 0.15:
                continue
            color = tuple(max(0, min(255, channel + rng.randint(-reach, reach))) for channel in base)
            pen.rectangle(
                (
                    (column + gap) * step,
                    (row + gap) * step,
                    (column + 1 - gap) * step,
                    (row + 1 - gap) * step,
                ),
                fill=color,
            )


def _doodle_polygons(pen: ImageDraw.ImageDraw, rng: random.Random, size: int) -> None:
    for _ in range(rng.randint(2, 9)):
        x, y, radius = rng.random() * size, rng.random() * size, rng.uniform(0.05, 0.4) * size
        corners, first = rng.randint(3, 9), rng.random() * 6
        line = []
        for corner in range(corners):
            angle = first + corner * 2 * math.pi / corners
            reach = radius * rng.uniform(0.5, 1.0)
            line += [x + reach * math.cos(angle), y + reach * math.sin(angle)]
        pen.polygon(line, fill=_any_color(rng))
        if rng.random() < 0.5:
            pen.line([*line, *line[:2]], fill=_any_color(rng), width=max(1, round(size * 0.015)))


def _doodle_dots(pen: ImageDraw.ImageDraw, rng: random.Random, size: int) -> None:
    few, radius = [_any_color(rng) for _ in range(3)], size * rng.uniform(0.008, 0.06)
    for _ in range(rng.randint(8, 50)):
        x, y, r = rng.random() * size, rng.random() * size, radius * rng.uniform(0.5, 1.5)
        pen.ellipse((x - r, y - r, x + r, y + r), fill=rng.choice(few))


def _doodle_rings(pen: ImageDraw.ImageDraw, rng: random.Random, size: int) -> None:
    x, y = rng.random() * size, rng.random() * size
    width, count = max(1, round(size * rng.choice((0.01, 0.02, 0.04)))), rng.randint(2, 9)
    step = size * rng.uniform(0.03, 0.09)
    for index in range(1, count):
        r = index * step
        pen.ellipse((x - r, y - r, x + r, y + r), outline=_any_color(rng), width=width)


_DOODLES = (
    _doodle_strokes,
    _doodle_strokes,
    _doodle_hatching,
    _doodle_grid,
    _doodle_tiles,
    _doodle_polygons,
    _doodle_dots,
    _doodle_rings,
)


def doodle(rng: random.Random, size: int = 64) -> Image.Image:
    """An abstract picture (RGB, size x size): gradients, strokes, hatching, grids, tiles, polygons, dots.

    It means nothing: it shows an autoencoder the textures and colours that scenes do not have.
    """
    scale = oversampling(size)
    work = size * scale
    first, second = _any_color(rng), _any_color(rng)
    if rng.random() < 0.3:
        second = first
    image = gradient(((0.0, first), (1.0, second)), work)
    turn = rng.randrange(4)
    if turn:
        image = image.transpose(
            (Image.Transpose.ROTATE_90, Image.Transpose.ROTATE_180, Image.Transpose.ROTATE_270)[turn - 1]
        )
    pen = ImageDraw.Draw(image)
    for _ in range(rng.randint(1, 4)):
        rng.choice(_DOODLES)(pen, rng, work)
    return image.reduce(scale)


def contact_sheet(
    images: Sequence[Image.Image], columns: int, captions: Sequence[str] | None = None
) -> Image.Image:
    """All pictures on one page, row by row, each over its caption.

    Raises ValueError without pictures, with fewer than one column, or where captions do not match in number.
    """
    if not images or columns < 1:
        raise ValueError("a contact sheet needs at least one picture and one column")
    if captions is not None and len(captions) != len(images):
        raise ValueError(f"{len(images)} pictures but {len(captions)} captions")
    gap = 6
    wide = max(image.width for image in images)
    high = max(image.height for image in images)
    lines = [_wrapped(text, wide) for text in captions] if captions is not None else []
    below = 12 * max((len(rows) for rows in lines), default=0)
    rows = -(-len(images) // columns)
    page = Image.new(
        "RGB", (columns * (wide + gap) + gap, rows * (high + below + gap) + gap), (246, 243, 236)
    )
    pen = ImageDraw.Draw(page)
    for index, image in enumerate(images):
        x = gap + index % columns * (wide + gap)
        y = gap + index // columns * (high + below + gap)
        page.paste(image.convert("RGB"), (x, y))
        if captions is not None:
            for row, text in enumerate(lines[index]):
                pen.text((x, y + high + 12 * row), text, fill=(40, 36, 44))
    return page


def _wrapped(text: str, width: int) -> list[str]:
    """Lines that fit the width in Pillow's own small font (about six pixels a letter)."""
    room = max(6, width // 6)
    lines, line = [], ""
    for word in text.split():
        if line and len(line) + 1 + len(word) > room:
            lines.append(line)
            line = word
        else:
            line = f"{line} {word}".strip()
    return [*lines, line]
