"""A training run as a process of its own, so that tests can kill it, or start several.

python child.py RUN '{"train": {...}, "targets": ..., "dropout": 0.2, "die_after_step": 7, "die_in_save": [10,
"manifest"]}'
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from scumble.adapters.lora import LoraSettings
from scumble.errors import DataError
from scumble.rng import Streams
from scumble.training import state as checkpoints
from scumble.training.events import Event, StepDone
from scumble.training.loop import train
from scumble.training.plan import Plan
from scumble.training.proofs import digest
from scumble.training.settings import TrainSettings
from tests.training.world import Listener, make_plan


def die() -> None:
    """As `kill -9` does: nothing is flushed, no handler runs."""
    os.kill(os.getpid(), signal.SIGKILL)


class Fatal(Listener):
    """Kills or interrupts the process at a step, before anything that follows the step."""

    def __init__(self, kill: int | None, interrupt: int | None) -> None:
        super().__init__()
        self.kill, self.interrupt = kill, interrupt

    def handle(self, event: Event) -> None:
        super().handle(event)
        if isinstance(event, StepDone) and event.step == self.kill:
            die()
        if isinstance(event, StepDone) and event.step == self.interrupt:
            os.kill(os.getpid(), signal.SIGTERM)


def die_in_save(step: int, moment: str) -> None:
    """Kill the process in the middle of saving the checkpoint of `step`."""
    if moment == "half an adapter":
        import scumble.formats as formats

        write = formats.write

        def half(state: Any, path: Path, *rest: Any, **options: Any) -> Path:
            if f"{step:06d}" in str(path.parent.name):
                write(state, path, *rest, **options)
                path.write_bytes(path.read_bytes()[:1000])
                die()
            return write(state, path, *rest, **options)

        formats.write = half
        return
    name = {"manifest": "_write_json", "rename": "put_in_place"}[moment]
    real = getattr(checkpoints, name)

    def fatal(path: Path, *rest: Any) -> None:
        if f"{step:06d}" in str(path) and (moment == "rename" or path.name == checkpoints.MANIFEST):
            die()
        real(path, *rest)

    setattr(checkpoints, name, fatal)


def main(run: Path, wanted: dict[str, Any]) -> None:
    """One run, or one after the other where `wanted` has several "cases" by name."""
    torch.set_num_threads(1)
    for name, case in wanted.get("cases", {"": wanted}).items():
        one(run / name, case)


def failing(plan: Plan, run: Path, rank: int, step: int, how: str) -> Plan:
    """`plan`, in which process `rank` is killed, stopped or raises an error after `step`."""
    count = itertools.count(1)

    def after_step() -> None:
        if next(count) != step or os.environ.get("RANK", "0") != str(rank):
            return
        (run / "failed.json").write_text(json.dumps({"time": time.time(), "pid": os.getpid()}))
        if how == "error":
            raise DataError("fox.png: it is not there any more.")
        os.kill(os.getpid(), {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}[how])

    first, *rest = plan.phases
    return replace(plan, phases=(replace(first, after_step=after_step), *rest))


def one(run: Path, wanted: dict[str, Any]) -> None:
    settings = TrainSettings.model_validate(wanted["train"])
    if "seed_by_rank" in wanted:
        settings = settings.model_copy(update={"seed": int(os.environ.get("RANK", "0"))})
    targets = wanted.get("targets", "attention")
    adapter = LoraSettings(rank=2, dropout=wanted.get("dropout", 0.0))
    plan, _ = make_plan(
        settings,
        samples=7,
        targets=targets if isinstance(targets, str) else tuple(targets),
        adapter=adapter,
        held_out=True,
        poison={int(k): float(v) for k, v in wanted.get("poison", {}).items()},
        masks=wanted.get("masks", False),
        method=wanted.get("method", "text-to-image"),
        options=wanted.get("options"),
    )
    if "fail" in wanted:
        plan = failing(plan, run, *wanted["fail"])
    if "die_in_save" in wanted:
        die_in_save(*wanted["die_in_save"])
    listener = Fatal(wanted.get("die_after_step"), wanted.get("interrupt_after_step"))
    result = train(plan, run, settings, [listener], Streams(settings.seed), resume=wanted.get("resume"))
    steps = listener.all(StepDone)
    facts = {
        "steps": [event.step for event in steps],
        "losses": [event.loss for event in steps],
        "rates": [event.learning_rates for event in steps],
        "samples": [event.samples for event in steps],
        "reason": result.reason,
        "step": result.step,
        "difference": result.difference,
        "world": int(os.environ.get("WORLD_SIZE", "1")),
        "weights": [digest(p) for t in plan.phases[0].trainables for p in t.parameters.values()],
    }
    rank = os.environ.get("RANK", "0")
    (run / f"facts-{rank}.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
