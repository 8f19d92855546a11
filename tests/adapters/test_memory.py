"""Tensors that lie side by side are found as the one that they are, and no others."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from scumble.adapters.memory import runs

BLOCK = torch.arange(200.0)


def found(tensors: list[Tensor], whole: int = 1) -> list[list[int]]:
    """Who lies with whom; every run holds the numbers of its members, in their order."""
    told = runs(tensors, whole)
    for flat, members in told:
        assert torch.equal(flat, torch.cat([tensors[index].reshape(-1) for index in members]))
        assert all(flat.dtype == tensors[index].dtype for index in members)
    assert sorted(index for _, members in told for index in members) == [*range(len(tensors))]
    return [members for _, members in told]


def test_neighbours_are_one_in_the_order_of_their_places() -> None:
    tensors = [BLOCK[32:64].view(4, 8), BLOCK[:32].view(32, 1), BLOCK[64:70]]
    ((flat, members),) = runs(tensors)
    assert members == [1, 0, 2]
    assert flat.data_ptr() == BLOCK.data_ptr()  # no copy
    assert found(tensors) == [members]


@pytest.mark.parametrize(
    ("second", "why"),
    [
        (BLOCK[33:64], "a gap"),
        (BLOCK[:32], "the same place"),
        (BLOCK[16:48], "an overlap"),
        (BLOCK[32:64].view(torch.int32), "another dtype"),
        (BLOCK[32:64].view(4, 8).t(), "another order"),
        (BLOCK[32:64].clone(), "another memory"),
    ],
)
def test_others_stay_apart(second: Tensor, why: str) -> None:
    assert len(found([BLOCK[:32], second])) == 2, why


def test_a_run_ends_where_the_next_tensor_would_begin_in_between() -> None:
    tensors = [BLOCK[:32], BLOCK[32:36], BLOCK[36:52]]
    assert len(found(tensors)) == 1
    assert found(tensors, whole=16) == [[0, 1], [2]]


def test_two_memories_that_happen_to_touch_are_two() -> None:
    numbers = bytearray(64)
    first = torch.frombuffer(numbers, dtype=torch.float32, count=8)
    second = torch.frombuffer(numbers, dtype=torch.float32, count=8, offset=32)
    assert second.data_ptr() == first.data_ptr() + 32
    assert len(found([first, second])) == 2


def test_none_is_none() -> None:
    assert runs([]) == []
