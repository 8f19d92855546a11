"""The backgrounds: a soft vertical gradient and the parts that lie on it, in units of the picture (0..1)."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from scumble.picturebook.geometry import RGB, Part, Points, blob, box, curve, ellipse, polygon


@dataclass(frozen=True, eq=False)
class Backdrop:
    """stops: (height 0..1, colour) of the gradient from top to bottom; parts: back to front; dark: whether
    things on it need a pale rim to be seen; shadow: the colour of a thing's shadow on its ground."""

    stops: tuple[tuple[float, RGB], ...]
    parts: tuple[Part, ...]
    shadow: RGB
    dark: bool = False


Painter = Callable[[random.Random], Backdrop]
_PAINTERS: dict[str, Painter] = {}


def _background(name: str) -> Callable[[Painter], Painter]:
    def register(painter: Painter) -> Painter:
        _PAINTERS[name] = painter
        return painter

    return register


def backdrop(name: str, rng: random.Random) -> Backdrop:
    """The background `name` of `scenes.BACKGROUNDS`, its accidents drawn from rng; KeyError otherwise."""
    return _PAINTERS[name](rng)


def _hill(rng: random.Random, height: float, wave: float, points: int = 5) -> Points:
    """A rolling ground from edge to edge, its line around `height`, filled to below the picture."""
    crest = [
        (-0.15 + 1.3 * index / (points - 1), height + rng.uniform(-wave, wave)) for index in range(points)
    ]
    return blob(*crest, (1.2, 1.3), (0.5, 1.4), (-0.2, 1.3))


def _cloud(x: float, y: float, size: float, color: RGB) -> list[Part]:
    return [
        Part(ellipse(x - 0.55 * size, y + 0.05 * size, 0.42 * size, 0.26 * size), color),
        Part(ellipse(x, y - 0.14 * size, 0.5 * size, 0.4 * size), color),
        Part(ellipse(x + 0.55 * size, y + 0.04 * size, 0.45 * size, 0.28 * size), color),
        Part(box(x - 0.85 * size, y, x + 0.9 * size, y + 0.3 * size, 0.15 * size), color),
    ]


def _scatter(rng: random.Random, count: int, top: float, bottom: float) -> list[tuple[float, float]]:
    """Places spread over the whole width, one in each of `count` upright strips."""
    return [((index + rng.random()) / count, rng.uniform(top, bottom)) for index in range(count)]


@_background("sky")
def _sky(rng: random.Random) -> Backdrop:
    parts: list[Part] = []
    side = rng.choice((0.12, 0.88))
    parts += [
        Part(ellipse(side, 0.12, 0.12), (255, 236, 160)),
        Part(ellipse(side, 0.12, 0.085), (255, 218, 90)),
    ]
    parts += _cloud(
        1 - side + rng.uniform(-0.08, 0.08), rng.uniform(0.12, 0.22), rng.uniform(0.14, 0.19), (246, 251, 255)
    )
    parts += _cloud(rng.uniform(0.2, 0.8), rng.uniform(0.36, 0.5), rng.uniform(0.09, 0.13), (226, 241, 252))
    for x, y in _scatter(rng, 5, 0.9, 0.97):
        parts.append(Part(ellipse(x, y, 0.16, 0.12), (214, 231, 248)))
    for x, y in _scatter(rng, 5, 0.96, 1.03):
        parts.append(Part(ellipse(x, y, 0.16, 0.11), (250, 252, 255)))
    return Backdrop(
        ((0.0, (64, 152, 236)), (0.75, (160, 214, 250)), (1.0, (190, 228, 252))),
        tuple(parts),
        (120, 160, 205),
    )


