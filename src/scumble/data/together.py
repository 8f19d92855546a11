"""Together: what the processes of a run need all and make once: who makes what, and who gets it from whom."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

Value = TypeVar("Value")

PARCEL = 16 << 20
"""Bytes that a process hands to the others at once: every process gets every parcel, on a GPU through its memory."""


class Together(Protocol):
    """The processes of a run, seen from one of them."""

    rank: int
    """Which one this is, from 0."""
    count: int
    """How many there are."""

    def gather(self, value: Value) -> list[Value]:
        """Every process's `value`, by rank. All must call it, in the same order of calls."""


class Alone:
    """A run of one process."""

    rank, count = 0, 1

    def gather(self, value: Value) -> list[Value]:
        """See `Together`."""
        return [value]


ALONE = Alone()


@dataclass(frozen=True)
class Shelf(Generic[Value]):
    """Where a process keeps what was made, by name. Several processes may have one in common, on a shared disk."""

    has: Callable[[str], bool]
    get: Callable[[str], Value]
    put: Callable[[str, Value], None]
    size: Callable[[Value], int]
    """Bytes of a value."""


def complete(
    names: Sequence[str],
    shelf: Shelf[Value],
    make: Callable[[Sequence[str]], None],
    together: Together,
) -> None:
    """Afterwards every process's shelf has all `names`, of which there are no two alike.

    What nobody has is made by one process, once: `make` is called with this process's part and puts it on the shelf.
    What a process lacks after that, because it shares no disk with the maker, it is handed.
    """
    lacking = [name for name in names if not shelf.has(name)]
    if together.count == 1:
        make(lacking)
        return
    absent = set.intersection(*map(set, together.gather(lacking)))
    new = [name for name in names if name in absent]
    # neighbours stay together: several cuts of a picture open it once
    first, last = (len(new) * number // together.count for number in (together.rank, together.rank + 1))
    make(new[first:last])
    _hand_round(names, shelf, together)


def _hand_round(names: Sequence[str], shelf: Shelf[Value], together: Together) -> None:
    """Whoever has what another lacks gives it; of several who have it, the first."""
    together.gather(None)  # all have made their part
    lacks = [set(lacking) for lacking in together.gather([name for name in names if not shelf.has(name)])]
    mine = []
    for name in sorted(set().union(*lacks)):
        giver = next(rank for rank, lacking in enumerate(lacks) if name not in lacking)
        if giver == together.rank:
            mine.append(name)
    parcels = _parcels(mine, shelf)
    for number in range(max(together.gather(len(parcels)))):
        own = parcels[number] if number < len(parcels) else []
        for given in together.gather({name: shelf.get(name) for name in own}):
            for name in given.keys() & lacks[together.rank]:
                shelf.put(name, given[name])


def _parcels(names: Sequence[str], shelf: Shelf[Value]) -> list[list[str]]:
    """`names` in groups of at most `PARCEL` bytes, or of one."""
    found: list[list[str]] = []
    room = 0
    for name in names:
        size = shelf.size(shelf.get(name))
        if not found or size > room:
            found.append([])
            room = PARCEL
        found[-1].append(name)
        room -= size
    return found
