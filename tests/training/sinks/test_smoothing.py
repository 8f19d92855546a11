"""Smoothing: an average without the bias of its start."""

from __future__ import annotations

import math

import pytest

from scumble.training.sinks.smoothing import Smoothed


def test_the_average_of_a_constant_is_the_constant_from_the_first_number_on() -> None:
    average = Smoothed(10)
    assert math.isnan(average.value)
    assert [average.add(3.0) for _ in range(50)] == pytest.approx([3.0] * 50)


def test_half_life() -> None:
    average = Smoothed(10)
    for _ in range(1000):
        average.add(0.0)
    for _ in range(10):
        average.add(1.0)
    assert average.value == pytest.approx(0.5, abs=1e-9)


def test_what_is_not_finite_is_left_out() -> None:
    average = Smoothed(5)
    average.add(2.0)
    assert average.add(math.nan) == 2.0
    assert average.add(math.inf) == 2.0
