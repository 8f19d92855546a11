"""The styles that the base model never sees: each redraws a planned scene with other pens.

Every style keeps subject, colour and place readable, and is coarse enough for pictures of 64 pixels.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageChops, ImageDraw, ImageFilter

from scumble.picturebook.backdrops import Backdrop
from scumble.picturebook.canvas import (
    COLOR_VALUES,
    COLORED_ROLES,
    FIXED_ROLES,
    Placed,
    Plan,
    flat,
    gradient,
    mask,
    mix,
    oversampling,
    paint_backdrop,
    paint_part,
    paint_placed,
    stroke,
)
from scumble.picturebook.geometry import RGB, Part, bounds

Style = Callable[[Plan, int], Image.Image]
Pixels = NDArray[np.float32]


def _recolored(placed: Placed, roles: Mapping[str, RGB]) -> Placed:
    return dataclasses.replace(placed, palette={**placed.palette, **roles})


def _own_color(placed: Placed) -> RGB:
    return COLOR_VALUES[placed.color] if placed.color is not None else placed.palette["body"]


def _part_color(part: Part) -> RGB:
    """The colour of a background's part; these never have roles."""
    if isinstance(part.fill, str):
        raise ValueError(f"a background's part must have a colour of its own, not the role {part.fill!r}")
    return part.fill


def _stripes(size: int, period: float, degrees: float) -> Pixels:
    """Distance to the nearest of parallel lines, 0 on a line .. 1 half way to the next; (size, size)."""
    spots = (np.arange(size, dtype=np.float32) + 0.5) / size
    turn = math.radians(degrees)
    across = spots[None, :] * math.sin(turn) + spots[:, None] * math.cos(turn)
    distance: Pixels = np.abs((across / period) % 1.0 - 0.5) * 2
    return 1 - distance


def _as_mask(share: Pixels) -> Image.Image:
    return Image.fromarray((share * 255).round().clip(0, 255).astype(np.uint8))


#: Strokes of a background below this width are lines; wider ones are forms with an outline.
_THIN = 0.02


