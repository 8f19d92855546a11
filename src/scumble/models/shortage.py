"""Shortage: what is known of memory that was asked for and not there, on a GPU or on the host.

torch, its libraries and Python each say it with an error of their own. Whoever can do with less tries again; whoever
can't says what to change.
"""

from __future__ import annotations

import re
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from scumble.errors import OutOfMemory
from scumble.models.heap import give_back

ERRORS = (RuntimeError, MemoryError)
"""What errors of memory are instances of; other things are too."""

_GPU = re.compile(r"(CUDA|HIP|MPS backend|XPU|CUDNN|CUBLAS|NCCL)", re.IGNORECASE)
_SIGNS = (
    "out of memory",
    "can't allocate memory",  # torch's allocator on the host
    "not enough memory",  # the same on Windows
    "cannot allocate memory",
    "unable to allocate",  # numpy
    "alloc_failed",  # cuBLAS, cuDNN
)
_ASKED = re.compile(r"allocate (\d+(?:\.\d+)?) ?(bytes|[KMGT]i?B)", re.IGNORECASE)
_FREE = re.compile(r"(\d+(?:\.\d+)? [KMGT]i?B) is free")
_WHOLE = re.compile(r"total capacity of (\d+(?:\.\d+)? [KMGT]i?B)")


@dataclass(frozen=True)
class Shortage:
    """An allocation that failed."""

    gpu: bool
    asked: str
    """How much was asked for, e.g. "2.00 GiB"; empty where that isn't said."""
    free: str
    """How much was there, e.g. "1.20 of 23.64 GiB"; empty where that isn't said."""

    @property
    def memory(self) -> str:
        """What there was too little of."""
        return "GPU memory" if self.gpu else "memory"

    def __str__(self) -> str:
        said = f"{self.asked} more were asked for" if self.asked else ""
        if self.free:
            said += f"{', and ' if said else ''}{self.free} were free"
        return f"{said[:1].upper()}{said[1:]}." if said else "How much was asked for is not said."


def shortage_of(error: BaseException) -> Shortage | None:
    """What `error` says of memory; None where it is about something else."""
    if not isinstance(error, ERRORS):
        return None
    text = str(error)
    gpu = isinstance(error, torch.cuda.OutOfMemoryError) or bool(_GPU.search(text))
    known = isinstance(error, MemoryError | torch.cuda.OutOfMemoryError)
    if not known and not any(sign in text.lower() for sign in _SIGNS):
        return None
    asked, free, whole = _ASKED.search(text), _FREE.search(text), _WHOLE.search(text)
    return Shortage(
        gpu,
        "" if asked is None else _spelled(float(asked[1]), asked[2]),
        "" if free is None else free[1] + (f" of {whole[1]}" if whole else ""),
    )


def recover(error: BaseException) -> None:
    """Give back what the failed work held: the frames that `error` passed through, garbage, and the allocators' own
    stores."""
    if error.__traceback__ is not None:
        traceback.clear_frames(error.__traceback__)
    give_back()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def pass_of(error: BaseException) -> str:
    """Where in a step `error` came from: "backward pass" or "forward pass"."""
    frames = traceback.extract_tb(error.__traceback__)
    files = (frame.filename.replace("\\", "/") for frame in frames)
    return "backward pass" if any("torch/autograd/" in file for file in files) else "forward pass"


@contextmanager
def telling(what: str, advice: str | Callable[[], str]) -> Iterator[None]:
    """An error of memory inside becomes one that says `what` was done, as the end of "Out of memory while ...", and
    what to do.

    Raises:
        OutOfMemory: there was too little.
    """
    try:
        yield
    except ERRORS as error:
        lack = shortage_of(error)
        if lack is None:
            raise
        recover(error)
        said = advice if isinstance(advice, str) else advice()
        raise OutOfMemory(f"Out of {lack.memory} while {what}. {lack} {said}") from error
    except OutOfMemory as error:  # what was done is said already
        recover(error)
        raise OutOfMemory(f"{error} {advice if isinstance(advice, str) else advice()}") from error


def _spelled(number: float, unit: str) -> str:
    if unit.lower() != "bytes":
        return f"{number:g} {unit}"
    for power, name in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if number >= 2**power:
            return f"{number / 2**power:.2f} {name}"
    return f"{number:.0f} bytes"
