"""The painter: a scene is planned into parts in units of the picture, then painted smooth at any size.

The plan is separate from the paint so that a style can redraw the same scene with other pens.
"""

from __future__ import annotations

import colorsys
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from scumble.picturebook.backdrops import Backdrop, backdrop
from scumble.picturebook.geometry import RGB, Part, fattened
from scumble.picturebook.scenes import Scene
from scumble.picturebook.shapes import shape

COLOR_VALUES: dict[str, RGB] = {
    "red": (218, 38, 44),
    "orange": (255, 138, 12),
    "yellow": (255, 218, 36),
    "green": (44, 160, 66),
    "blue": (40, 98, 222),
    "purple": (122, 54, 178),
    "pink": (255, 146, 194),
    "brown": (122, 72, 38),
    "white": (250, 249, 244),
    "black": (42, 42, 50),
}
FIXED_ROLES: dict[str, RGB] = {
    "ink": (44, 32, 46),
    "white": (255, 255, 252),
    "cream": (250, 240, 216),
    "tan": (222, 196, 152),
    "glass": (176, 222, 240),
    "wood": (146, 100, 62),
    "metal": (84, 86, 98),
    "leaf": (92, 160, 72),
    "gold": (252, 200, 66),
    "blush": (246, 156, 158),
    "nose": (214, 84, 92),
}
#: The roles that carry the thing's own colour.
COLORED_ROLES = ("body", "shade", "light")
#: The roles that light and shadow fall on: also the further colours that a creature may have.
LIT_ROLES = (*COLORED_ROLES, "second", "third")
#: A thing's width as a share of the picture's width.
SIZE_SHARES: dict[str, float] = {"small": 0.36, "medium": 0.5, "big": 0.68}
#: The same where two things share the picture.
PAIR_SHARES: dict[str, float] = {"small": 0.33, "medium": 0.43, "big": 0.47}
OUTLINE_WIDTH = 0.016
_MARGIN = 0.03
#: How strongly shade takes away red, green and blue: shade is warm.
_SHADE_TINT = np.array([0.8, 1.1, 1.0], dtype=np.float32)


@dataclass(frozen=True, eq=False)
class Placed:
    """A thing with its parts in units of the picture, and what shadow it throws.

    color: the name of its colour, None where it has several of its own; ground: (x, y, half width) of the
    shadow.
    """

    color: str | None
    parts: tuple[Part, ...]
    palette: Mapping[str, RGB]
    ground: tuple[float, float, float]


@dataclass(frozen=True, eq=False)
class Plan:
    """All that is needed to paint a scene, without a size and without a style."""

    backdrop: Backdrop
    placed: tuple[Placed, ...]
    seed: int


def mix(color: RGB, other: RGB, share: float) -> RGB:
    """`color` moved towards `other` by share 0..1."""
    red, green, blue = (round(a + (b - a) * share) for a, b in zip(color, other, strict=True))
    return red, green, blue


def jittered(color: RGB, rng: random.Random) -> RGB:
    """The colour with a slight change of hue, saturation and value; it stays the same named colour."""
    hue, saturation, value = colorsys.rgb_to_hsv(*(channel / 255 for channel in color))
    hue = (hue + rng.uniform(-0.010, 0.010)) % 1.0
    saturation = min(1.0, max(0.0, saturation * rng.uniform(0.95, 1.04)))
    value = min(1.0, max(0.0, value * rng.uniform(0.96, 1.04)))
    red, green, blue = (round(channel * 255) for channel in colorsys.hsv_to_rgb(hue, saturation, value))
    return red, green, blue


def palette(body: RGB) -> dict[str, RGB]:
    """The colours of all roles for a thing whose main body has the colour `body`."""
    brightness = 0.3 * body[0] + 0.59 * body[1] + 0.11 * body[2]
    if brightness < 60:
        # Nothing can be darker than black: its details are drawn in paler greys.
        own = {"shade": mix(body, (0, 0, 0), 0.35), "light": mix(body, (255, 255, 255), 0.2)}
        own["edge"] = mix(body, (255, 255, 255), 0.36)
    elif brightness > 235:
        own = {"shade": mix(body, (150, 160, 190), 0.28), "light": (255, 255, 255), "edge": (142, 146, 166)}
    else:
        # Shade keeps its red longest: yellow must turn golden, not olive.
        deep = (round(body[0] * 0.6), round(body[1] * 0.42), round(body[2] * 0.52))
        own = {"shade": mix(body, deep, 0.42), "light": mix(body, (255, 255, 255), 0.38)}
        own["edge"] = mix(deep, (30, 10, 40), 0.25)
    return {**FIXED_ROLES, "body": body, **own}