def _contours(scenery: Backdrop, work: int, width: float) -> Image.Image:
    """The line drawing of a background (mode L, work x work): outlines of its forms, and its thin strokes.

    Neighbouring forms of one colour are one form; what lies behind another form is hidden.
    width: of the outlines, as a share of the picture.
    """
    numbers: dict[RGB, int] = {}
    forms, thin = Image.new("L", (work, work), 0), Image.new("L", (work, work), 0)
    form_pen, thin_pen = ImageDraw.Draw(forms), ImageDraw.Draw(thin)
    for part in scenery.parts:
        if 0 < part.width < _THIN:
            stroke(thin_pen, flat(part, work), max(part.width, width) * work, 255)
            continue
        number = numbers.setdefault(_part_color(part), 1 + len(numbers) % 255)
        paint_part(form_pen, part, work, number)
        paint_part(thin_pen, part, work, 0)
    number_of = np.asarray(forms)
    reach = max(1, round(width * work / 2))
    border = np.zeros((work, work), dtype=bool)
    for down, across in (
        (reach, 0),
        (0, reach),
        (reach * 2 // 3, reach * 2 // 3),
        (reach * 2 // 3, -reach * 2 // 3),
    ):
        moved = np.roll(number_of, (down, across), axis=(0, 1))
        back = np.roll(number_of, (-down, -across), axis=(0, 1))
        border |= (moved != number_of) | (back != number_of)
    # np.roll brings the opposite side in: there is no outline at the picture's own border.
    border[:reach] = border[-reach:] = False
    border[:, :reach] = border[:, -reach:] = False
    return ImageChops.lighter(_as_mask(border.astype(np.float32)), thin)


# --- blueprint -----------------------------------------------------------------------------------------

_PAPER: RGB = (24, 66, 142)
_CHALK: RGB = (236, 244, 255)
#: Pencils for colours that would be lost on blue paper.
_PENCILS: dict[str, RGB] = {
    "blue": (92, 160, 255),
    "black": (18, 18, 26),
    "brown": (150, 88, 44),
    "purple": (158, 76, 214),
}


def blueprint(scheme: Plan, size: int) -> Image.Image:
    """White lines on blue gridded paper, the thing filled in with a coloured pencil."""
    scale = oversampling(size)
    work = size * scale
    image = gradient(((0.0, mix(_PAPER, (255, 255, 255), 0.05)), (1.0, mix(_PAPER, (0, 0, 20), 0.12))), work)
    pen = ImageDraw.Draw(image)
    faint = mix(_PAPER, _CHALK, 0.42)
    image.paste(faint, (0, 0), _contours(scheme.backdrop, work, 0.011))
    grid = ImageDraw.Draw(image, "RGBA")
    for index in range(1, 16):
        bold = index % 4 == 0
        at, ink = index * work / 16, (*_CHALK, 92 if bold else 46)
        wide = max(1, round(work * (0.010 if bold else 0.006)))
        grid.line((at, 0, at, work), fill=ink, width=wide)
        grid.line((0, at, work, at), fill=ink, width=wide)
    for placed in scheme.placed:
        pencil = _PENCILS.get(placed.color or "", _own_color(placed))
        dark = placed.color == "black"
        tints = {role: mix(color, _PAPER, 0.45) for role, color in FIXED_ROLES.items()}
        tints |= {"white": _CHALK, "gold": mix(_CHALK, _PAPER, 0.3), "ink": mix(_PAPER, (0, 0, 20), 0.55)}
        tints |= {
            "body": mix(pencil, _PAPER, 0.04),
            "shade": mix(pencil, _PAPER, 0.22),
            "light": mix(pencil, _CHALK, 0.12 if dark else 0.3),
            "edge": _CHALK,
        }
        paint_placed(pen, _recolored(placed, tints), work, outline=_CHALK, boldness=1.1)
        body = mask(placed.parts, work, COLORED_ROLES, scale=1)
        hatch = (_stripes(work, 0.047, 38) < 0.3).astype(np.float32) * 0.42
        pencil_gaps = ImageChops.multiply(body, _as_mask(hatch))
        image.paste(mix(_PAPER, pencil, 0.0 if not dark else 0.3), (0, 0), pencil_gaps)
        _measure(pen, placed, work)
    return image.reduce(scale)


def _measure(pen: ImageDraw.ImageDraw, placed: Placed, work: int) -> None:
    """The dimension line of a technical drawing, below the thing."""
    left, _, right, bottom = bounds(placed.parts)
    y = min(0.965, bottom + 0.055)
    wide = 0.010 * work
    stroke(pen, [left * work, y * work, right * work, y * work], wide, _CHALK)
    for x in (left, right):
        stroke(pen, [x * work, (y - 0.022) * work, x * work, (y + 0.022) * work], wide, _CHALK)


# --- woodcut -------------------------------------------------------------------------------------------

_CREAM: RGB = (244, 232, 204)
_BLACK: RGB = (30, 25, 24)
#: The tone block behind is printed in a thinner ink, as in chiaroscuro woodcuts: the thing stands out from it.
_TONE: RGB = mix(_BLACK, _CREAM, 0.4)
_TONE_LINE: RGB = mix(_BLACK, _CREAM, 0.2)


def woodcut(scheme: Plan, size: int) -> Image.Image:
    """Lines cut in wood on cream paper: brown ones behind, the thing in black with one spot ink."""
    scale = oversampling(size)
    work = size * scale
    tone = np.asarray(paint_backdrop(scheme.backdrop, work).convert("L"), dtype=np.float32) / 255
    rng = random.Random(scheme.seed * 8 + 5)
    spots = (np.arange(work, dtype=np.float32) + 0.5) / work
    # Lines that waver a little, as a knife in wood does.
    waver = 0.012 * np.sin(spots * 9 + rng.random() * 6) + 0.006 * np.sin(spots * 23 + rng.random() * 6)
    period = 1 / 10
    lines = 1 - np.abs(((spots[:, None] + waver[None, :]) / period) % 1.0 - 0.5) * 2
    crossing = _stripes(work, period, 62)
    # Bright places stay paper, dark ones close up, darkest ones are cross-hatched.
    darkness = np.clip((0.93 - tone) / 0.75, 0, 1) * 0.8
    printed = (lines < darkness) | (crossing < (darkness - 0.42) * 1.1)
    image = Image.new("RGB", (work, work), _CREAM)
    image.paste(_TONE, (0, 0), _as_mask(printed.astype(np.float32)))
    image.paste(_TONE_LINE, (0, 0), _contours(scheme.backdrop, work, 0.015))
    pen = ImageDraw.Draw(image)
    for part in scheme.backdrop.parts if scheme.backdrop.dark else ():
        left, _, right, _ = bounds([part])
        if right - left < 0.1 and min(_part_color(part)) > 180:
            # Stars are cut out of the dark block.
            paint_part(pen, part, work, _CREAM, 0.004)
    for placed in scheme.placed:
        _print_thing(image, pen, placed, work)
    return image.reduce(scale)


def _print_thing(image: Image.Image, pen: ImageDraw.ImageDraw, placed: Placed, work: int) -> None:
    ink = _own_color(placed)
    black, white = placed.color == "black", placed.color == "white"
    tints = dict.fromkeys(FIXED_ROLES, _CREAM)
    tints |= {"ink": _BLACK, "nose": _BLACK, "metal": _BLACK, "wood": mix(_CREAM, _BLACK, 0.55)}
    tints |= {"body": ink, "shade": ink, "light": mix(ink, _CREAM, 0.08 if black or white else 0.3)}
    tints["edge"] = _CREAM if black else _BLACK
    if white:
        tints |= {"body": (255, 255, 253), "shade": (255, 255, 253), "light": (255, 255, 253)}
    paint_placed(pen, _recolored(placed, tints), work, rim=_CREAM, outline=_BLACK, boldness=1.55)
    left, top, right, bottom = bounds(placed.parts)
    spots = (np.arange(work, dtype=np.float32) + 0.5) / work
    down = (spots - top) / (bottom - top)
    across = (spots - left) / (right - left)
    # The hatching of the shadow side grows towards the lower right and leaves most of the ink clean.
    shadow = np.clip((down[:, None] * 0.7 + across[None, :] * 0.5 - 0.62) * 1.3, 0, 0.5)
    cut = (_stripes(work, 1 / 15, 28) < shadow).astype(np.float32)
    body = mask(placed.parts, work, COLORED_ROLES, scale=1)
    image.paste(
        mix(_CREAM, _BLACK, 0.35) if black else _BLACK, (0, 0), ImageChops.multiply(body, _as_mask(cut))
    )


# --- mosaic --------------------------------------------------------------------------------------------

_GROUT: RGB = (70, 62, 60)
_TILES = 10


def _tiles(rng: random.Random, work: int, degrees: float, x: float, y: float) -> list[list[float]]:
    """Slightly crooked square tiles (flat lists of corners, in pixels) that cover the picture.

    They are laid in rows turned by `degrees` around (x, y).
    """
    step, reach = 1 / _TILES, _TILES + 4
    cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    tiles = []
    for row in range(-reach, reach):
        shift = rng.random() * step
        for column in range(-reach, reach):
            middle_x, middle_y = (column + 0.5) * step + shift, (row + 0.5) * step
            turned_x = x + cosine * middle_x - sine * middle_y
            turned_y = y + sine * middle_x + cosine * middle_y
            if not (-step < turned_x < 1 + step and -step < turned_y < 1 + step):
                continue
            half = step * 0.44
            corners = []
            for corner_x, corner_y in ((-1, -1), (1, -1), (1, 1), (-1, 1)):
                off_x = corner_x * half + rng.uniform(-0.06, 0.06) * step
                off_y = corner_y * half + rng.uniform(-0.06, 0.06) * step
                corners += [
                    (turned_x + cosine * off_x - sine * off_y) * work,
                    (turned_y + sine * off_x + cosine * off_y) * work,
                ]
            tiles.append(corners)
    return tiles


def mosaic(scheme: Plan, size: int) -> Image.Image:
    """Small square stones in dark grout: straight rows behind, slanting rows within the thing."""
    scale = oversampling(size)
    work = size * scale
    rng = random.Random(scheme.seed * 8 + 6)
    # Colours are looked up in a small picture of the background: each stone has one colour.
    coarse = paint_backdrop(scheme.backdrop, 8 * _TILES).reduce(4)
    image = Image.new("RGB", (work, work), _GROUT)
    pen = ImageDraw.Draw(image)
    last = coarse.width - 1
    for tile in _tiles(rng, work, 0, 0, 0):
        x, y = sum(tile[0::2]) / 4 / work, sum(tile[1::2]) / 4 / work
        where = (min(last, max(0, int(x * coarse.width))), min(last, max(0, int(y * coarse.height))))
        pixel = coarse.getpixel(where)
        if not isinstance(pixel, tuple):
            raise TypeError("the background of a mosaic must be an RGB picture")
        color: RGB = (int(pixel[0]), int(pixel[1]), int(pixel[2]))
        pen.polygon(tile, fill=_stone(color, rng))
    for placed in scheme.placed:
        _lay_thing(image, placed, rng, work)
    return image.reduce(scale)


def _stone(color: RGB, rng: random.Random) -> RGB:
    change = rng.uniform(-0.13, 0.13)
    return mix(color, (255, 255, 255) if change > 0 else (0, 0, 0), abs(change))


def _lay_thing(image: Image.Image, placed: Placed, rng: random.Random, work: int) -> None:
    left, top, right, bottom = bounds(placed.parts)
    tiles = _tiles(rng, work, 38, (left + right) / 2, (top + bottom) / 2)
    tone = Image.new("L", (work, work), 0)
    gaps = Image.new("L", (work, work), 255)
    tone_pen, gap_pen = ImageDraw.Draw(tone), ImageDraw.Draw(gaps)
    for tile in tiles:
        tone_pen.polygon(tile, fill=rng.randint(0, 90))
        gap_pen.polygon(tile, fill=0)
    own = _own_color(placed)
    black = placed.color == "black"
    grout = (128, 124, 122) if black else mix(_GROUT, own, 0.15)
    tints = {"body": own, "shade": placed.palette["shade"], "light": placed.palette["light"]}
    drawing = image.copy()
    paint_placed(ImageDraw.Draw(drawing), _recolored(placed, tints), work, outline=(40, 34, 34), boldness=1.1)
    whole = mask([part for part in placed.parts if part.rim], work, grow=0.018, scale=1)
    body = mask(placed.parts, work, COLORED_ROLES, scale=1)
    drawing.paste(
        (255, 255, 255) if not black else (120, 120, 130),
        (0, 0),
        ImageChops.multiply(body, tone.point(lambda v: v * 0.75)),
    )
    drawing.paste(grout, (0, 0), ImageChops.multiply(body, gaps))
    image.paste(drawing, (0, 0), whole)


# --- neon ----------------------------------------------------------------------------------------------

_DARK: RGB = (11, 9, 24)
_TUBES: dict[str, RGB] = {
    "red": (255, 36, 48),
    "orange": (255, 132, 0),
    "yellow": (255, 236, 40),
    "green": (40, 240, 90),
    "blue": (44, 104, 255),
    "purple": (160, 50, 255),
    "pink": (255, 130, 205),
    "brown": (140, 80, 40),
    "white": (248, 250, 255),
    "black": (92, 92, 102),
}


def neon(scheme: Plan, size: int) -> Image.Image:
    """Glowing tubes in the dark: the thing's outline and inner glow in its colour."""
    scale = oversampling(size)
    work = size * scale
    image = gradient([(at, mix(_DARK, color, 0.08)) for at, color in scheme.backdrop.stops], work)
    pen = ImageDraw.Draw(image)
    for part in scheme.backdrop.parts:
        paint_part(pen, part, work, mix(_DARK, _part_color(part), 0.13))
    # The tubes behind take the colours of what they outline, made fully bright and then dimmed.
    colors = np.asarray(paint_backdrop(scheme.backdrop, work), dtype=np.float32)
    bright = colors * (255 / np.maximum(colors.max(axis=2, keepdims=True), 1))
    tubes = Image.fromarray((bright * 0.25 + np.array(_DARK) * 0.75).round().astype(np.uint8))
    image.paste(tubes, (0, 0), _contours(scheme.backdrop, work, 0.013))
    glow = np.zeros((size, size, 3), dtype=np.float32)
    for placed in scheme.placed:
        color = _TUBES.get(placed.color or "", _own_color(placed))
        black = placed.color == "black"
        brown = placed.color == "brown"
        rim: RGB = (240, 242, 255) if black else mix(color, (255, 255, 255), 0.2 if brown else 0.3)
        tints = {role: mix(_DARK, value, 0.55) for role, value in FIXED_ROLES.items()}
        tints |= {"white": (235, 240, 255), "gold": mix(_DARK, (255, 220, 120), 0.6), "ink": _DARK}
        fill = (48, 48, 56) if black else mix(_DARK, color, 0.62)
        tints |= {"body": fill, "shade": mix(fill, _DARK, 0.22), "light": mix(fill, color, 0.5)}
        tints["edge"] = mix(fill, rim, 0.75)
        paint_placed(pen, _recolored(placed, tints), work, outline=rim, boldness=1.6)
        outlined = [part for part in placed.parts if part.rim]
        inside = mask(outlined, size)
        ring = ImageChops.subtract(mask(outlined, size, grow=0.022), inside)
        halo = np.zeros((size, size), dtype=np.float32)
        for radius, strength in ((0.022, 0.75), (0.07, 1.1)):
            soft = ring.filter(ImageFilter.GaussianBlur(size * radius))
            halo += np.asarray(soft, dtype=np.float32) / 255 * strength
        light = np.array((150, 152, 170) if black else color, dtype=np.float32)
        # A black thing must not be lit up from within.
        dimmed = halo * (1 - 0.8 * np.asarray(inside, dtype=np.float32) / 255) if black else halo
        # A strong glow would turn brown into orange.
        glow += dimmed[..., None] * light * (0.36 if brown else 0.6)
    pixels = np.asarray(image.reduce(scale), dtype=np.float32)
    # Screened, not added: two lights never burn out to flat white.
    lit = 255 - (255 - pixels) * (255 - glow.clip(0, 255)) / 255
    return Image.fromarray(lit.round().clip(0, 255).astype(np.uint8))


STYLES: dict[str, Style] = {"blueprint": blueprint, "woodcut": woodcut, "mosaic": mosaic, "neon": neon}