@_background("night")
def _night(rng: random.Random) -> Backdrop:
    parts: list[Part] = []
    for x, y in _scatter(rng, 12, 0.03, 0.6):
        radius = rng.choice((0.008, 0.011, 0.016))
        if radius > 0.015:
            r = 0.032
            parts.append(
                Part(
                    polygon(
                        (x, y - r),
                        (x + r / 4, y - r / 4),
                        (x + r, y),
                        (x + r / 4, y + r / 4),
                        (x, y + r),
                        (x - r / 4, y + r / 4),
                        (x - r, y),
                        (x - r / 4, y - r / 4),
                    ),
                    (255, 246, 190),
                )
            )
        else:
            parts.append(Part(ellipse(x, y, radius), (240, 240, 255)))
    x, y = rng.choice((0.15, 0.85)), rng.uniform(0.13, 0.18)
    parts += [
        Part(ellipse(x, y, 0.125), (64, 72, 142)),
        Part(ellipse(x, y, 0.092), (255, 241, 190)),
        Part(ellipse(x + 0.045, y - 0.025, 0.075), (58, 66, 136)),
        Part(_hill(rng, 0.72, 0.05), (50, 58, 112)),
        Part(_hill(rng, 0.84, 0.025), (38, 46, 88)),
    ]
    for x, y in _scatter(rng, 5, 0.88, 0.97):
        parts.append(Part(curve((x - 0.015, y), (x - 0.02, y - 0.03)), (66, 78, 132), 0.009))
        parts.append(Part(curve((x + 0.01, y), (x + 0.018, y - 0.035)), (66, 78, 132), 0.009))
    return Backdrop(
        ((0.0, (24, 30, 82)), (0.5, (52, 58, 130)), (0.8, (104, 92, 164))),
        tuple(parts),
        (16, 20, 48),
        dark=True,
    )


@_background("meadow")
def _meadow(rng: random.Random) -> Backdrop:
    parts: list[Part] = []
    parts += _cloud(rng.uniform(0.15, 0.85), rng.uniform(0.1, 0.18), rng.uniform(0.1, 0.14), (255, 255, 255))
    parts += [
        Part(_hill(rng, 0.46, 0.06), (168, 216, 130)),
        Part(_hill(rng, 0.58, 0.05), (134, 200, 98)),
        Part(_hill(rng, 0.74, 0.03), (108, 182, 78)),
    ]
    for x, y in _scatter(rng, 9, 0.64, 0.97):
        parts.append(Part(curve((x - 0.008, y), (x - 0.022, y - 0.04)), (76, 150, 60), 0.011))
        parts.append(Part(curve((x + 0.004, y), (x + 0.016, y - 0.045)), (76, 150, 60), 0.011))
    for x, y in _scatter(rng, 9, 0.62, 0.98):
        color = rng.choice(((255, 255, 255), (255, 226, 96), (250, 176, 206), (214, 180, 246)))
        parts.append(Part(ellipse(x, y, 0.019), color))
        parts.append(Part(ellipse(x, y, 0.007), (245, 170, 60)))
    return Backdrop(((0.0, (176, 224, 246)), (0.5, (236, 248, 226))), tuple(parts), (58, 118, 46))


@_background("beach")
def _beach(rng: random.Random) -> Backdrop:
    parts: list[Part] = []
    x = rng.choice((0.16, 0.84))
    parts += [Part(ellipse(x, 0.15, 0.13), (255, 246, 200)), Part(ellipse(x, 0.15, 0.09), (255, 226, 120))]
    parts += _cloud(1 - x + rng.uniform(-0.1, 0.1), rng.uniform(0.1, 0.18), 0.1, (255, 255, 255))
    parts += [
        Part(box(-0.1, 0.37, 1.1, 0.7), (72, 184, 204)),
        Part(box(-0.1, 0.37, 1.1, 0.42), (48, 156, 190)),
    ]
    for x, y in _scatter(rng, 4, 0.45, 0.5):
        parts.append(Part(curve((x - 0.07, y), (x, y + 0.008), (x + 0.07, y)), (186, 234, 236), 0.012))
    shore = _hill(rng, 0.6, 0.02)
    parts += [
        Part(np.subtract(shore, (0.0, 0.035)), (240, 252, 250)),
        Part(shore, (232, 204, 142)),
        Part(np.add(shore, (0.0, 0.03)), (248, 226, 170)),
    ]
    for x, y in _scatter(rng, 14, 0.7, 0.98):
        parts.append(Part(ellipse(x, y, 0.008, 0.006), rng.choice(((224, 192, 130), (255, 242, 206)))))
    x, y = rng.uniform(0.08, 0.92), rng.uniform(0.9, 0.95)
    star = [ellipse(x, y - 0.022, 0.011, 0.026)]
    parts.append(Part(ellipse(x, y, 0.03, 0.02), (250, 190, 170)))
    parts.append(Part(star[0], (240, 160, 150)))
    return Backdrop(((0.0, (112, 206, 240)), (0.4, (214, 243, 248))), tuple(parts), (188, 154, 98))