def place(
    parts: Sequence[Part], lift: float, position: str, share: float, rng: random.Random
) -> tuple[tuple[Part, ...], tuple[float, float, float]]:
    """Parts of a normalized shape in units of the picture, and the shadow's (x, y, half width).

    share: the wanted width as a share of the picture; rng: the jitter of place, size, tilt and flip.
    """
    scale = share * rng.uniform(0.95, 1.04)
    edge = _MARGIN + scale / 2
    center = {"left": edge, "center": 0.5, "right": 1 - edge}[position]
    if position == "left":
        center = min(center + rng.uniform(-0.015, 0.03), 0.37)
    elif position == "right":
        center = max(center + rng.uniform(-0.03, 0.015), 0.63)
    else:
        center += rng.uniform(-0.025, 0.025)
    # Small things stand a little further back, big ones nearer to the lower edge.
    ground = 0.86 + 0.12 * (share - 0.36) + rng.uniform(-0.02, 0.02)
    flip = -1.0 if rng.random() < 0.5 else 1.0
    tilt = math.radians(rng.uniform(-4.0, 4.0))
    cosine, sine = math.cos(tilt) * scale, math.sin(tilt) * scale
    matrix = np.array([[cosine * flip, sine * flip], [-sine, cosine]])
    offset = np.array([center, ground - lift * scale * 0.6])
    moved = tuple(
        Part(part.points @ matrix + offset, part.fill, part.width * scale, part.edge, part.rim)
        for part in parts
    )
    low = min(part.points[:, 0].min() for part in moved)
    high = max(part.points[:, 0].max() for part in moved)
    # A tilt must not push a thing out of the picture, so it is moved back in.
    shift = max(0.0, 0.012 - low) - max(0.0, high - 0.988)
    if shift:
        step = np.array([shift, 0.0])
        moved = tuple(Part(p.points + step, p.fill, p.width, p.edge, p.rim) for p in moved)
    half = 0.36 * (high - low) * (1.0 - lift)
    return moved, ((low + high) / 2 + shift, ground + 0.004, half)


def plan(scene: Scene) -> Plan:
    """The plan of a scene; the same for every size and style."""
    shares = SIZE_SHARES if len(scene.things) == 1 else PAIR_SHARES
    placed = []
    for index, thing in enumerate(scene.things):
        rng = random.Random(scene.seed * 8 + 1 + index)
        color = jittered(COLOR_VALUES[thing.color], rng)
        form = shape(thing.subject)
        parts, ground = place(form.parts, form.lift, thing.position, shares[thing.size], rng)
        placed.append(Placed(thing.color, parts, palette(color), ground))
    return Plan(backdrop(scene.background, random.Random(scene.seed * 8)), tuple(placed), scene.seed)


def oversampling(size: int) -> int:
    """How many times larger a picture of this size is drawn before it is reduced."""
    return 4 if size <= 256 else 3 if size <= 512 else 2


def gradient(stops: Sequence[tuple[float, RGB]], size: int) -> Image.Image:
    """A square RGB picture that runs through the stops from top to bottom."""
    heights = (np.arange(size) + 0.5) / size
    where = [stop[0] for stop in stops]
    columns = [np.interp(heights, where, [stop[1][channel] for stop in stops]) for channel in range(3)]
    column = np.stack(columns, axis=1).round().astype(np.uint8)
    return Image.fromarray(column[:, None, :]).resize((size, size), Image.Resampling.NEAREST)


def flat(part: Part, size: int) -> list[float]:
    """The part's points in pixels, as the flat list that ImageDraw takes fastest."""
    pixels: list[float] = (part.points * size).ravel().tolist()
    return pixels


def stroke(
    pen: ImageDraw.ImageDraw, points: list[float], width: float, ink: RGB | int, closed: bool = False
) -> None:
    """A line of constant width with round joints and ends; points flat in pixels, width in pixels."""
    line = [*points, *points[:4]] if closed else points
    wide = max(1, round(width))
    pen.line(line, fill=ink, width=wide, joint="curve")
    if not closed and wide > 2:
        half = width / 2
        for x, y in (points[:2], points[-2:]):
            pen.ellipse((x - half, y - half, x + half, y + half), fill=ink)


def paint_part(pen: ImageDraw.ImageDraw, part: Part, size: int, ink: RGB | int, grow: float = 0.0) -> None:
    """The part in one ink; `grow` (share of the picture) makes it fatter on every side."""
    points = flat(part, size)
    if part.width:
        stroke(pen, points, (part.width + 2 * grow) * size, ink)
        return
    if grow and len(part.points) < 25:
        stroke(pen, points, 2 * grow * size, ink, closed=True)
    elif grow:
        # Round joints would cost half of the drawing time. A smooth curve needs none: its line is drawn
        # without, and its fattened copy fills the notches that this leaves on the outside.
        pen.line([*points, *points[:4]], fill=ink, width=max(1, round(2 * grow * size)))
        points = (fattened(part.points, grow) * size).ravel().tolist()
    pen.polygon(points, fill=ink)


