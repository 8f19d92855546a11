"""Order: which pictures the n-th micro-batch shows, as a function of (seed, n) alone.

Each group (pictures of one size) has an endless stream of visits: epoch after epoch, each a permutation of
its pictures. Micro-batches take turns among the groups in proportion to their sizes (smooth weighted
round-robin, as in nginx's balancer), so that all pictures are seen equally often and no stretch of a run sees
one size only.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import gcd
from typing import Generic, TypeVar

from scumble.rng import Streams

Group = TypeVar("Group")


@dataclass(frozen=True)
class Visit:
    """One picture at one place of the run."""

    position: int
    """Samples of the run before it, over all processes."""
    entry: int
    """Which picture."""


class Order(Generic[Group]):
    """The order of a run.

    Law: with one group, the visits of micro-batches 0, 1, 2, ... laid end to end do not depend on
    `batch_size`, up to the end of the shorter.
    """

    def __init__(self, groups: Mapping[Group, Sequence[int]], batch_size: int, seed: int) -> None:
        """`groups`: entries by size; an entry may occur several times. The order of the groups is part of the
        order."""
        assert batch_size > 0 and groups and all(groups.values())
        self.batch_size = batch_size
        self._names = tuple(groups)
        self._entries = tuple(tuple(entries) for entries in groups.values())
        self._streams = Streams(seed)
        self._turns, self._ranks = _turns(tuple(map(len, self._entries)))
        self._weights = Counter(self._turns)
        self._permutation = lru_cache(maxsize=4 * len(self._names))(self._shuffled)

    def batch(self, number: int) -> tuple[Group, tuple[Visit, ...]]:
        """The group and visits of the `number`-th micro-batch of the run, over all processes."""
        rounds, turn = divmod(number, len(self._turns))
        group = self._turns[turn]
        before = rounds * self._weights[group]
        first = (before + self._ranks[turn]) * self.batch_size
        return self._names[group], tuple(
            Visit(number * self.batch_size + index, self._entry(group, first + index))
            for index in range(self.batch_size)
        )

    def _entry(self, group: int, visit: int) -> int:
        entries = self._entries[group]
        epoch, index = divmod(visit, len(entries))
        return entries[self._permutation(group, epoch)[index]]

    def _shuffled(self, group: int, epoch: int) -> tuple[int, ...]:
        order = list(range(len(self._entries[group])))
        self._streams.python("data.order", group, epoch).shuffle(order)
        return tuple(order)


def _turns(sizes: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(group of each turn, how often the group came before in the round), for one round of sum(weights)
    turns."""
    divisor = gcd(*sizes)
    weights = [size // divisor for size in sizes]
    total, credit, count = sum(weights), [0] * len(sizes), [0] * len(sizes)
    turns, ranks = [], []
    for _ in range(total):
        credit = [have + weight for have, weight in zip(credit, weights, strict=True)]
        chosen = max(range(len(sizes)), key=credit.__getitem__)
        credit[chosen] -= total
        turns.append(chosen)
        ranks.append(count[chosen])
        count[chosen] += 1
    return tuple(turns), tuple(ranks)
