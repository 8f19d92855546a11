"""Warm-up: how fast a run goes, from its first steps, done for real in a folder that is gone afterwards."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from scumble.models.heap import tight
from scumble.models.precision import find_device
from scumble.runs.build import build
from scumble.runs.config import RunConfig, is_tight
from scumble.training.events import Event, StepDone
from scumble.training.interrupt import Interrupt
from scumble.training.loop import train
from scumble.training.numerics import make_accelerator

if TYPE_CHECKING:
    from accelerate import Accelerator

STEPS = 3
"""Done at most. The first is slower than those that follow, and counts only where it is alone."""


@dataclass(frozen=True)
class Pace:
    """What the first steps took, in seconds."""

    loading: float
    """Reading and checking the base, opening the data."""
    encoding: float
    """One picture with its caption; 0 where there are none."""
    step: float
    """One optimizer step of one process."""
    steps: int
    """That were done."""
    phase: str
    """That they were done in."""
    facts: Mapping[str, object] = field(default_factory=dict)
    """What the plan says of itself."""


class _Watch:
    """Notes how long steps take, and asks the run to stop after some."""

    def __init__(self, wish: Interrupt, steps: int) -> None:
        self.wish, self._steps = wish, steps
        self.seconds: list[float] = []
        self.phase = ""

    def handle(self, event: Event) -> None:
        if isinstance(event, StepDone):
            self.seconds.append(event.seconds)
            self.phase = event.phase
            self.wish.asked = len(self.seconds) >= self._steps

    def close(self) -> None:
        """Nothing is open."""


def warm_up(config: RunConfig, steps: int = STEPS) -> Pace:
    """Do the first steps of a run, and leave nothing behind: what is encoded goes to memory, what is saved to a folder
    that is removed. Nothing is drawn, so that class pictures which are not there yet are left out.

    Raises:
        ScumbleError: as the run itself would.
    """
    quick = {"preview_every": 0, "held_out_every": 0, "checkpoint_every": 0, "log_every": 1}
    changes: dict[str, object] = {
        "train": config.train.model_copy(update=quick),
        "preview": config.preview.model_copy(update={"prompts": ()}),
    }
    if config.data is not None:
        changes["data"] = config.data.model_copy(update={"cache": None, "held_out": 0})
    config = config.model_copy(update=changes)
    accelerator = make_accelerator(config.train.precision, find_device(config.device))
    with tight(accelerator.device.type == "cpu" and is_tight(config)):
        return _timed(config, accelerator, steps)


def _timed(config: RunConfig, accelerator: Accelerator, steps: int) -> Pace:
    begun = time.perf_counter()
    built = build(config, device=accelerator.device)
    loaded = time.perf_counter()
    visits = min(steps, config.train.steps) * config.train.batch * config.train.accumulate
    for loader in built.loaders:
        loader.prepare(visits=visits)
    encoded = time.perf_counter()
    watch = _Watch(Interrupt(), steps)
    with tempfile.TemporaryDirectory(prefix="scumble-plan-") as folder:
        train(
            built.plan, Path(folder), built.train, [watch], built.streams, accelerator, interrupt=watch.wish
        )
    seconds = watch.seconds[1:] or watch.seconds
    shown = min(visits, sum(loader.samples for loader in built.loaders)) if built.loaders else 0
    return Pace(
        loading=loaded - begun,
        encoding=(encoded - loaded) / shown if shown else 0.0,
        step=statistics.median(seconds),
        steps=len(watch.seconds),
        phase=watch.phase,
        facts=built.plan.facts,
    )
