"""Smoothing: an exponential average without the bias of its first steps, for curves and progress bars."""

from __future__ import annotations

import math


class Smoothed:
    """An exponential moving average whose weights always sum to 1.

    After x_1..x_n it is sum(d^(n-i) x_i) / sum(d^(n-i)): the mean at first, an average with the given
    half-life later (the bias correction of Adam, Kingma & Ba 2015, section 3).
    """

    def __init__(self, half_life: float = 25.0) -> None:
        """`half_life`: after so many numbers a number counts half."""
        self._decay = 0.5 ** (1 / half_life)
        self._sum = self._weight = 0.0

    def add(self, number: float) -> float:
        """Take a number, return the average. Non-finite numbers are left out."""
        if math.isfinite(number):
            self._sum = self._decay * self._sum + number
            self._weight = self._decay * self._weight + 1
        return self.value

    @property
    def value(self) -> float:
        """The average; NaN before the first number."""
        return self._sum / self._weight if self._weight else math.nan