@_background("sea")
def _sea(rng: random.Random) -> Backdrop:
    parts: list[Part] = []
    parts += _cloud(rng.uniform(0.15, 0.85), rng.uniform(0.08, 0.13), 0.11, (255, 252, 244))
    colors: tuple[RGB, ...] = ((64, 142, 190), (44, 122, 178), (32, 102, 162), (24, 84, 146), (18, 68, 128))
    top = 0.26
    for row, color in enumerate(colors):
        y = top + row * 0.15
        shift = rng.random() * 0.2
        crest = []
        for index in range(-1, 8):
            x = index * 0.2 - shift
            crest += [(x, y), (x + 0.1, y + 0.045)]
        parts.append(
            Part(blob(*((x, y - 0.02) for x, y in crest), (1.7, 1.3), (-0.4, 1.3), steps=4), (150, 204, 224))
        )
        parts.append(Part(blob(*crest, (1.7, 1.3), (-0.4, 1.3), steps=4), color))
    for x, y in _scatter(rng, 6, 0.5, 0.96):
        parts.append(Part(curve((x - 0.05, y), (x, y + 0.012), (x + 0.05, y)), (120, 184, 214), 0.012))
    return Backdrop(((0.0, (250, 226, 196)), (0.3, (252, 240, 218))), tuple(parts), (12, 44, 92))


@_background("snow")
def _snow(rng: random.Random) -> Backdrop:
    parts: list[Part] = [Part(_hill(rng, 0.5, 0.05), (206, 220, 238))]
    for x, y in _scatter(rng, 5, 0.52, 0.58):
        h = rng.uniform(0.12, 0.2)
        for step in (0.0, 0.3, 0.55):
            top = y - h * (1 - step * 0.75)
            wide = 0.022 + 0.045 * step
            parts.append(
                Part(
                    polygon((x, top - 0.03), (x + wide, top + h * 0.34), (x - wide, top + h * 0.34)),
                    (112, 150, 158),
                )
            )
            parts.append(
                Part(
                    polygon(
                        (x, top - 0.03), (x + wide * 0.5, top + h * 0.12), (x - wide * 0.5, top + h * 0.12)
                    ),
                    (244, 249, 253),
                )
            )
    parts += [
        Part(_hill(rng, 0.64, 0.03), (228, 237, 248)),
        Part(_hill(rng, 0.78, 0.03), (246, 250, 255)),
    ]
    for x, y in _scatter(rng, 4, 0.84, 0.97):
        parts.append(Part(curve((x - 0.06, y), (x, y - 0.012), (x + 0.06, y)), (214, 226, 242), 0.012))
    for x, y in _scatter(rng, 16, 0.02, 0.7):
        parts.append(Part(ellipse(x, y, rng.choice((0.009, 0.013, 0.017))), (255, 255, 255)))
    return Backdrop(((0.0, (150, 170, 204)), (0.6, (214, 222, 238))), tuple(parts), (168, 186, 214))


