"""Charts: where numbers land in the drawing."""

from __future__ import annotations

import math
import re

import pytest

from scumble.training.sinks.charts import (
    BOTTOM,
    COLUMNS,
    HEIGHT,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    Curve,
    Mark,
    chart,
    number,
    ticks,
    ticks_log,
)


def points(svg: str, label: str) -> list[tuple[float, float]]:
    found = re.search(rf'data-label="{label}" points="([^"]+)"', svg)
    assert found
    return [(float(x), float(y)) for x, y in (pair.split(",") for pair in found[1].split())]


def value(svg: str, y: float) -> float:
    """A height in the drawing back as a number, as the page's script does it."""
    low, high = (float(re.search(rf'data-{name}="([^"]+)"', svg)[1]) for name in ("low", "high"))  # type: ignore[index]
    share = 1 - (y - TOP) / (HEIGHT - TOP - BOTTOM)
    return low * (high / low) ** share if 'data-log="1"' in svg else low + share * (high - low)


@pytest.mark.parametrize("log", [False, True])
def test_numbers_can_be_read_back(log: bool) -> None:
    values = [10 ** (-i / 4) for i in range(9)]
    svg = chart("x", [Curve("c", range(9), values)], log=log)
    for (x, y), step, expected in zip(points(svg, "c"), range(9), values, strict=True):
        assert (x - LEFT) / (WIDTH - LEFT - RIGHT) * 8 == pytest.approx(step, abs=0.01)
        assert value(svg, y) == pytest.approx(expected, rel=0.01, abs=0.002)


def test_what_is_not_finite_is_left_out() -> None:
    svg = chart("x", [Curve("c", [1, 2, 3], [1.0, math.nan, 3.0])])
    assert len(points(svg, "c")) == 2
    assert "nan" not in svg


def test_outliers_of_a_faint_curve_do_not_flatten_the_rest() -> None:
    values = [1.0 + 0.1 * (i % 2) for i in range(200)]
    values[50] = 1000.0
    svg = chart("x", [Curve("c", range(200), values, "faint")])
    assert value(svg, TOP) < 2


def test_many_points_become_a_band() -> None:
    svg = chart("x", [Curve("c", range(5000), [math.sin(i) for i in range(5000)], "faint")])
    assert 'class="spread"' in svg
    assert "polyline" not in svg
    assert svg.count(",") < 3 * COLUMNS


def test_marks_bands_and_no_data() -> None:
    svg = chart("x", [Curve("c", [1, 2], [1.0, 2.0], half_band=[0.5, 0.5])], marks=[Mark("<best>", 2, 2.0)])
    assert 'class="band main"' in svg
    assert "&lt;best&gt;" in svg
    assert value(svg, TOP) >= 2.5
    assert "no data yet" in chart("x", [Curve("c", [], [])])
    assert "no data yet" not in chart("x", [Curve("c", [1], [0.0])])


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.08, 0.12), (-3, 7), (1e-6, 3e-6), (0, 15000)])
def test_ticks_are_few_and_round(low: float, high: float) -> None:
    found = ticks(low, high, 5)
    assert 2 <= len(found) <= 6
    assert all(low <= tick <= high for tick in found)


def test_log_ticks() -> None:
    assert ticks_log(0.09, 11) == pytest.approx([0.1, 1, 10])
    assert len(ticks_log(0.3, 0.9)) >= 2
    assert len(ticks_log(0.52, 0.58)) >= 2


@pytest.mark.parametrize(
    ("x", "text"),
    [(0, "0"), (0.0005, "5e-4"), (1.5e-5, "1.5e-5"), (0.02, "0.02"), (1200, "1,200"), (2e6, "2e6")],
)
def test_number(x: float, text: str) -> None:
    assert number(x) == text
