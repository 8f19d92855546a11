"""Smooth outlines as arrays of points: ellipses, blobs, rounded boxes and strokes on a unit square.

x runs to the right and y runs down, as in a picture. Every function returns a float array of shape (n, 2).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Points = NDArray[np.float64]
RGB = tuple[int, int, int]


@dataclass(frozen=True, eq=False)
class Part:
    """One filled polygon or one stroke of a drawing.

    points: (n, 2); fill: the name of a role in a palette, or a colour of its own; width: 0 for a polygon,
    else the width of the stroke, in the unit of the points; edge: whether a thin line of its own sets it off
    from what lies under it; rim: whether it takes part in the outline around the whole thing.
    """

    points: Points
    fill: str | RGB
    width: float = 0.0
    edge: bool = False
    rim: bool = True


def ellipse(x: float, y: float, radius_x: float, radius_y: float | None = None, turn: float = 0.0) -> Points:
    """An ellipse around (x, y), turned by `turn` degrees; a circle where radius_y is None."""
    radius_y = radius_x if radius_y is None else radius_y
    # Few points for little circles: the drawing time is the number of points.
    count = 12 if max(radius_x, radius_y) < 0.05 else 28
    angle = np.linspace(0.0, 2 * math.pi, count, endpoint=False)
    return turned(np.stack([x + radius_x * np.cos(angle), y + radius_y * np.sin(angle)], axis=1), turn, x, y)


def arc(x: float, y: float, radius_x: float, radius_y: float, start: float, stop: float) -> Points:
    """A piece of an ellipse from angle `start` to `stop` in degrees (0 right, 90 down)."""
    angle = np.radians(np.linspace(start, stop, 16))
    return np.stack([x + radius_x * np.cos(angle), y + radius_y * np.sin(angle)], axis=1)


def polygon(*points: tuple[float, float]) -> Points:
    """Straight corners."""
    return np.array(points, dtype=np.float64)


def turned(points: Points, degrees: float, x: float, y: float) -> Points:
    """`points` turned clockwise by `degrees` around (x, y)."""
    if degrees == 0.0:
        return points
    cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    away_x, away_y = points[:, 0] - x, points[:, 1] - y
    return np.stack([x + cosine * away_x - sine * away_y, y + sine * away_x + cosine * away_y], axis=1)


def _catmull_rom(points: Points, steps: int) -> Points:
    before, start, stop, after = points[:-3], points[1:-2], points[2:-1], points[3:]
    pieces = []
    for step in range(steps):
        t = step / steps
        pieces.append(
            0.5
            * (
                2 * start
                + (stop - before) * t
                + (2 * before - 5 * start + 4 * stop - after) * t * t
                + (3 * start - before - 3 * stop + after) * t * t * t
            )
        )
    return np.stack(pieces, axis=1).reshape(-1, 2)


def blob(*points: tuple[float, float], steps: int = 5) -> Points:
    """A closed smooth curve through the points."""
    corners = np.array(points, dtype=np.float64)
    return _catmull_rom(np.concatenate([corners[-1:], corners, corners[:2]]), steps)


def curve(*points: tuple[float, float], steps: int = 6) -> Points:
    """An open smooth curve through the points, for strokes."""
    corners = np.array(points, dtype=np.float64)
    if len(points) == 2:
        return corners
    ends = np.concatenate([corners[:1], corners, corners[-1:]])
    return np.concatenate([_catmull_rom(ends, steps), corners[-1:]])


def box(left: float, top: float, right: float, bottom: float, radius: float = 0.0) -> Points:
    """A rectangle with rounded corners."""
    if radius <= 0:
        return polygon((left, top), (right, top), (right, bottom), (left, bottom))
    angle = np.radians(np.linspace(0, 90, 5))
    corners = (
        (right - radius, bottom - radius, 0),
        (left + radius, bottom - radius, 90),
        (left + radius, top + radius, 180),
        (right - radius, top + radius, 270),
    )
    pieces = []
    for x, y, quarter in corners:
        around = angle + math.radians(quarter)
        pieces.append(np.stack([x + radius * np.cos(around), y + radius * np.sin(around)], axis=1))
    return np.concatenate(pieces)


def fattened(points: Points, by: float) -> Points:
    """A closed smooth curve moved outwards by `by` everywhere; good only where it has no sharp corners."""
    along = np.roll(points, -1, axis=0) - np.roll(points, 1, axis=0)
    length = np.maximum(np.hypot(along[:, 0], along[:, 1]), 1e-9)
    after = np.roll(points, -1, axis=0)
    area = float((points[:, 0] * after[:, 1] - after[:, 0] * points[:, 1]).sum())
    outwards = np.stack([along[:, 1] / length, -along[:, 0] / length], axis=1)
    return points + outwards * (by if area > 0 else -by)


def bounds(parts: Sequence[Part]) -> tuple[float, float, float, float]:
    """(left, top, right, bottom) of all parts, with the widths of strokes."""
    low = np.min([part.points.min(axis=0) - part.width / 2 for part in parts], axis=0)
    high = np.max([part.points.max(axis=0) + part.width / 2 for part in parts], axis=0)
    return float(low[0]), float(low[1]), float(high[0]), float(high[1])