@_background("room")
def _room(rng: random.Random) -> Backdrop:
    parts: list[Part] = []
    shift = rng.random() * 0.125
    for index in range(9):
        x = index * 0.125 - shift
        parts.append(Part(box(x, -0.1, x + 0.055, 0.75), (238, 200, 176)))
    x = rng.choice((0.23, 0.77))
    parts += [
        Part(box(x - 0.155, 0.06, x + 0.155, 0.44, 0.01), (255, 250, 240)),
        Part(box(x - 0.125, 0.09, x + 0.125, 0.41), (158, 212, 240)),
        Part(ellipse(x + 0.03, 0.42, 0.12, 0.09).clip(max=(1.0, 0.41)), (150, 204, 130)),
        Part(curve((x, 0.09), (x, 0.41)), (255, 250, 240), 0.022),
        Part(curve((x - 0.125, 0.25), (x + 0.125, 0.25)), (255, 250, 240), 0.022),
        Part(
            blob((x - 0.19, 0.03), (x - 0.1, 0.04), (x - 0.12, 0.24), (x - 0.17, 0.46), (x - 0.2, 0.46)),
            (206, 104, 104),
        ),
        Part(
            blob((x + 0.19, 0.03), (x + 0.1, 0.04), (x + 0.12, 0.24), (x + 0.17, 0.46), (x + 0.2, 0.46)),
            (206, 104, 104),
        ),
    ]
    x = 1 - x + rng.uniform(-0.05, 0.05)
    frame_color = rng.choice(((150, 104, 70), (120, 140, 110)))
    parts += [
        Part(box(x - 0.11, 0.12, x + 0.11, 0.3), frame_color),
        Part(box(x - 0.085, 0.145, x + 0.085, 0.275), (250, 240, 214)),
        Part(
            polygon(
                (x - 0.08, 0.272), (x - 0.02, 0.19), (x + 0.02, 0.24), (x + 0.05, 0.21), (x + 0.082, 0.272)
            ),
            (150, 170, 150),
        ),
        Part(box(-0.1, 0.66, 1.1, 1.1), (186, 130, 86)),
        Part(box(-0.1, 0.64, 1.1, 0.68), (255, 244, 228)),
    ]
    for y in (0.76, 0.86, 0.95):
        parts.append(Part(curve((-0.05, y), (1.05, y)), (158, 104, 66), 0.01))
    for index, y in enumerate((0.72, 0.81, 0.905)):
        x = 0.2 + 0.3 * index + rng.uniform(-0.1, 0.1)
        parts.append(Part(curve((x, y - 0.04), (x, y + 0.04)), (158, 104, 66), 0.01))
    x = rng.uniform(0.42, 0.58)
    parts += [
        Part(ellipse(x, 0.87, 0.4, 0.085), (240, 226, 200)),
        Part(ellipse(x, 0.87, 0.36, 0.07), (118, 158, 160)),
        Part(ellipse(x, 0.87, 0.3, 0.052), (144, 182, 180)),
    ]
    return Backdrop(((0.0, (250, 222, 198)), (0.7, (244, 212, 188))), tuple(parts), (84, 62, 48))


@_background("desert")
def _desert(rng: random.Random) -> Backdrop:
    x = rng.uniform(0.2, 0.8)
    parts: list[Part] = [
        Part(ellipse(x, 0.3, 0.2), (255, 196, 112)),
        Part(ellipse(x, 0.3, 0.145), (255, 226, 140)),
        Part(_hill(rng, 0.47, 0.06), (226, 136, 92)),
        Part(_hill(rng, 0.58, 0.05), (214, 116, 66)),
    ]
    for x in (rng.uniform(0.06, 0.22), rng.uniform(0.78, 0.94)):
        base, h = rng.uniform(0.6, 0.7), rng.uniform(0.2, 0.28)
        green: RGB = (72, 118, 76)
        parts += [
            Part(curve((x, base), (x, base - h)), green, 0.05),
            Part(
                curve((x, base - h * 0.35), (x - 0.06, base - h * 0.4), (x - 0.06, base - h * 0.7)),
                green,
                0.032,
            ),
            Part(
                curve((x, base - h * 0.45), (x + 0.06, base - h * 0.52), (x + 0.06, base - h * 0.85)),
                green,
                0.032,
            ),
            Part(curve((x - 0.008, base), (x - 0.008, base - h)), (110, 156, 100), 0.01),
        ]
    parts.append(Part(_hill(rng, 0.74, 0.03), (198, 94, 50)))
    for x, y in _scatter(rng, 5, 0.8, 0.96):
        parts.append(Part(curve((x - 0.08, y), (x, y - 0.014), (x + 0.08, y)), (222, 126, 74), 0.012))
    for x, y in _scatter(rng, 3, 0.8, 0.96):
        parts.append(Part(ellipse(x, y, 0.024, 0.015), (150, 78, 54)))
    return Backdrop(((0.0, (240, 128, 100)), (0.5, (255, 204, 130))), tuple(parts), (122, 52, 32))
