"""Tensors that lie side by side are found as the one that they are, and no others; and are made so."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import Tensor

from scumble.adapters.memory import like, packed, roomy, runs

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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64, torch.uint8])
def test_packed_copies_lie_in_one_memory_and_keep_shapes_and_numbers(dtype: torch.dtype) -> None:
    tensors = [torch.arange(n).reshape(shape).to(dtype) for n, shape in ((6, (2, 3)), (1, ()), (0, (0, 4)))]
    tensors.append(torch.arange(6.0).reshape(2, 3).t().to(dtype))  # in another order in memory
    tensors.append(torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16)))
    copies = packed(tensors)
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(copies, tensors, strict=True))
    assert all(copy.is_contiguous() and not copy.requires_grad for copy in copies)
    memories = [copy.untyped_storage().data_ptr() for copy in copies]
    assert len(set(memories[:-1])) == 1 and memories[-1] != memories[0]
    assert not set(memories) & {tensor.untyped_storage().data_ptr() for tensor in tensors}


@pytest.mark.parametrize("count", [10, 2**21])  # of the second, huge pages
def test_rooms_of_one_kind_are_apart_and_aligned(count: int) -> None:
    wanted = [
        torch.empty(count, 3),
        torch.empty(7),
        torch.empty(3, 5, dtype=torch.float16),
        torch.empty(2, 2),
    ]
    rooms = like(wanted)
    for number, room in enumerate(rooms):
        room.fill_(number)
    for number, (room, one) in enumerate(zip(rooms, wanted, strict=True)):
        assert room.shape == one.shape and room.dtype == one.dtype and room.data_ptr() % 64 == 0
        assert bool((room == number).all())
    assert rooms[0].untyped_storage().data_ptr() == rooms[1].untyped_storage().data_ptr()


def test_a_large_room_outlives_who_made_it() -> None:
    def piece() -> Tensor:
        return roomy(2**22, torch.float32, torch.device("cpu")).fill_(3.0)[-8:]

    kept = piece()
    gc.collect()
    assert torch.equal(kept, torch.full((8,), 3.0))
