"""What several processes make once and have all of; the processes are threads here (real ones: runs/test_processes)."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scumble.data import together as module
from scumble.data.together import ALONE, Shelf, Together, complete


class Threads:
    """Some threads that gather."""

    def __init__(self, count: int) -> None:
        self.count, self.values, self.barrier = count, [None] * count, threading.Barrier(count, timeout=20)

    def member(self, rank: int) -> Together:
        every = self

        class Member:
            def __init__(self) -> None:
                self.rank, self.count = rank, every.count

            def gather(self, value: Any) -> list[Any]:
                every.values[rank] = value
                every.barrier.wait()
                found = list(every.values)
                every.barrier.wait()
                return found

        return Member()


def shelf(kept: dict[str, bytes], fetched: Counter[str] | None = None) -> Shelf[bytes]:
    def put(name: str, value: bytes) -> None:
        kept[name] = value
        if fetched is not None:
            fetched[name] += 1

    return Shelf(has=kept.__contains__, get=kept.__getitem__, put=put, size=len)


def content(name: str) -> bytes:
    return name.encode() * 3


@given(
    count=st.integers(1, 4),
    names=st.lists(st.text("abc", min_size=1, max_size=3), unique=True, max_size=12),
    there=st.lists(st.sets(st.text("abc", min_size=1, max_size=3)), min_size=4, max_size=4),
    one_disk=st.booleans(),
    parcel=st.sampled_from([1, 10, 1 << 20]),
)
def test_what_nobody_has_is_made_once_and_all_have_everything(
    count: int, names: list[str], there: list[set[str]], one_disk: bool, parcel: int
) -> None:
    kept = [{name: content(name) for name in owned if name in names} for owned in there[:count]]
    if one_disk:
        kept = [kept[0]] * count
    had = set().union(*kept)
    made, handed, threads = Counter[str](), Counter[str](), Threads(count)

    def work(rank: int) -> None:
        def make(mine: Sequence[str]) -> None:
            for name in mine:
                made[name] += 1
                kept[rank][name] = content(name)

        complete(names, shelf(kept[rank], handed), make, threads.member(rank))

    before, module.PARCEL = module.PARCEL, parcel
    try:
        with ThreadPoolExecutor(count) as pool:
            for done in [pool.submit(work, rank) for rank in range(count)]:
                done.result(timeout=30)
    finally:
        module.PARCEL = before
    assert made == Counter(set(names) - had), "once, and nothing that somebody had"
    for shelved in kept:
        assert shelved == {name: content(name) for name in names}
    if one_disk:
        assert not handed, "a shared disk hands everything round"


def test_the_work_is_divided_evenly() -> None:
    names, parts, threads = [f"{number:02d}" for number in range(10)], dict[int, list[str]](), Threads(4)

    def work(rank: int) -> None:
        kept: dict[str, bytes] = {}

        def make(mine: Sequence[str]) -> None:
            parts[rank] = list(mine)
            kept.update({name: b"" for name in mine})

        complete(names, shelf(kept), make, threads.member(rank))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert [name for rank in range(4) for name in parts[rank]] == names, "neighbours stay together"
    assert {len(part) for part in parts.values()} == {2, 3}


def test_alone_it_makes_what_is_missing() -> None:
    kept, made = {"a": b""}, list[str]()
    complete(["a", "b"], shelf(kept), made.extend, ALONE)
    assert made == ["b"] and ALONE.gather(7) == [7]


def test_what_fails_in_one_is_not_swallowed() -> None:
    def make(mine: Sequence[str]) -> None:
        raise ValueError("not today")

    with pytest.raises(ValueError, match="not today"):
        complete(["a"], shelf({}), make, ALONE)
