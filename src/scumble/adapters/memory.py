"""Memory: tensors that lie side by side in it, taken as the one that they are.

What hundreds of small tensors are asked one by one takes most of a load's time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


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


def _flat(neighbours: Sequence[Tensor]) -> Tensor:
    first = neighbours[0]
    if len(neighbours) == 1:
        return first.reshape(-1)
    return first.as_strided((sum(tensor.numel() for tensor in neighbours),), (1,))
