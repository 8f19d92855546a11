"""The garbage collector, out of the way of what makes many objects and no garbage."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

_starting = False


@contextmanager
def start_up(alone: bool = True) -> Iterator[None]:
    """Without it until `started`, for a process that is nobody else's: importing torch, diffusers and transformers
    makes a million objects, and none of them ever goes. Not `alone`, nothing happens."""
    global _starting
    if not alone:
        yield
        return
    gc.disable()
    _starting = True
    try:
        yield
    finally:
        if _starting:
            _starting = False
            gc.enable()


def started() -> None:
    """The libraries are there, and the first model is not: what is there now is never looked through again. Nothing
    happens outside of `start_up`."""
    global _starting
    if _starting:
        _starting = False
        gc.freeze()
        gc.enable()


def ending() -> None:
    """Give back what `started` set aside, so that the interpreter takes everything apart at its end, in its order. It
    looks through all of it once more for that, which takes a second: for processes that hold others' threads."""
    gc.unfreeze()


@contextmanager
def no_collection() -> Iterator[None]:
    """Without the garbage collector, which making thousands of small objects sets off, as imports and loading do: it
    then looks through all that the process holds, a tenth of a second and more with torch and its friends, and finds
    nothing to take away. As a decorator too."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()
