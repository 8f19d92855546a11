"""Epochs in optimizer steps, and back, as trainers count them."""

from __future__ import annotations

import math


def batches_per_epoch(pictures: int, batch: int, processes: int = 1) -> int:
    """Micro-batches that one process sees while all pictures are shown once; the last one may be smaller."""
    return max(1, math.ceil(math.ceil(pictures / batch) / processes))


def steps_per_epoch(pictures: int, batch: int, accumulate: int = 1, processes: int = 1) -> int:
    """Optimizer steps while all pictures are shown once; an epoch's last step may see fewer."""
    return max(1, math.ceil(batches_per_epoch(pictures, batch, processes) / accumulate))


def steps_for_epochs(
    epochs: float, pictures: int, batch: int, accumulate: int = 1, processes: int = 1
) -> int:
    """Optimizer steps of `epochs` times all pictures, at least 1."""
    return max(1, math.ceil(epochs * steps_per_epoch(pictures, batch, accumulate, processes)))


def epochs_of(steps: int, pictures: int, batch: int, accumulate: int = 1, processes: int = 1) -> float:
    """How often each picture is shown in `steps` optimizer steps."""
    return steps * batch * accumulate * processes / max(1, pictures)
