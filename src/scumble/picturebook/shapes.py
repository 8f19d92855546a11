"""The shapes of the subjects: one small function each, parts on a unit square, looking to the right.

A part's fill is a role (see `canvas.palette`): "body" and its "shade" and "light" carry the thing's colour,
the other roles are fixed little details. Parts are listed from back to front.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np

from scumble.picturebook.geometry import (
    Part,
    Points,
    arc,
    blob,
    bounds,
    box,
    curve,
    ellipse,
    polygon,
    turned,
)


@dataclass(frozen=True, eq=False)
class Shape:
    """A subject's parts, scaled so that the whole stands on y = 0, is centred on x = 0 and is about 1 wide.

    lift: how far it hangs above the ground, in the same unit.
    """

    parts: tuple[Part, ...]
    lift: float


Builder = Callable[[], list[Part]]
_BUILDERS: dict[str, tuple[Builder, float]] = {}

#: A tall thing may be this much higher than a broad thing is wide.
TALL = 1.12


def _subject(name: str, lift: float = 0.0) -> Callable[[Builder], Builder]:
    def register(builder: Builder) -> Builder:
        _BUILDERS[name] = (builder, lift)
        return builder

    return register


def normalized(parts: list[Part]) -> tuple[Part, ...]:
    """The parts moved and scaled as `Shape` says."""
    left, top, right, bottom = bounds(parts)
    scale = 1.0 / max(right - left, (bottom - top) / TALL)
    origin = np.array([(left + right) / 2, bottom])
    return tuple(
        Part((part.points - origin) * scale, part.fill, part.width * scale, part.edge, part.rim)
        for part in parts
    )


@cache
def shape(subject: str) -> Shape:
    """The shape of a subject of `scenes.SUBJECTS`; KeyError for another word."""
    builder, lift = _BUILDERS[subject]
    return Shape(normalized(builder()), lift)


def eye(x: float, y: float, radius: float = 0.045) -> list[Part]:
    """A white eye with a dark pupil that looks to the right."""
    return [
        Part(ellipse(x, y, radius, radius * 1.15), "white", edge=True, rim=False),
        Part(ellipse(x + radius * 0.28, y + radius * 0.1, radius * 0.62, radius * 0.72), "ink", rim=False),
        Part(ellipse(x + radius * 0.45, y - radius * 0.25, radius * 0.25), "white", rim=False),
    ]


def wheel(x: float, y: float, radius: float) -> list[Part]:
    """A dark tyre with a pale hub."""
    return [
        Part(ellipse(x, y, radius), "metal", edge=True),
        Part(ellipse(x, y, radius * 0.52), "cream", rim=False),
        Part(ellipse(x, y, radius * 0.2), "metal", rim=False),
    ]


# The points of a curve belong on few lines: one point a line would hide the shapes from the reader.
# fmt: off


@_subject("fox")
def _fox() -> list[Part]:
    return [
        Part(
            blob(
                (0.24, 0.72), (0.12, 0.74), (0.02, 0.62), (-0.02, 0.42), (0.03, 0.2), (0.1, 0.12),
                (0.16, 0.24), (0.17, 0.42), (0.24, 0.54), (0.32, 0.6),
            ),
            "body",
        ),
        Part(blob((-0.01, 0.34), (0.03, 0.2), (0.1, 0.12), (0.16, 0.24), (0.16, 0.34), (0.1, 0.29),
            (0.06, 0.36)), "white", rim=False),
        Part(box(0.3, 0.7, 0.38, 1.0, 0.03), "shade"),
        Part(box(0.62, 0.7, 0.7, 1.0, 0.03), "shade"),
        Part(
            blob(
                (0.2, 0.66), (0.28, 0.53), (0.45, 0.51), (0.6, 0.46), (0.72, 0.5), (0.77, 0.62), (0.72, 0.76),
                (0.55, 0.8), (0.36, 0.82), (0.24, 0.78),
            ),
            "body",
        ),
        Part(box(0.21, 0.68, 0.31, 1.0, 0.035), "body"),
        Part(box(0.53, 0.68, 0.62, 1.0, 0.035), "body"),
        Part(box(0.21, 0.93, 0.31, 1.0, 0.03), "ink", rim=False),
        Part(box(0.53, 0.93, 0.62, 1.0, 0.03), "ink", rim=False),
        Part(blob((0.66, 0.54), (0.76, 0.54), (0.77, 0.66), (0.71, 0.76), (0.65, 0.66)), "white", rim=False),
        Part(polygon((0.56, 0.36), (0.55, 0.08), (0.71, 0.26)), "shade"),
        Part(
            blob((0.54, 0.38), (0.6, 0.25), (0.73, 0.22), (0.84, 0.3), (0.93, 0.42), (1.02, 0.5),
                (0.9, 0.55), (0.74, 0.58), (0.6, 0.53)),
            "body",
            edge=True,
        ),
        Part(polygon((0.66, 0.27), (0.7, 0.04), (0.83, 0.29)), "body"),
        Part(polygon((0.7, 0.25), (0.72, 0.13), (0.78, 0.26)), "blush", rim=False),
        Part(blob((0.66, 0.53), (0.76, 0.46), (0.88, 0.48), (0.99, 0.51), (0.88, 0.55), (0.74, 0.58)),
            "white", rim=False),
        Part(ellipse(1.0, 0.49, 0.035), "ink"),
        *eye(0.78, 0.38, 0.042),
    ]


@_subject("cat")
def _cat() -> list[Part]:
    whiskers = [
        Part(curve((0.46 + side * 0.16, y), (0.46 + side * 0.36, y + bend)), "edge", 0.014, rim=False)
        for side in (-1, 1)
        for y, bend in ((0.37, -0.02), (0.42, 0.03))
    ]
    return [
        Part(curve((0.6, 0.92), (0.82, 0.94), (0.93, 0.8), (0.87, 0.64), (0.94, 0.5)), "body", 0.1),
        Part(
            blob((0.46, 0.44), (0.62, 0.52), (0.72, 0.72), (0.74, 0.9), (0.66, 0.99), (0.46, 1.0),
                (0.26, 0.99), (0.18, 0.9), (0.2, 0.72), (0.3, 0.52)),
            "body",
        ),
        Part(blob((0.46, 0.56), (0.55, 0.64), (0.54, 0.8), (0.46, 0.86), (0.38, 0.8), (0.37, 0.64)),
            "light", rim=False),
        Part(ellipse(0.37, 0.95, 0.085, 0.055), "body", edge=True),
        Part(ellipse(0.55, 0.95, 0.085, 0.055), "body", edge=True),
        Part(polygon((0.19, 0.3), (0.15, 0.0), (0.42, 0.14)), "body"),
        Part(polygon((0.73, 0.3), (0.77, 0.0), (0.5, 0.14)), "body"),
        Part(ellipse(0.46, 0.31, 0.31, 0.25), "body", edge=True),
        Part(polygon((0.22, 0.17), (0.2, 0.06), (0.33, 0.12)), "blush", rim=False),
        Part(polygon((0.7, 0.17), (0.72, 0.06), (0.59, 0.12)), "blush", rim=False),
        Part(curve((0.46, 0.08), (0.46, 0.16)), "shade", 0.03, rim=False),
        Part(curve((0.39, 0.1), (0.4, 0.16)), "shade", 0.03, rim=False),
        Part(curve((0.53, 0.1), (0.52, 0.16)), "shade", 0.03, rim=False),
        Part(ellipse(0.46, 0.43, 0.12, 0.085), "light", rim=False),
        *eye(0.35, 0.29, 0.052),
        *eye(0.57, 0.29, 0.052),
        Part(polygon((0.42, 0.385), (0.5, 0.385), (0.46, 0.43)), "nose", rim=False),
        Part(curve((0.4, 0.46), (0.43, 0.475), (0.46, 0.44), (0.49, 0.475), (0.52, 0.46)), "ink", 0.014,
            rim=False),
        *whiskers,
    ]


@_subject("rabbit")
def _rabbit() -> list[Part]:
    return [
        Part(ellipse(0.12, 0.78, 0.1), "white"),
        Part(ellipse(0.56, 0.17, 0.075, 0.21, -14), "shade"),
        Part(blob((0.12, 0.78), (0.2, 0.6), (0.38, 0.5), (0.58, 0.52), (0.7, 0.66), (0.72, 0.84),
            (0.64, 0.97), (0.4, 1.0), (0.2, 0.96)), "body"),
        Part(blob((0.58, 0.58), (0.68, 0.66), (0.69, 0.8), (0.6, 0.86), (0.55, 0.72)), "light", rim=False),
        Part(blob((0.2, 0.86), (0.24, 0.7), (0.38, 0.66), (0.48, 0.76), (0.48, 0.92), (0.38, 1.0),
            (0.24, 0.98)), "body", edge=True),
        Part(ellipse(0.42, 0.965, 0.14, 0.04), "light", edge=True),
        Part(ellipse(0.68, 0.95, 0.08, 0.05), "body", edge=True),
        Part(ellipse(0.68, 0.44, 0.2, 0.175), "body", edge=True),
        Part(ellipse(0.69, 0.16, 0.08, 0.215, 8), "body", edge=True),
        Part(ellipse(0.695, 0.15, 0.035, 0.15, 8), "blush", rim=False),
        Part(ellipse(0.79, 0.49, 0.085, 0.07), "light", rim=False),
        Part(ellipse(0.87, 0.44, 0.03, 0.022), "nose", rim=False),
        Part(ellipse(0.68, 0.52, 0.04, 0.025), "blush", rim=False),
        *eye(0.74, 0.4, 0.047),
    ]


@_subject("bird")
def _bird() -> list[Part]:
    return [
        Part(curve((0.46, 0.78), (0.45, 0.97), (0.54, 0.98)), "gold", 0.035),
        Part(curve((0.6, 0.78), (0.6, 0.97), (0.69, 0.98)), "gold", 0.035),
        Part(polygon((0.3, 0.5), (0.0, 0.36), (0.05, 0.47), (-0.04, 0.52), (0.05, 0.58), (0.0, 0.66),
            (0.28, 0.68)), "shade"),
        Part(polygon((0.86, 0.24), (1.06, 0.36), (0.85, 0.42)), "gold"),
        Part(
            blob((0.18, 0.56), (0.3, 0.45), (0.46, 0.36), (0.53, 0.2), (0.66, 0.09), (0.82, 0.12),
                (0.91, 0.26), (0.88, 0.44), (0.84, 0.62), (0.7, 0.8), (0.48, 0.85), (0.28, 0.76)),
            "body",
        ),
        Part(blob((0.84, 0.5), (0.82, 0.64), (0.69, 0.78), (0.54, 0.81), (0.62, 0.68), (0.72, 0.56)),
            "light", rim=False),
        Part(blob((0.5, 0.46), (0.62, 0.56), (0.56, 0.7), (0.38, 0.74), (0.16, 0.68), (0.08, 0.62),
            (0.26, 0.56), (0.38, 0.48)), "shade", edge=True),
        Part(curve((0.24, 0.65), (0.38, 0.66), (0.48, 0.6)), "edge", 0.014, rim=False),
        Part(curve((0.63, 0.09), (0.58, 0.0), (0.66, 0.02)), "body", 0.045),
        *eye(0.75, 0.26, 0.055),
    ]


@_subject("fish", lift=0.2)
def _fish() -> list[Part]:
    scales = [
        Part(arc(x, y, 0.045, 0.06, -80, 80), "edge", 0.014, rim=False)
        for x, y in ((0.28, 0.51), (0.38, 0.43), (0.38, 0.59), (0.48, 0.4))
    ]
    return [
        Part(blob((0.24, 0.5), (0.1, 0.34), (0.0, 0.24), (0.02, 0.4), (0.07, 0.5), (0.02, 0.62),
            (0.0, 0.78), (0.12, 0.66)), "shade"),
        Part(blob((0.38, 0.32), (0.42, 0.14), (0.6, 0.1), (0.7, 0.2), (0.72, 0.3)), "shade"),
        Part(blob((0.44, 0.68), (0.42, 0.86), (0.56, 0.86), (0.62, 0.7)), "shade"),
        Part(blob((0.16, 0.51), (0.3, 0.34), (0.52, 0.24), (0.76, 0.27), (0.92, 0.4), (0.99, 0.52),
            (0.9, 0.64), (0.74, 0.75), (0.52, 0.77), (0.3, 0.67)), "body"),
        Part(blob((0.4, 0.68), (0.6, 0.69), (0.8, 0.65), (0.9, 0.63), (0.74, 0.745), (0.54, 0.765)),
            "light", rim=False),
        *scales,
        Part(arc(0.64, 0.5, 0.07, 0.2, -65, 65), "edge", 0.02, rim=False),
        Part(blob((0.58, 0.54), (0.5, 0.64), (0.44, 0.66), (0.5, 0.56)), "shade", edge=True, rim=False),
        Part(curve((0.98, 0.54), (0.92, 0.57), (0.88, 0.56)), "ink", 0.016, rim=False),
        *eye(0.82, 0.42, 0.062),
    ]


@_subject("turtle")
def _turtle() -> list[Part]:
    return [
        Part(polygon((0.08, 0.8), (-0.04, 0.88), (0.14, 0.9)), "light"),
        Part(blob((0.68, 0.82), (0.76, 0.66), (0.8, 0.5), (0.9, 0.42), (1.01, 0.46), (1.03, 0.56),
            (0.94, 0.64), (0.9, 0.78), (0.8, 0.88)), "light"),
        Part(box(0.14, 0.8, 0.28, 1.0, 0.05), "light"),
        Part(box(0.58, 0.8, 0.72, 1.0, 0.05), "light"),
        Part(blob((0.04, 0.84), (0.07, 0.62), (0.18, 0.42), (0.34, 0.3), (0.5, 0.3), (0.66, 0.42),
            (0.77, 0.62), (0.8, 0.84), (0.62, 0.88), (0.42, 0.89), (0.2, 0.88)), "body", edge=True),
        Part(polygon((0.33, 0.44), (0.5, 0.44), (0.57, 0.6), (0.42, 0.7), (0.27, 0.6)), "shade", rim=False),
        Part(curve((0.33, 0.44), (0.28, 0.34)), "edge", 0.018, rim=False),
        Part(curve((0.5, 0.44), (0.56, 0.35)), "edge", 0.018, rim=False),
        Part(curve((0.57, 0.6), (0.76, 0.62)), "edge", 0.018, rim=False),
        Part(curve((0.27, 0.6), (0.08, 0.62)), "edge", 0.018, rim=False),
        Part(curve((0.42, 0.7), (0.42, 0.82)), "edge", 0.018, rim=False),
        Part(blob((0.03, 0.84), (0.2, 0.81), (0.42, 0.8), (0.62, 0.81), (0.81, 0.84), (0.62, 0.9),
            (0.42, 0.91), (0.2, 0.9)), "shade", edge=True),
        Part(curve((1.0, 0.57), (0.95, 0.585), (0.92, 0.57)), "ink", 0.014, rim=False),
        *eye(0.92, 0.49, 0.042),
    ]


def _spiral(x: float, y: float, start: float, stop: float, turns: float) -> Points:
    t = np.linspace(0, 1, 44)
    radius = start + (stop - start) * t
    angle = 2 * math.pi * turns * t + 2.2
    return np.stack([x + radius * np.cos(angle), y + radius * np.sin(angle)], axis=1)


@_subject("snail")
def _snail() -> list[Part]:
    return [
        Part(curve((0.86, 0.6), (0.83, 0.44), (0.8, 0.36)), "light", 0.035),
        Part(curve((0.92, 0.6), (0.95, 0.44), (0.98, 0.36)), "light", 0.035),
        Part(ellipse(0.8, 0.35, 0.035), "ink"),
        Part(ellipse(0.98, 0.35, 0.035), "ink"),
        Part(
            blob((-0.04, 0.99), (0.14, 0.9), (0.4, 0.86), (0.64, 0.86), (0.76, 0.76), (0.79, 0.6),
                (0.88, 0.53), (0.99, 0.58), (1.01, 0.7), (0.94, 0.86), (0.82, 0.97), (0.5, 1.0)),
            "light",
        ),
        Part(ellipse(0.4, 0.55, 0.36, 0.37), "body", edge=True),
        Part(_spiral(0.41, 0.57, 0.03, 0.27, 2.1), "edge", 0.035, rim=False),
        Part(ellipse(0.28, 0.33, 0.07, 0.035, -40), "light", rim=False),
        Part(curve((0.97, 0.73), (0.92, 0.76), (0.88, 0.74)), "ink", 0.016, rim=False),
        *eye(0.92, 0.64, 0.038),
    ]


@_subject("butterfly", lift=0.18)
def _butterfly() -> list[Part]:
    parts: list[Part] = []
    for side in (-1, 1):

        def at(*points: tuple[float, float], side: int = side) -> Points:
            return blob(*((0.5 + side * x, y) for x, y in points))

        parts += [
            Part(curve((0.5 + side * 0.01, 0.26), (0.5 + side * 0.07, 0.12), (0.5 + side * 0.14, 0.06)),
                "ink", 0.02),
            Part(at((0.03, 0.52), (0.2, 0.5), (0.36, 0.58), (0.4, 0.74), (0.3, 0.9), (0.18, 0.88),
                (0.09, 0.74)), "shade"),
            Part(at((0.03, 0.5), (0.08, 0.3), (0.24, 0.12), (0.42, 0.08), (0.5, 0.2), (0.46, 0.4),
                (0.32, 0.53), (0.14, 0.56)), "body", edge=True),
            Part(ellipse(0.5 + side * 0.34, 0.26, 0.085, 0.095), "light", rim=False),
            Part(ellipse(0.5 + side * 0.34, 0.26, 0.035, 0.04), "ink", rim=False),
            Part(ellipse(0.5 + side * 0.25, 0.71, 0.06, 0.07), "light", rim=False),
            Part(ellipse(0.5 + side * 0.19, 0.44, 0.035), "light", rim=False),
        ]
    return [
        *parts,
        Part(ellipse(0.5, 0.53, 0.045, 0.27), "ink"),
        Part(ellipse(0.5, 0.28, 0.06), "ink"),
        Part(ellipse(0.48, 0.27, 0.016), "white", rim=False),
        Part(ellipse(0.52, 0.27, 0.016), "white", rim=False),
    ]


@_subject("tree")
def _tree() -> list[Part]:
    return [
        Part(blob((0.42, 0.62), (0.43, 0.84), (0.34, 1.0), (0.5, 0.98), (0.66, 1.0), (0.57, 0.84),
            (0.58, 0.62)), "wood"),
        Part(curve((0.49, 0.72), (0.48, 0.88)), "ink", 0.014, rim=False),
        Part(
            blob(
                (0.5, 0.0), (0.64, 0.02), (0.74, 0.14), (0.88, 0.18), (0.94, 0.32), (0.9, 0.44),
                    (0.96, 0.56), (0.86, 0.7),
                (0.7, 0.7), (0.58, 0.76), (0.44, 0.74), (0.3, 0.72), (0.14, 0.7), (0.04, 0.56), (0.1, 0.44),
                    (0.06, 0.3), (0.14, 0.18), (0.28, 0.14), (0.36, 0.03),
            ),
            "body",
        ),
        Part(blob((0.2, 0.62), (0.4, 0.62), (0.52, 0.68), (0.68, 0.62), (0.9, 0.56), (0.82, 0.68),
            (0.7, 0.69), (0.58, 0.75), (0.44, 0.73), (0.3, 0.71), (0.16, 0.69)), "shade", rim=False),
        Part(ellipse(0.32, 0.26, 0.13, 0.08, -25), "light", rim=False),
        Part(ellipse(0.62, 0.17, 0.09, 0.055, 15), "light", rim=False),
        Part(arc(0.68, 0.42, 0.09, 0.07, 0, 170), "edge", 0.018, rim=False),
        Part(arc(0.4, 0.5, 0.09, 0.06, 10, 180), "edge", 0.018, rim=False),
        Part(arc(0.2, 0.46, 0.07, 0.05, 0, 160), "edge", 0.018, rim=False),
    ]


@_subject("flower")
def _flower() -> list[Part]:
    petals = []
    for index in range(7):
        turn = index * 360 / 7
        petal = turned(ellipse(0.5, 0.14, 0.135, 0.17), turn, 0.5, 0.34)
        petals.append(Part(petal, "body", edge=True))
    glow = [
        Part(turned(ellipse(0.5, 0.17, 0.035, 0.075), i * 360 / 7, 0.5, 0.34), "light", rim=False)
        for i in range(7)
    ]
    return [
        Part(curve((0.5, 0.4), (0.52, 0.7), (0.5, 1.0)), "leaf", 0.05),
        Part(blob((0.51, 0.92), (0.6, 0.78), (0.76, 0.74), (0.82, 0.77), (0.74, 0.88), (0.62, 0.94)), "leaf"),
        Part(blob((0.5, 0.97), (0.4, 0.84), (0.24, 0.8), (0.18, 0.83), (0.26, 0.93), (0.4, 0.98)), "leaf"),
        *petals,
        *glow,
        Part(ellipse(0.5, 0.34, 0.115), "gold", edge=True),
        Part(ellipse(0.46, 0.31, 0.02), "wood", rim=False),
        Part(ellipse(0.54, 0.33, 0.02), "wood", rim=False),
        Part(ellipse(0.5, 0.39, 0.02), "wood", rim=False),
    ]


@_subject("mushroom")
def _mushroom() -> list[Part]:
    return [
        Part(blob((0.38, 0.5), (0.4, 0.72), (0.33, 0.94), (0.5, 1.0), (0.67, 0.94), (0.6, 0.72),
            (0.62, 0.5)), "cream"),
        Part(blob((0.56, 0.56), (0.55, 0.74), (0.58, 0.95), (0.65, 0.93), (0.59, 0.72), (0.61, 0.56)),
            "tan", rim=False),
        Part(
            blob((0.0, 0.56), (0.04, 0.36), (0.16, 0.16), (0.36, 0.03), (0.5, 0.0), (0.64, 0.03),
                (0.84, 0.16), (0.96, 0.36), (1.0, 0.56), (0.84, 0.64), (0.5, 0.66), (0.16, 0.64)),
            "body",
        ),
        Part(blob((0.02, 0.56), (0.2, 0.58), (0.5, 0.59), (0.8, 0.58), (0.98, 0.56), (0.84, 0.635),
            (0.5, 0.655), (0.16, 0.635)), "shade", rim=False),
        Part(ellipse(0.5, 0.25, 0.1, 0.085), "white", rim=False),
        Part(ellipse(0.22, 0.38, 0.07, 0.075), "white", rim=False),
        Part(ellipse(0.78, 0.38, 0.07, 0.075), "white", rim=False),
        Part(ellipse(0.4, 0.49, 0.045, 0.04), "white", rim=False),
        Part(ellipse(0.63, 0.49, 0.045, 0.04), "white", rim=False),
        Part(ellipse(0.28, 0.17, 0.04, 0.035), "white", rim=False),
        Part(ellipse(0.73, 0.16, 0.04, 0.035), "white", rim=False),
    ]


@_subject("car")
def _car() -> list[Part]:
    return [
        Part(
            blob((0.0, 0.74), (0.01, 0.6), (0.1, 0.53), (0.2, 0.48), (0.28, 0.32), (0.42, 0.24),
                (0.58, 0.25), (0.7, 0.36), (0.78, 0.5), (0.93, 0.55), (1.01, 0.64), (1.02, 0.76),
                (0.98, 0.84), (0.5, 0.86), (0.04, 0.84)),
            "body",
        ),
        Part(blob((0.28, 0.5), (0.33, 0.37), (0.42, 0.31), (0.46, 0.31), (0.46, 0.5)), "glass", edge=True,
            rim=False),
        Part(blob((0.52, 0.5), (0.52, 0.31), (0.57, 0.32), (0.65, 0.39), (0.7, 0.5)), "glass", edge=True,
            rim=False),
        Part(polygon((0.36, 0.48), (0.42, 0.34), (0.45, 0.34), (0.39, 0.48)), "white", rim=False),
        Part(blob((0.02, 0.74), (0.5, 0.74), (1.0, 0.74), (0.98, 0.83), (0.5, 0.85), (0.04, 0.83)), "shade",
            rim=False),
        Part(curve((0.49, 0.52), (0.49, 0.78)), "edge", 0.016, rim=False),
        Part(curve((0.53, 0.59), (0.59, 0.59)), "edge", 0.024, rim=False),
        Part(ellipse(0.95, 0.65, 0.04, 0.05), "gold", edge=True),
        Part(ellipse(0.03, 0.67, 0.025, 0.045), "nose", rim=False),
        Part(box(0.94, 0.77, 1.06, 0.84, 0.03), "metal"),
        Part(box(-0.04, 0.77, 0.07, 0.84, 0.03), "metal"),
        *wheel(0.24, 0.84, 0.135),
        *wheel(0.77, 0.84, 0.135),
    ]


@_subject("boat")
def _boat() -> list[Part]:
    return [
        Part(curve((0.46, 0.02), (0.46, 0.76)), "wood", 0.035),
        Part(polygon((0.47, 0.0), (0.66, 0.05), (0.47, 0.12)), "gold"),
        Part(blob((0.51, 0.12), (0.66, 0.3), (0.8, 0.48), (0.86, 0.64), (0.68, 0.66), (0.51, 0.66),
            (0.53, 0.4)), "body"),
        Part(blob((0.52, 0.5), (0.66, 0.51), (0.81, 0.5), (0.85, 0.63), (0.68, 0.65), (0.52, 0.65)),
            "light", rim=False),
        Part(blob((0.41, 0.2), (0.42, 0.42), (0.41, 0.66), (0.26, 0.66), (0.12, 0.62), (0.26, 0.44)),
            "white"),
        Part(
            blob((-0.02, 0.72), (0.16, 0.75), (0.5, 0.77), (0.84, 0.75), (1.02, 0.7), (0.96, 0.84),
                (0.86, 0.97), (0.66, 1.0), (0.3, 1.0), (0.12, 0.96), (0.03, 0.85)),
            "body",
        ),
        Part(blob((0.08, 0.9), (0.3, 0.92), (0.66, 0.92), (0.91, 0.9), (0.86, 0.965), (0.66, 0.995),
            (0.3, 0.995), (0.12, 0.955)), "shade", rim=False),
        Part(ellipse(0.3, 0.84, 0.035), "glass", edge=True, rim=False),
        Part(ellipse(0.5, 0.845, 0.035), "glass", edge=True, rim=False),
        Part(ellipse(0.7, 0.84, 0.035), "glass", edge=True, rim=False),
    ]


@_subject("rocket", lift=0.06)
def _rocket() -> list[Part]:
    return [
        Part(blob((0.4, 0.82), (0.41, 0.93), (0.45, 0.91), (0.5, 1.03), (0.55, 0.91), (0.59, 0.93),
            (0.6, 0.82)), "gold"),
        Part(blob((0.45, 0.82), (0.46, 0.88), (0.5, 0.95), (0.54, 0.88), (0.55, 0.82)), "nose", rim=False),
        Part(blob((0.33, 0.52), (0.2, 0.62), (0.13, 0.78), (0.14, 0.92), (0.24, 0.84), (0.38, 0.8)), "shade"),
        Part(blob((0.67, 0.52), (0.8, 0.62), (0.87, 0.78), (0.86, 0.92), (0.76, 0.84), (0.62, 0.8)), "shade"),
        Part(box(0.38, 0.78, 0.62, 0.86, 0.03), "metal"),
        Part(blob((0.5, -0.02), (0.6, 0.1), (0.69, 0.28), (0.71, 0.5), (0.66, 0.72), (0.6, 0.81),
            (0.4, 0.81), (0.34, 0.72), (0.29, 0.5), (0.31, 0.28), (0.4, 0.1)), "body"),
        Part(blob((0.5, -0.02), (0.59, 0.09), (0.655, 0.2), (0.5, 0.23), (0.345, 0.2), (0.41, 0.09)),
            "shade", rim=False),
        Part(blob((0.37, 0.3), (0.41, 0.29), (0.4, 0.5), (0.43, 0.72), (0.39, 0.72), (0.35, 0.5)), "light",
            rim=False),
        Part(ellipse(0.5, 0.38, 0.115), "metal", rim=False),
        Part(ellipse(0.5, 0.38, 0.082), "glass", rim=False),
        Part(ellipse(0.47, 0.35, 0.028), "white", rim=False),
        Part(curve((0.33, 0.64), (0.5, 0.67), (0.67, 0.64)), "edge", 0.02, rim=False),
        Part(blob((0.5, 0.6), (0.54, 0.74), (0.5, 0.9), (0.46, 0.74)), "shade", edge=True),
    ]


@_subject("balloon", lift=0.1)
def _balloon() -> list[Part]:
    return [
        Part(curve((0.32, 0.6), (0.42, 0.84)), "wood", 0.02),
        Part(curve((0.68, 0.6), (0.58, 0.84)), "wood", 0.02),
        Part(curve((0.5, 0.66), (0.5, 0.84)), "wood", 0.02),
        Part(blob((0.5, 0.0), (0.68, 0.03), (0.84, 0.14), (0.9, 0.32), (0.84, 0.5), (0.7, 0.64),
            (0.6, 0.72), (0.4, 0.72), (0.3, 0.64), (0.16, 0.5), (0.1, 0.32), (0.16, 0.14), (0.32, 0.03)),
            "body"),
        Part(blob((0.5, 0.0), (0.6, 0.1), (0.63, 0.34), (0.58, 0.56), (0.54, 0.71), (0.46, 0.71),
            (0.42, 0.56), (0.37, 0.34), (0.4, 0.1)), "light", rim=False),
        Part(curve((0.5, 0.01), (0.7, 0.12), (0.77, 0.34), (0.7, 0.56), (0.6, 0.7)), "edge", 0.016,
            rim=False),
        Part(curve((0.5, 0.01), (0.3, 0.12), (0.23, 0.34), (0.3, 0.56), (0.4, 0.7)), "edge", 0.016,
            rim=False),
        Part(ellipse(0.24, 0.2, 0.035, 0.07, 30), "white", rim=False),
        Part(blob((0.39, 0.7), (0.5, 0.69), (0.61, 0.7), (0.59, 0.745), (0.41, 0.745)), "shade", rim=False),
        Part(box(0.38, 0.84, 0.62, 1.02, 0.04), "wood"),
        Part(box(0.36, 0.83, 0.64, 0.88, 0.02), "tan", edge=True),
        Part(curve((0.46, 0.89), (0.46, 1.0)), "ink", 0.01, rim=False),
        Part(curve((0.54, 0.89), (0.54, 1.0)), "ink", 0.01, rim=False),
    ]


@_subject("train")
def _train() -> list[Part]:
    return [
        Part(
            blob((0.78, 0.14), (0.7, 0.16), (0.62, 0.11), (0.52, 0.1), (0.5, 0.0), (0.6, -0.05),
                (0.7, -0.02), (0.77, 0.05), (0.83, 0.09)),
            "white",
        ),
        Part(polygon((0.7, 0.44), (0.71, 0.28), (0.66, 0.21), (0.88, 0.21), (0.83, 0.28), (0.84, 0.44)),
            "shade"),
        Part(arc(0.54, 0.42, 0.07, 0.09, 180, 360), "gold"),
        Part(box(0.38, 0.4, 0.96, 0.74, 0.08), "body"),
        Part(box(0.38, 0.46, 0.92, 0.52, 0.03), "light", rim=False),
        Part(curve((0.64, 0.41), (0.64, 0.74)), "edge", 0.022, rim=False),
        Part(curve((0.8, 0.41), (0.8, 0.74)), "edge", 0.022, rim=False),
        Part(box(0.04, 0.2, 0.42, 0.78, 0.03), "body", edge=True),
        Part(box(0.12, 0.3, 0.34, 0.5, 0.03), "glass", edge=True, rim=False),
        Part(polygon((0.15, 0.48), (0.23, 0.32), (0.28, 0.32), (0.2, 0.48)), "white", rim=False),
        Part(box(-0.02, 0.14, 0.47, 0.23, 0.04), "shade", edge=True),
        Part(ellipse(0.96, 0.5, 0.045), "gold", edge=True),
        Part(polygon((0.88, 0.74), (1.06, 0.95), (0.84, 0.95)), "metal"),
        Part(box(0.02, 0.72, 0.92, 0.82, 0.03), "shade", edge=True),
        *wheel(0.2, 0.86, 0.14),
        *wheel(0.51, 0.9, 0.1),
        *wheel(0.75, 0.9, 0.1),
    ]


@_subject("house")
def _house() -> list[Part]:
    def window(x: float, y: float) -> list[Part]:
        return [
            Part(box(x - 0.085, y - 0.09, x + 0.085, y + 0.09, 0.02), "white", edge=True, rim=False),
            Part(box(x - 0.065, y - 0.07, x + 0.065, y + 0.07), "glass", rim=False),
            Part(curve((x, y - 0.07), (x, y + 0.07)), "white", 0.02, rim=False),
            Part(curve((x - 0.065, y), (x + 0.065, y)), "white", 0.02, rim=False),
        ]

    return [
        Part(box(0.68, 0.08, 0.81, 0.36), "body"),
        Part(box(0.66, 0.06, 0.83, 0.12, 0.02), "shade"),
        Part(box(0.1, 0.38, 0.9, 1.0, 0.02), "body"),
        Part(box(0.1, 0.44, 0.9, 0.5), "edge", rim=False),
        Part(polygon((-0.02, 0.47), (0.22, 0.14), (0.5, 0.12), (0.78, 0.14), (1.02, 0.47)), "shade"),
        Part(polygon((0.22, 0.14), (0.78, 0.14), (0.8, 0.17), (0.2, 0.17)), "body", rim=False),
        Part(curve((0.1, 0.36), (0.9, 0.36)), "edge", 0.016, rim=False),
        Part(curve((0.18, 0.26), (0.82, 0.26)), "edge", 0.016, rim=False),
        *window(0.26, 0.7),
        *window(0.74, 0.7),
        Part(box(0.42, 0.64, 0.58, 1.0, 0.05), "wood", edge=True),
        Part(ellipse(0.545, 0.84, 0.018), "gold", rim=False),
        Part(box(0.38, 0.97, 0.62, 1.02, 0.01), "tan"),
    ]


@_subject("castle")
def _castle() -> list[Part]:
    def crown(left: float, right: float, top: float, teeth: int) -> Points:
        points = [(left, top + 0.3)]
        step = (right - left) / (2 * teeth - 1)
        for tooth in range(teeth):
            x = left + 2 * tooth * step
            points += [(x, top + 0.06), (x, top), (x + step, top), (x + step, top + 0.06)]
        return polygon(*points, (right, top + 0.3))

    def tower(left: float, right: float, top: float) -> list[Part]:
        middle = (left + right) / 2
        return [
            Part(curve((middle, top - 0.34), (middle, top - 0.2)), "wood", 0.02),
            Part(polygon((middle, top - 0.35), (middle + 0.12, top - 0.31), (middle, top - 0.26)), "gold"),
            Part(box(left, top, right, 1.0), "body", edge=True),
            Part(polygon((left - 0.05, top + 0.03), (middle, top - 0.23), (right + 0.05, top + 0.03)),
                "shade", edge=True),
            Part(box(middle - 0.035, top + 0.13, middle + 0.035, top + 0.26, 0.035), "ink", rim=False),
            Part(curve((left + 0.03, 0.84), (left + 0.1, 0.84)), "edge", 0.018, rim=False),
            Part(curve((right - 0.1, 0.72), (right - 0.03, 0.72)), "edge", 0.018, rim=False),
        ]

    return [
        Part(crown(0.32, 0.68, 0.28, 3), "body"),
        Part(box(0.32, 0.4, 0.68, 1.0), "body"),
        Part(box(0.465, 0.4, 0.535, 0.5, 0.03), "ink", rim=False),
        Part(crown(0.2, 0.8, 0.56, 5), "body", edge=True),
        Part(box(0.2, 0.7, 0.8, 1.0), "body"),
        *tower(0.02, 0.26, 0.36),
        *tower(0.74, 0.98, 0.36),
        Part(box(0.38, 0.72, 0.62, 1.12, 0.12)[:20].clip(max=1.0), "wood", edge=True),
        Part(curve((0.5, 0.74), (0.5, 1.0)), "ink", 0.016, rim=False),
    ]


@_subject("umbrella")
def _umbrella() -> list[Part]:
    return [
        Part(curve((0.5, 0.3), (0.5, 0.6), (0.5, 0.88), (0.56, 0.98), (0.65, 0.95), (0.67, 0.87)), "wood",
            0.045),
        Part(curve((0.5, 0.0), (0.5, 0.1)), "wood", 0.04),
        Part(
            np.concatenate([
                arc(0.5, 0.55, 0.5, 0.48, 180, 360),
                arc(0.875, 0.55, 0.125, 0.07, 0, -180),
                arc(0.625, 0.55, 0.125, 0.07, 0, -180),
                arc(0.375, 0.55, 0.125, 0.07, 0, -180),
                arc(0.125, 0.55, 0.125, 0.07, 0, -180),
            ]),
            "body",
        ),
        Part(np.concatenate([curve((0.5, 0.07), (0.33, 0.25), (0.25, 0.55)), arc(0.375, 0.55, 0.125, 0.07,
            180, 360), curve((0.5, 0.55), (0.5, 0.3), (0.5, 0.07))]), "light", rim=False),
        Part(np.concatenate([curve((0.5, 0.07), (0.7, 0.2), (0.84, 0.36), (0.99, 0.55)), arc(0.875, 0.55,
            0.125, 0.07, 0, -180), curve((0.75, 0.55), (0.67, 0.25), (0.5, 0.07))]), "shade", rim=False),
        Part(curve((0.5, 0.07), (0.33, 0.25), (0.25, 0.54)), "edge", 0.016, rim=False),
        Part(curve((0.5, 0.07), (0.67, 0.25), (0.75, 0.54)), "edge", 0.016, rim=False),
        Part(curve((0.5, 0.07), (0.5, 0.48)), "edge", 0.016, rim=False),
    ]


@_subject("teapot")
def _teapot() -> list[Part]:
    return [
        Part(curve((0.22, 0.42), (0.06, 0.38), (0.0, 0.54), (0.06, 0.72), (0.24, 0.8)), "shade", 0.075),
        Part(blob((0.7, 0.82), (0.84, 0.74), (0.9, 0.54), (0.97, 0.4), (1.06, 0.36), (1.0, 0.3),
            (0.88, 0.33), (0.8, 0.46), (0.72, 0.52)), "shade"),
        Part(ellipse(0.47, 0.16, 0.06), "shade"),
        Part(blob((0.26, 0.36), (0.32, 0.25), (0.47, 0.2), (0.62, 0.25), (0.68, 0.36)), "body"),
        Part(blob((0.47, 0.3), (0.66, 0.34), (0.8, 0.5), (0.81, 0.7), (0.7, 0.9), (0.58, 0.97),
            (0.36, 0.97), (0.24, 0.9), (0.13, 0.7), (0.14, 0.5), (0.28, 0.34)), "body", edge=True),
        Part(blob((0.22, 0.86), (0.36, 0.9), (0.58, 0.9), (0.72, 0.86), (0.58, 0.965), (0.36, 0.965)),
            "shade", rim=False),
        Part(box(0.3, 0.95, 0.64, 1.01, 0.02), "shade"),
        Part(ellipse(0.25, 0.5, 0.04, 0.09, 25), "white", rim=False),
        *[
            Part(turned(ellipse(0.49, 0.56, 0.045, 0.055), i * 72, 0.49, 0.635), "white", rim=False)
            for i in range(5)
        ],
        Part(ellipse(0.49, 0.635, 0.04), "gold", rim=False),
    ]


# fmt: on
