"""Blocks of memory: as long as asked for, written and read like any tensor, and given back."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch

from scumble.adapters.memory import LARGE, block


@pytest.mark.parametrize("size", [0, 1, 100, LARGE - 1, LARGE, 3 * LARGE + 17])
def test_a_block_holds_what_is_written(size: int) -> None:
    memory = block(size)
    assert memory.shape == (size,) and memory.dtype == torch.uint8 and memory.device.type == "cpu"
    numbers = (torch.arange(size) % 251).to(torch.uint8)
    memory.copy_(numbers)
    assert torch.equal(memory, numbers)
    whole = memory[: size // 4 * 4]
    if len(whole):
        assert whole.view(torch.float32).data_ptr() == memory.data_ptr()


def resident() -> int:
    """Bytes of this process in memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmRSS"))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells")
def test_a_block_stays_while_a_view_is_there_and_goes_with_the_last() -> None:
    size = 32 * LARGE
    before = resident()
    view = block(size).fill_(1)[10:20]
    assert resident() - before > size // 2
    assert view.tolist() == [1] * 10
    del view
    gc.collect()
    assert resident() - before < size // 2
