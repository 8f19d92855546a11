"""Numerics: in which arithmetic a run computes, and on what device."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from scumble.models.precision import check_precision, dtype_named
from scumble.training.processes import PATIENCE

if TYPE_CHECKING:
    from accelerate import Accelerator


def make_accelerator(precision: str, device: torch.device) -> Accelerator:
    """An Accelerator of this precision on this kind of device; joins the process group that `accelerate
    launch` made.

    Raises:
        PrecisionError: the device can't compute in that precision; names one that it can.
    """
    check_precision(dtype_named(precision), device)
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import InitProcessGroupKwargs

    if AcceleratorState._shared_state and AcceleratorState().mixed_precision != precision:
        # Accelerate holds the precision once for the whole process; a second run may want another.
        # This forgets the precision only: the process group stays.
        AcceleratorState._reset_state()
    return Accelerator(
        mixed_precision=precision,
        cpu=device.type == "cpu",
        kwargs_handlers=[_frozen_buffers(), InitProcessGroupKwargs(timeout=PATIENCE)],
        step_scheduler_with_optimizer=False,
    )


def _frozen_buffers() -> Any:
    """Options of DistributedDataParallel: frozen buffers need no broadcast before each forward."""
    from accelerate import DistributedDataParallelKwargs
    from torch.nn.parallel import DistributedDataParallel

    name = "forward_sync_buffers"
    if name not in inspect.signature(DistributedDataParallel).parameters:  # torch before 2.13
        return DistributedDataParallelKwargs(broadcast_buffers=False)

    options = DistributedDataParallelKwargs()
    # Accelerate hands on only what it knows, and takes no subclass; the old name of the option warns
    options.to_kwargs = lambda: {name: False}
    return options


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
