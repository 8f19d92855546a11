"""Rescue: what a run that runs out of memory keeps, and what it says.

A step that fails before the optimizer moves anything leaves the run as the last whole step left it: that is saved, and
going on from there gives what an uninterrupted run gives. What is said names the place, the shape, what was asked for,
and the settings that need less and are not set already, the cheapest first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol, TypeAlias

from scumble.errors import OutOfMemory
from scumble.models.shortage import ERRORS, Shortage, pass_of, recover, shortage_of
from scumble.training.settings import TrainSettings

if TYPE_CHECKING:
    from scumble.data.record import Batch


class Attempt:
    """A step that is tried."""

    def __init__(self) -> None:
        self.batches: Sequence[Batch] = ()
        """What it learns from, once that is known."""
        self.place = ""
        """Where it is, once that is behind the gradients; empty: in the forward or the backward pass."""
        self.moving = False
        """Whether weights or the optimizer's state may be half changed."""


Rescue: TypeAlias = Callable[[], str]
"""Writes the checkpoint of the last whole step, where there is none; a sentence on it."""


class Saves(Protocol):
    """Who holds the run (see `Keeper`)."""

    @property
    def step(self) -> int:
        """The last whole step."""

    @property
    def settings(self) -> TrainSettings:
        """The run's."""

    def last_good(self) -> str:
        """A sentence that names the last good file."""


@contextmanager
def rescuing(keeper: Saves, phase: str, save: Rescue) -> Iterator[Attempt]:
    """Around a step and what is done after it. `save` writes the checkpoint of the last whole step, and gives a
    sentence on it.

    Raises:
        OutOfMemory: memory ran out; as much as could be kept is.
    """
    attempt, number = Attempt(), keeper.step + 1
    try:
        yield attempt
    except OutOfMemory as error:  # what is to be said of it is said
        if keeper.step == number:  # it was while saving
            raise
        recover(error)
        raise OutOfMemory(f"{error} {_kept(keeper, attempt, save)}") from error
    except ERRORS as error:
        lack = shortage_of(error)
        if lack is None:
            raise
        place = attempt.place or pass_of(error)
        batches, attempt.batches = shapes(attempt.batches, keeper.settings), ()
        recover(error)
        kept = _kept(keeper, attempt, save)
        raise OutOfMemory(
            f"Out of {lack.memory} in the {place} of step {number} (phase {phase!r}){batches}. {lack} {kept} "
            f"{needs_less(keeper.settings, lack)}"
        ) from error


def _kept(keeper: Saves, attempt: Attempt, save: Rescue) -> str:
    if attempt.moving:
        return f"The step had begun to move the weights, so that they are not kept. {keeper.last_good()}"
    try:
        return save()
    except (OutOfMemory, *ERRORS) as error:
        if not isinstance(error, OutOfMemory) and shortage_of(error) is None:
            raise
        return f"Not even the last whole step, {keeper.step}, could be saved for want of memory. {keeper.last_good()}"


def shapes(batches: Sequence[Batch], settings: TrainSettings) -> str:
    """ ", with 4 pictures of 512x768 pixels (latents 4x4x96x64) at once in bf16": of the largest batch; empty where
    there is none yet."""
    if not batches:
        return ""
    largest = max(batches, key=lambda batch: batch.latents.numel())
    height, width = largest.frame.target[0].tolist()
    latents = "x".join(map(str, largest.latents.shape))
    count = "1 picture" if len(largest) == 1 else f"{len(largest)} pictures"
    precision = "fp32" if settings.precision == "no" else settings.precision
    return f", with {count} of {width}x{height} pixels (latents {latents}) at once in {precision}"


def needs_less(settings: TrainSettings, lack: Shortage) -> str:
    """What to change so that a step needs less memory, the cheapest first; only what is not set already."""
    found = []
    if settings.gradient_checkpointing is not True:
        found.append(
            "train.gradient_checkpointing = true (about half the memory of a step, 1.4 times its time)"
        )
    if settings.batch > 1:
        parts = next(n for n in range(2, settings.batch + 1) if settings.batch % n == 0)
        found.append(
            f"train.batch = {settings.batch // parts} with train.accumulate = {settings.accumulate * parts} (each step "
            "still sees as many pictures)"
        )
    if settings.quantization == "none":
        found.append('train.quantization = "int8" (the frozen base in about 1 byte a weight)')
    if settings.offload == "none" and lack.gpu:
        engine = ', with engine = "eager"' if settings.engine != "eager" else ""
        found.append(f'train.offload = "blocks" (the base waits in host memory{engine})')
    if settings.precision == "no":
        found.append('train.precision = "bf16" (half the bytes)')
    found.append("a smaller data.resolution")
    listed = "; ".join(f"({number}) {each}" for number, each in enumerate(found, 1))
    return (
        f"What needs less, the cheapest first: {listed}. Then go on with --resume latest; where the change is one of "
        "numbers, as with quantization and precision, with --accept-changes."
    )
