from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scumble.data.order import Order

GROUPS = {"wide": range(0, 7), "tall": range(7, 10), "square": [10, 10, 11, 12]}


def flat(order: Order, batches: int) -> list[tuple[int, int]]:
    return [(v.position, v.entry) for n in range(batches) for v in order.batch(n)[1]]


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 8), st.integers(0, 2**31))
def test_one_group_is_the_same_at_any_batch_size(size: int, one: int, other: int, seed: int) -> None:
    first, second = (flat(Order({"a": range(size)}, batch, seed), 12) for batch in (one, other))
    shared = min(len(first), len(second))
    assert first[:shared] == second[:shared]
    assert [position for position, _ in first] == list(range(len(first)))


@given(st.integers(1, 8), st.integers(0, 2**31))
def test_each_epoch_shows_each_picture_once(size: int, seed: int) -> None:
    entries = [entry for _, entry in flat(Order({"a": range(size)}, 1, seed), 5 * size)]
    for epoch in range(5):
        assert sorted(entries[epoch * size : (epoch + 1) * size]) == list(range(size))


def test_epochs_are_in_different_orders() -> None:
    entries = [entry for _, entry in flat(Order({"a": range(20)}, 1, 0), 60)]
    assert len({tuple(entries[start : start + 20]) for start in (0, 20, 40)}) == 3
    assert entries != [entry for _, entry in flat(Order({"a": range(20)}, 1, 1), 60)]


@pytest.mark.parametrize("batch_size", [1, 4])
def test_groups_take_turns_in_proportion(batch_size: int) -> None:
    order = Order(GROUPS, batch_size, seed=3)
    seen: Counter[int] = Counter()
    turns: Counter[str] = Counter()
    for number in range(3 * 14):
        group, visits = order.batch(number)
        turns[group] += 1
        seen.update(visit.entry for visit in visits)
        assert {visit.entry for visit in visits} <= set(GROUPS[group])
        assert [visit.position for visit in visits] == list(
            range(number * batch_size, (number + 1) * batch_size)
        )
        for name, entries in GROUPS.items():  # never far from its share
            assert abs(turns[name] - (number + 1) * len(entries) / 14) <= 1
    assert turns == {"wide": 21, "tall": 9, "square": 12}
    assert set(seen.values()) == {3 * batch_size, 6 * batch_size} and seen[10] == 6 * batch_size


@given(st.integers(0, 10**9))
def test_any_batch_is_reached_at_once(number: int) -> None:
    order = Order(GROUPS, 2, seed=3)
    group, visits = order.batch(number)
    assert (group, visits) == Order(GROUPS, 2, seed=3).batch(number)
    assert visits[0].position == 2 * number


def test_equal_groups_have_a_short_round() -> None:
    order = Order({index: range(100 * index, 100 * index + 100) for index in range(4)}, 1, 0)
    assert len(order._turns) == 4
