"""Charts: curves as inline SVG, drawn from numbers alone, coloured by the page's own variables."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import TypeAlias

WIDTH, HEIGHT = 560.0, 220.0
LEFT, RIGHT, TOP, BOTTOM = 52.0, 22.0, 12.0, 26.0
"""The drawing's size and the room around its frame, in the SVG's units: about pixels on the page."""
COLUMNS = 320
"""A faint curve with more points than this is drawn as the band between its extremes, column by column."""


Row: TypeAlias = tuple[float, float, float]
"""(step, value, half the height of the band)."""


@dataclass(frozen=True)
class Curve:
    """Numbers over steps. Points with a non-finite number are left out."""

    label: str
    steps: Sequence[float]
    values: Sequence[float]
    style: str = "main"
    """CSS class: "main", "second", "faint" or "dashed"."""
    half_band: Sequence[float] = ()
    """Half the height of a band around the curve, one number a point; empty for no band."""


@dataclass(frozen=True)
class Mark:
    """A ring with a word at one point."""

    label: str
    step: float
    value: float


def chart(
    label: str,
    curves: Sequence[Curve],
    *,
    marks: Sequence[Mark] = (),
    dividers: Sequence[tuple[float, str]] = (),
    last_step: float = 0,
    log: bool = False,
) -> str:
    """An `<svg>`, called `label`, of curves over steps 0..max(last_step, steps).

    `dividers` are upright lines (step, word). `log` draws the logarithm where every number allows it.

    The vertical range holds every number of the curves that aren't faint, and 98 % of a faint one's: what is
    beyond is cut at the frame.
    """
    points = [(curve, _finite(curve)) for curve in curves]
    shown = [value for curve, rows in points for value in _range(curve, rows)]
    shown += [mark.value for mark in marks]
    if not shown:
        return (
            f'<svg class="chart" viewBox="0 0 {WIDTH:.0f} 60" role="img" aria-label="{escape(label)}">'
            f'<text class="none" x="{WIDTH / 2}" y="34">no data yet</text></svg>'
        )
    log = log and min(shown) > 0
    low, high = _limits(min(shown), max(shown), log)
    end = max([last_step, 1.0, *(step for _, rows in points for step, _, _ in rows)])

    def x(step: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * step / end

    def y(value: float) -> float:
        a, b, v = (math.log(low), math.log(high), math.log(max(value, 1e-300))) if log else (low, high, value)
        return TOP + (HEIGHT - TOP - BOTTOM) * (1 - (v - a) / (b - a))

    name = f"clip-{zlib.crc32(label.encode()):x}"
    body = [
        f'<clipPath id="{name}"><rect x="{LEFT}" y="{TOP}" width="{WIDTH - LEFT - RIGHT}" '
        f'height="{HEIGHT - TOP - BOTTOM}"/></clipPath>'
    ]
    for value in ticks_log(low, high) if log else ticks(low, high, 5):
        body.append(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(value):.1f}" y2="{y(value):.1f}"/>'
        )
        body.append(f'<text class="tick y" x="{LEFT - 8}" y="{y(value) + 4:.1f}">{number(value)}</text>')
    for value in ticks(0, end, 6):
        if value == int(value):
            body.append(f'<text class="tick x" x="{x(value):.1f}" y="{HEIGHT - 8}">{value:,.0f}</text>')
    body.append(
        f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{HEIGHT - BOTTOM}" y2="{HEIGHT - BOTTOM}"/>'
    )
    for step, word in dividers:
        at = f"{x(step):.1f}"
        body.append(f'<line class="divider" x1="{at}" x2="{at}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
        body.append(f'<text class="divider" x="{x(step) + 5:.1f}" y="{TOP + 10}">{escape(word)}</text>')
    body.append(f'<g clip-path="url(#{name})">')
    body += [_draw(curve, rows, x, y) for curve, rows in points]
    body.append("</g>")
    for mark in marks:
        right = x(mark.step) > WIDTH * 0.75
        body.append(f'<circle class="mark" cx="{x(mark.step):.1f}" cy="{y(mark.value):.1f}" r="5"/>')
        body.append(
            f'<text class="mark" x="{x(mark.step) + (-9 if right else 9):.1f}" y="{y(mark.value) + 16:.1f}" '
            f'text-anchor="{"end" if right else "start"}">{escape(mark.label)}</text>'
        )
    body.append(f'<line class="cursor" x1="0" x2="0" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH:.0f} {HEIGHT:.0f}" role="img" aria-label="{escape(label)}" '
        f'data-end="{end:g}" data-low="{low!r}" data-high="{high!r}" data-log="{int(log)}" '
        f'data-frame="{LEFT} {RIGHT} {TOP} {BOTTOM}">{"".join(body)}</svg>'
    )


def _finite(curve: Curve) -> list[Row]:
    bands = curve.half_band or [0.0] * len(curve.steps)
    rows = zip(curve.steps, curve.values, bands, strict=True)
    return [
        (step, value, band if math.isfinite(band) else 0.0)
        for step, value, band in rows
        if math.isfinite(value)
    ]


def _range(curve: Curve, rows: list[Row]) -> list[float]:
    values = sorted(value for _, value, _ in rows)
    if curve.style == "faint" and len(values) >= 50:
        cut = len(values) // 100
        return [values[cut], values[-1 - cut]]
    return [end for _, value, band in rows for end in (value - band, value + band)]


def _draw(curve: Curve, rows: list[Row], x: Callable[[float], float], y: Callable[[float], float]) -> str:
    parts = []
    if curve.half_band:
        upper = [f"{x(s):.1f},{y(v + b):.1f}" for s, v, b in rows]
        lower = [f"{x(s):.1f},{y(v - b):.1f}" for s, v, b in reversed(rows)]
        parts.append(f'<polygon class="band {curve.style}" points="{" ".join(upper + lower)}"/>')
    if curve.style == "faint" and len(rows) > COLUMNS:
        per = math.ceil(len(rows) / COLUMNS)
        groups = [rows[i : i + per] for i in range(0, len(rows), per)]
        middle = [sum(s for s, _, _ in g) / len(g) for g in groups]
        upper = [f"{x(s):.1f},{y(max(v for _, v, _ in g)):.1f}" for s, g in zip(middle, groups, strict=True)]
        lower = [f"{x(s):.1f},{y(min(v for _, v, _ in g)):.1f}" for s, g in zip(middle, groups, strict=True)]
        parts.append(f'<polygon class="spread" points="{" ".join(upper + lower[::-1])}"/>')
        return "".join(parts)
    rows = thinned(rows, 2 * COLUMNS)
    line = " ".join(f"{x(s):.1f},{y(v):.1f}" for s, v, _ in rows)
    # The page's pointer reads a curve's numbers from its points, so the label travels with them.
    parts.append(
        f'<polyline class="curve {curve.style}" data-label="{escape(curve.label)}" points="{line}"/>'
    )
    if len(rows) <= 24 and curve.style != "faint":
        parts += [
            f'<circle class="dot {curve.style}" cx="{x(s):.1f}" cy="{y(v):.1f}" r="2.6"/>' for s, v, _ in rows
        ]
    return "".join(parts)


def thinned(rows: list[Row], most: int) -> list[Row]:
    """At most about `most` of the rows, evenly, with the first and the last."""
    if len(rows) <= most:
        return rows
    return [rows[round(i * (len(rows) - 1) / (most - 1))] for i in range(most)]


def _limits(low: float, high: float, log: bool) -> tuple[float, float]:
    if log:
        room = max((high / low) ** 0.06, 1.05)
        return low / room, high * room
    room = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    # A curve of positive numbers never shows a negative axis.
    return (max(0.0, low - room) if low >= 0 else low - room), high + room


def ticks(low: float, high: float, most: int) -> list[float]:
    """At most `most` + 1 round numbers (1, 2 or 5 times a power of ten apart) in low..high."""
    if high <= low:
        return [low]
    raw = (high - low) / most
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def ticks_log(low: float, high: float) -> list[float]:
    """Powers of ten in low..high, with 2 and 5 times them where there are few."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    few = math.log10(high / low) < 2
    marks = [m * 10.0**p for p in powers for m in ((1, 2, 5) if few else (1,))]
    inside = [value for value in marks if low <= value <= high]
    return inside if len(inside) > 1 else ticks(low, high, 4)


def number(value: float) -> str:
    """A tick's number, short: 0.002, 1e-05, 1,200."""
    if value == 0:
        return "0"
    if abs(value) < 1e-3 or abs(value) >= 1e5:
        digits, _, power = f"{value:.1e}".partition("e")
        return f"{float(digits):g}e{int(power)}"
    return f"{value:,.6g}"
