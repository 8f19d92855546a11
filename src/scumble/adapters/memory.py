"""Memory: one large block for many tensors, which the system hands out in large pages where it has them.

A load asks for as much memory as its file is long, twice. In pages of 4 KiB the system clears and maps thousands of
them one by one, and that took half of a load's time.
"""

from __future__ import annotations

import mmap

import torch
from torch import Tensor

LARGE = 2 * 2**20
"""Bytes of a large page on x86 and most of ARM; smaller blocks come from the ordinary allocator."""


def block(size: int) -> Tensor:
    """(size,) uint8 on the CPU, of no particular values. It is given back when its last view is gone."""
    if size < LARGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(size, dtype=torch.uint8, device="cpu")
    # from one boundary of large pages to another: what lies before and after in the reserve is never touched
    reserve = -(-size // LARGE) * LARGE + LARGE
    pages = mmap.mmap(-1, reserve, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    pages.madvise(mmap.MADV_HUGEPAGE)
    memory = torch.frombuffer(pages, dtype=torch.uint8)
    begin = -memory.data_ptr() % LARGE
    return memory[begin : begin + size]
