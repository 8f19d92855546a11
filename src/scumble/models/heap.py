"""Heap: memory that was freed, given back to the system; and how much is free there.

glibc keeps freed memory for the next request. Between the stages of a run, whose tensors differ in size, that is
memory that nobody uses: after a base is loaded, before a second one is. And where a few small tensors stay among many
that go, as with gradient checkpointing, what lies between them is too small for the next: a step then takes twice what
its tensors do. `tight` has each larger tensor mapped by itself, so that it is gone when it is freed; that takes time.
"""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

M_MMAP_THRESHOLD = -3
"""glibc's name of the size from which a request is mapped by itself (malloc.h)."""
MAPPED = 256 * 2**10
"""That size while memory is scarce."""
LARGEST = 32 * 2**20
"""What glibc raises it to by itself, at most."""
CGROUP = Path("/sys/fs/cgroup")
"""Where Linux says what a container may take (version 2)."""


def give_back() -> None:
    """Collect garbage, and have the C library return what is free. Elsewhere than on glibc, only the former."""
    gc.collect()
    library = _glibc()
    if library is not None:
        library.malloc_trim(0)


@contextmanager
def tight(on: bool) -> Iterator[None]:
    """Inside, if `on`, what is `MAPPED` bytes or larger is given back as soon as it is freed. Afterwards as glibc does
    it when it has seen large tensors. Elsewhere than on glibc it changes nothing."""
    library = _glibc() if on else None
    if library is not None:
        library.mallopt(M_MMAP_THRESHOLD, MAPPED)
    try:
        yield
    finally:
        if library is not None:
            library.mallopt(M_MMAP_THRESHOLD, LARGEST)


def free_memory() -> int:
    """Bytes of main memory that are free, or can be made so; within a container, at most what its limit leaves."""
    import psutil

    free: int = psutil.virtual_memory().available
    try:
        limit, used = ((CGROUP / name).read_text().strip() for name in ("memory.max", "memory.current"))
    except OSError:
        return free
    return free if limit == "max" else min(free, max(0, int(limit) - int(used)))


@cache
def _glibc() -> Any:
    if not sys.platform.startswith("linux"):
        return None
    library = ctypes.CDLL(None)
    return library if hasattr(library, "malloc_trim") and hasattr(library, "mallopt") else None
