"""Bootstrap: how far a mean over prompts and seeds could have come out otherwise.

Pictures of one prompt are alike, and so are pictures from one seed; resampling pictures one by one would promise too
much. Prompts and seeds are therefore both drawn anew, and every picture of a drawn prompt and a drawn seed comes along
(the pigeonhole bootstrap; Owen, 2007).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from scumble.rng import Streams

RESAMPLES = 1000
LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """A number with its interval."""

    value: float
    low: float
    high: float

    def as_json(self) -> dict[str, float]:
        """Rounded to five digits behind the point."""
        return {name: round(getattr(self, name), 5) for name in ("value", "low", "high")}


def mean(values: NDArray[np.float64]) -> float:
    """The default statistic."""
    return float(values.mean())


def estimate(
    values: NDArray[np.float64],
    statistic: Callable[[NDArray[np.float64]], float] = mean,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Estimate:
    """`statistic` of `values` and its 95 % interval over prompts and seeds.

    `values` (prompts, seeds, ...): one entry a picture. Equal arguments give equal intervals.

    Raises:
        ValueError: there is no picture.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.ndim < 2 or not values.size:
        raise ValueError(f"an estimate needs values of prompts x seeds, got the shape {values.shape}")
    random = np.random.default_rng(Streams(seed).number("bootstrap"))
    prompts, seeds = values.shape[:2]
    found = []
    for _ in range(resamples):
        rows, columns = random.integers(prompts, size=prompts), random.integers(seeds, size=seeds)
        found.append(statistic(values[rows][:, columns]))
    return _interval(statistic(values), found)


def estimate_pairs(distances: NDArray[np.float64], *, resamples: int = RESAMPLES, seed: int = 0) -> Estimate:
    """The mean distance of two different pictures, and its 95 % interval over seeds.

    `distances` (seeds, seeds), symmetric. A picture drawn twice is not compared with itself.

    Raises:
        ValueError: there are fewer than two pictures.
    """
    count = len(distances)
    if count < 2:
        raise ValueError(f"diversity needs at least two pictures, got {count}")
    random = np.random.default_rng(Streams(seed).number("bootstrap pairs"))
    apart = ~np.eye(count, dtype=bool)
    found: list[float] = []
    while len(found) < resamples:
        rows = random.integers(count, size=count)
        different = apart[np.ix_(rows, rows)]
        if different.any():
            found.append(float(distances[np.ix_(rows, rows)][different].mean()))
    return _interval(float(distances[apart].mean()), found)


def _interval(value: float, found: list[float]) -> Estimate:
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(found, [tail, 1 - tail])
    return Estimate(value, float(low), float(high))
