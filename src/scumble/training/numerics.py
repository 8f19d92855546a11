"""Numerics: in which arithmetic a run computes, and on what device."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from scumble.models.precision import check_precision, dtype_named

if TYPE_CHECKING:
    from accelerate import Accelerator


def make_accelerator(precision: str, device: torch.device) -> Accelerator:
    """An Accelerator of this precision on this kind of device; joins the process group that `accelerate
    launch` made.

    Raises:
        PrecisionError: the device can't compute in that precision; names one that it can.
    """
    check_precision(dtype_named(precision), device)
    from accelerate import Accelerator, DistributedDataParallelKwargs
    from accelerate.state import AcceleratorState

    if AcceleratorState._shared_state and AcceleratorState().mixed_precision != precision:
        # Accelerate holds the precision once for the whole process; a second run may want another.
        # This forgets the precision only: the process group stays.
        AcceleratorState._reset_state()
    # Frozen buffers need no broadcast before each forward.
    options = DistributedDataParallelKwargs(broadcast_buffers=False)
    return Accelerator(
        mixed_precision=precision,
        cpu=device.type == "cpu",
        kwargs_handlers=[options],
        step_scheduler_with_optimizer=False,
    )


@contextmanager
def arithmetic(*, deterministic: bool, tf32: bool) -> Iterator[None]:
    """Inside, PyTorch computes as asked; outside, as before. The caller's generators come back untouched."""
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.backends.cudnn.benchmark,
        torch.backends.cuda.matmul.allow_tf32,
        torch.backends.cudnn.allow_tf32,
    )
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices):
        try:
            if deterministic:
                os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # or cuBLAS refuses
                torch.use_deterministic_algorithms(True)
                torch.backends.cudnn.benchmark = False
            if tf32:
                torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
            yield
        finally:
            torch.use_deterministic_algorithms(before[0])
            torch.backends.cudnn.benchmark = before[1]
            torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before[2:]
