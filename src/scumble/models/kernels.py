"""Kernels: what a base is held in, read by bitsandbytes where that is installed, bit for bit as torch reads it.

On a CPU it reads nf4 seven times as fast as torch and fp8 up to twice; int8 it does not (benchmarks/NOTES.md, 24),
so that stays torch's. Each kernel is tried once for each kind of device and dtype: if one number comes out otherwise,
torch goes on reading.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import lru_cache
from typing import Protocol, TypeAlias

import torch
from torch import Tensor


class Code(Protocol):
    """What is asked of a code (`codes.py`)."""

    @property
    def name(self) -> str: ...

    @property
    def bits(self) -> int: ...

    def read(self, codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor: ...


Kernel: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""(codes, scales fp32 (n,)) -> all their numbers, flat."""

_BLOCKS = 33
"""Of the trial: more than a kernel's vector, and no multiple of it."""


@lru_cache
def kernel(code: Code, device: str, dtype: torch.dtype, block: int) -> Kernel | None:
    """What reads `code` on such a device faster than `Code.read`, and gives the same bits; None where nothing does.

    Args:
        code: how the numbers are kept.
        device: "cpu", "cuda", ...
        dtype: of the numbers that are wanted.
        block: numbers that share a scale.
    """
    if code.name not in _MADE or not installed():
        return None
    found = _MADE[code.name](code, dtype, block)
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(256, (_BLOCKS, block * code.bits // 8), generator=generator, dtype=torch.uint8)
    if code.name == "fp8":
        codes[codes & 0x7F == 0x7F] = 0  # NaN, which no weight is
    scales = torch.rand(_BLOCKS, generator=generator).bfloat16().float()
    codes, scales = codes.to(device), scales.to(device)
    try:
        same = torch.equal(found(codes, scales), code.read(codes, scales[:, None], dtype).view(-1))
    except (RuntimeError, NotImplementedError):  # a device that it was not built for
        return None
    return found if same else None


@lru_cache
def installed() -> bool:
    """Whether bitsandbytes can be imported, and has the operations."""
    log = logging.getLogger("bitsandbytes")  # it remarks on further kernels that are not asked for here
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        import bitsandbytes

        ours = torch.ops.bitsandbytes
        return bool(bitsandbytes.__version__ and ours.dequantize_4bit and ours.dequantize_blockwise)
    except (ImportError, AttributeError, RuntimeError, OSError):
        return False
    finally:
        log.setLevel(level)


def _nf4(code: Code, dtype: torch.dtype, block: int) -> Kernel:
    def read(codes: Tensor, scales: Tensor) -> Tensor:
        shape = [1, 2 * codes.numel()]
        found: Tensor = torch.ops.bitsandbytes.dequantize_4bit(
            codes.view(-1, 1), scales, block, "nf4", shape, dtype
        )
        return found.view(-1)

    return read


def _fp8(code: Code, dtype: torch.dtype, block: int) -> Kernel:
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    tables: dict[torch.device, Tensor] = {}

    def read(codes: Tensor, scales: Tensor) -> Tensor:
        if codes.device not in tables:
            tables[codes.device] = every.to(codes.device)
        found: Tensor = torch.ops.bitsandbytes.dequantize_blockwise(
            codes.view(-1), scales, tables[codes.device], block, dtype
        )
        return found

    return read


_MADE: dict[str, Callable[[Code, torch.dtype, int], Kernel]] = {"nf4": _nf4, "fp8": _fp8}