def paint_backdrop(scenery: Backdrop, size: int) -> Image.Image:
    """The background alone, RGB, without smoothing (the caller reduces it)."""
    image = gradient(scenery.stops, size)
    pen = ImageDraw.Draw(image)
    for part in scenery.parts:
        if isinstance(part.fill, str):
            raise ValueError(f"a background's part must have a colour of its own, not the role {part.fill!r}")
        paint_part(pen, part, size, part.fill)
    return image


def mask(
    parts: Sequence[Part],
    size: int,
    roles: Sequence[str] | None = None,
    grow: float = 0.0,
    scale: int | None = None,
) -> Image.Image:
    """A smooth mask (mode L, 0..255, size x size) of what the parts cover.

    roles: only what is seen of parts with these roles (later parts hide earlier ones); None: all parts.
    grow: how much fatter, as a share of the picture; scale: the oversampling (None: as for a picture).
    """
    scale = oversampling(size) if scale is None else scale
    image = Image.new("L", (size * scale, size * scale), 0)
    pen = ImageDraw.Draw(image)
    for part in parts:
        inside = roles is None or part.fill in roles
        paint_part(pen, part, size * scale, 255 if inside else 0, grow)
    return image.reduce(scale)


def silhouette(placed: Placed, size: int) -> Image.Image:
    """The mask of the whole thing (mode L)."""
    return mask(placed.parts, size)


def body_mask(placed: Placed, size: int) -> Image.Image:
    """The mask of what shows the thing's own colour (mode L)."""
    return mask(placed.parts, size, COLORED_ROLES)


def _tinted(part: Part, roles: Mapping[str, RGB]) -> RGB:
    return roles[part.fill] if isinstance(part.fill, str) else part.fill


def paint_placed(
    pen: ImageDraw.ImageDraw,
    placed: Placed,
    size: int,
    *,
    rim: RGB | None = None,
    outline: RGB | None = None,
    boldness: float = 1.0,
) -> None:
    """The thing with an outline (None: its ink), and with a rim around that where `rim` is given.

    boldness: how many times wider than in plain pictures the outline is.
    """
    roles = placed.palette
    width = (placed.ground[2] * 0.006 + OUTLINE_WIDTH) * boldness
    outlined = [part for part in placed.parts if part.rim]
    if rim is not None:
        for part in outlined:
            paint_part(pen, part, size, rim, width * 1.6)
    for part in outlined:
        paint_part(pen, part, size, outline or roles["ink"], width)
    for part in placed.parts:
        if part.edge:
            paint_part(pen, part, size, roles["edge"], width * 0.45)
        paint_part(pen, part, size, _tinted(part, roles))


def _shadow(image: Image.Image, placed: Placed, color: RGB) -> None:
    pen = ImageDraw.Draw(image, "RGBA")
    x, y, half = (value * image.width for value in placed.ground)
    for grow, strength in ((1.25, 50), (1.05, 60), (0.85, 70)):
        wide, high = half * grow, half * grow * 0.2
        pen.ellipse((x - wide, y - high, x + wide, y + high), fill=(*color, strength))


def _light(placed: Placed, size: int) -> NDArray[np.float32]:
    """How much lighter (above 0) or darker each pixel of the thing is: light falls from the upper left."""
    left = min(float(part.points[:, 0].min()) for part in placed.parts)
    right = max(float(part.points[:, 0].max()) for part in placed.parts)
    top = min(float(part.points[:, 1].min()) for part in placed.parts)
    bottom = max(float(part.points[:, 1].max()) for part in placed.parts)
    spots = (np.arange(size, dtype=np.float32) + 0.5) / size
    across = np.clip((spots - left) / (right - left), 0, 1)
    down = np.clip((spots - top) / (bottom - top), 0, 1)
    light = 0.16 - 0.12 * across[None, :] - 0.26 * down[:, None] ** 1.4
    return light.astype(np.float32)


def paint(scheme: Plan, size: int) -> Image.Image:
    """The plain picture: RGB, size x size."""
    scale = oversampling(size)
    image = paint_backdrop(scheme.backdrop, size * scale)
    rim: RGB | None = (150, 152, 208) if scheme.backdrop.dark else None
    for placed in scheme.placed:
        _shadow(image, placed, scheme.backdrop.shadow)
    pen = ImageDraw.Draw(image)
    for placed in scheme.placed:
        paint_placed(pen, placed, size * scale, rim=rim)
    pixels = np.asarray(image.reduce(scale), dtype=np.float32)
    for placed in scheme.placed:
        # Half the oversampling is enough for a soft light.
        where = mask(placed.parts, size, LIT_ROLES, scale=2)
        amount = _light(placed, size) * (np.asarray(where, dtype=np.float32) / 255)
        lighter, darker = np.maximum(amount, 0)[..., None], np.minimum(amount, 0)[..., None]
        pixels = pixels + (255 - pixels) * lighter + pixels * darker * _SHADE_TINT
    return Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))
