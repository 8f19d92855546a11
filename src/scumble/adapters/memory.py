"""Memory: tensors that lie side by side in it, taken as the one that they are; and room for such.

What hundreds of small tensors are asked one by one takes most of a load's time.
"""

from __future__ import annotations

import mmap
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_LARGE = 2**22
"""Bytes: two huge pages."""


def runs(tensors: Sequence[Tensor], whole: int = 1) -> list[tuple[Tensor, list[int]]]:
    """Tensors that lie side by side in one memory, as one flat tensor over it.

    Args:
        tensors: of any shapes, dtypes and devices, none of them empty.
        whole: a run goes on only after tensors of a multiple of this many numbers.

    Returns:
        (flat tensor, which of `tensors` lie in it, in its order) of each run; a tensor without neighbours is a run of
        its own.
    """
    found: list[list[int]] = []
    expected: tuple[object, ...] = ()
    """Where the next tensor of the run begins, in which storage and of which dtype."""
    for begin, index in sorted((tensor.data_ptr(), index) for index, tensor in enumerate(tensors)):
        tensor = tensors[index]
        dense, count, kind = tensor.is_contiguous(), tensor.numel(), tensor.dtype
        storage = tensor.untyped_storage().data_ptr()
        if dense and (begin, storage, kind) == expected:
            found[-1].append(index)
        else:
            found.append([index])
        expected = (begin + count * kind.itemsize, storage, kind) if dense and not count % whole else ()
    return [(_flat([tensors[index] for index in members]), members) for members in found]


def roomy(count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(count,) numbers that nobody set. Large ones lie in huge pages where Linux has them: the first touch of each
    small page costs more than copying what goes there."""
    import torch

    size = count * dtype.itemsize
    if device.type != "cpu" or size < _LARGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(count, dtype=dtype, device=device)
    room = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without them
        room.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(room, dtype=dtype, count=count)


def like(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Tensors of these shapes, dtypes and devices that nobody set, side by side in one memory for each kind, each at a
    multiple of 64 bytes."""
    made = list(tensors)
    for (dtype, device), members in _kinds(tensors).items():
        step = 64 // dtype.itemsize
        sizes = [-(-tensors[index].numel() // step) * step for index in members]
        pieces = roomy(sum(sizes), dtype, device).split(sizes)
        for index, piece in zip(members, pieces, strict=True):
            made[index] = piece[: tensors[index].numel()].view(tensors[index].shape)
    return made


def packed(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copies on the CPU, side by side in one memory for each dtype and device that they come from: contiguous, not
    aligned, without gradients."""
    import torch

    copies = list(tensors)
    for members in _kinds(tensors).values():
        flat = torch.cat([tensors[index].detach().reshape(-1) for index in members]).to("cpu")
        pieces = flat.split([tensors[index].numel() for index in members])
        for index, piece in zip(members, pieces, strict=True):
            copies[index] = piece.view(tensors[index].shape)
    return copies


def _kinds(tensors: Sequence[Tensor]) -> dict[tuple[torch.dtype, torch.device], list[int]]:
    """Which of them may lie in one memory."""
    kinds = defaultdict(list)
    for index, tensor in enumerate(tensors):
        kinds[tensor.dtype, tensor.device].append(index)
    return kinds


def _flat(neighbours: Sequence[Tensor]) -> Tensor:
    first = neighbours[0]
    if len(neighbours) == 1:
        return first.reshape(-1)
    return first.as_strided((sum(tensor.numel() for tensor in neighbours),), (1,))
