"""THE loop: the only place where weights are trained. It knows steps, gradients and time, and nothing of
pictures."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from scumble.errors import ConfigError
from scumble.models.shortage import telling
from scumble.rng import Streams
from scumble.training.engine import Driver, Engine, Work
from scumble.training.events import Finished, Noted, Sink, Started
from scumble.training.interrupt import Interrupt
from scumble.training.keeper import Keeper, Previewer
from scumble.training.meter import Measured, Meter
from scumble.training.numerics import arithmetic, make_accelerator
from scumble.training.optimizers import build_optimizer
from scumble.training.plan import Phase, Plan, Stretch, Trainable, nothing
from scumble.training.processes import Processes
from scumble.training.proofs import GradientWatch, check_processes_agree, check_same_run
from scumble.training.rescue import rescuing
from scumble.training.schedules import factor
from scumble.training.settings import TrainSettings
from scumble.training.sinks.fanout import Fanout
from scumble.training.state import ADAPTER, Layout

if TYPE_CHECKING:
    from accelerate import Accelerator

    from scumble.data.record import Batch


@dataclass(frozen=True)
class TrainResult:
    """How a run ended."""

    step: int
    """The last optimizer step."""
    adapter: Path | None
    """The finished adapter; when interrupted, that of the checkpoint; None when not even a step was done, and
    on processes that are not the main one."""
    reason: str
    """"complete" or "interrupted"."""
    seconds: float
    best: Path | None = None
    """The adapter with the lowest held-out loss, where that was measured."""
    difference: float | None = None
    """Largest difference between the output of the file in a fresh base and that of the live model."""

    @property
    def exit_code(self) -> int:
        """0, or 130 when interrupted (128 + SIGINT, as shells have it)."""
        return 0 if self.reason == "complete" else 130


def train(
    plan: Plan,
    run: Path,
    settings: TrainSettings,
    sinks: Sequence[Sink] | Fanout,
    streams: Streams,
    accelerator: Accelerator | None = None,
    *,
    previewer: Previewer | None = None,
    resume: Path | str | None = None,
    accept_changes: bool = False,
    layout: Layout | None = None,
    interrupt: Interrupt | None = None,
    processes: Processes | None = None,
) -> TrainResult:
    """Run every phase of `plan`, keep what is learned in the folder `run`, and tell `sinks` what happens.

    Law: the same plan gives the same adapter, bit for bit on the CPU, however often it is killed and resumed.

    `resume`: None, "latest", or a checkpoint. `accept_changes`: go on though settings differ from the
    checkpoint's.
    `interrupt`: for callers outside the main thread, who set its `asked` to stop the run.
    `processes`: those of the run, where the caller watches over them already.

    Raises:
        ConfigError: the optimizer's package is missing, or `accelerator` has another precision.
        PrecisionError: the device can't compute in `settings.precision`.
        ResumeError: the checkpoint does not belong to this run (differences listed), or is damaged.
        Diverged: too many steps in a row were not finite; the last good file is named.
        NothingTrained: a tensor got no gradient, or never changed.
        NoEffect, TrainingError: the saved file read back does not act like the trained model.
        OutOfMemory: memory ran out; the last whole step is kept, and what needs less is named.
        ProcessLost: another process of the run is gone, or ended in an error.
    """
    begun, layout = time.perf_counter(), layout or Layout()
    device = next(iter(plan.phases[0].trainables[0].parameters.values())).device
    accelerator = accelerator or make_accelerator(settings.precision, device)
    if accelerator.mixed_precision != settings.precision:
        raise ConfigError(
            f'precision is "{settings.precision}" in the settings and "{accelerator.mixed_precision}" in the '
            "given Accelerator. Give both the same."
        )
    for phase in plan.phases[1:]:
        _optimizer(phase)  # what it refuses is told before the first phase's steps, and not after them
    fanout = sinks if isinstance(sinks, Fanout) else Fanout(sinks)
    tell = fanout.handle if accelerator.is_main_process else _silent
    keeper: Keeper | None = None
    watched = (
        Processes(accelerator, settings.process_timeout) if processes is None else nullcontext(processes)
    )
    with watched as processes:
        try:
            if accelerator.is_main_process:
                run.mkdir(parents=True, exist_ok=True)
            keeper = Keeper(plan, run, settings, tell, streams, accelerator, previewer, layout, processes)
            check_same_run(keeper.identity, processes)
            keeper.resume(resume, accept_changes)
            tell(Started(run, keeper.total, keeper.step, plan.facts, settings.model_dump(mode="json")))
            keeper.tell_notes()
            adapter, difference = None, None
            with (
                arithmetic(deterministic=settings.deterministic, tf32=settings.tf32),
                interrupt or Interrupt() as wish,
            ):
                ends = list(itertools.accumulate(phase.steps for phase in plan.phases))
                complete = all(
                    keeper.step >= end or _train_phase(phase, end - phase.steps, keeper, wish)
                    for phase, end in zip(plan.phases, ends, strict=True)
                )
                if complete and accelerator.is_main_process:
                    with telling("the finished adapter was proven", keeper.finished_so_far):
                        adapter, difference = keeper.finish()
            if not complete and keeper.last_saved is not None:
                adapter = keeper.last_saved / ADAPTER
            reason, seconds = "complete" if complete else "interrupted", time.perf_counter() - begun
            tell(Finished(keeper.step, seconds, adapter, reason))
            return TrainResult(keeper.step, adapter, reason, seconds, keeper.best_path, difference)
        except BaseException as error:
            step, cause = keeper.step if keeper is not None else 0, processes.explained(error)
            tell(Finished(step, time.perf_counter() - begun, None, f"{type(cause).__name__}: {cause}"))
            if cause is not error:
                raise cause from error
            raise
        finally:
            fanout.close()


def _optimizer(phase: Phase) -> Optimizer:
    groups = [
        {"params": list(t.parameters.values()), "lr": _peak(t, phase), "name": t.name}
        for t in phase.trainables
    ]
    return build_optimizer(phase.optimizer, groups)


def _peak(trainable: Trainable, phase: Phase) -> float:
    """The learning rate at its schedule's top."""
    return trainable.learning_rate or phase.optimizer.learning_rate


def _train_phase(phase: Phase, start: int, keeper: Keeper, wish: Interrupt) -> bool:
    """Train one phase, whose first step is the run's `start` + 1, from where the keeper stands. False:
    interrupted."""
    accelerator, settings, streams = keeper.accelerator, keeper.settings, keeper.streams
    share, rank, alone = accelerator.num_processes, accelerator.process_index, accelerator.num_processes == 1
    parameters = [p for trainable in phase.trainables for p in trainable.parameters.values()]
    peaks = {t.name: _peak(t, phase) for t in phase.trainables}
    keeper.wake(phase)
    objective, stepper = accelerator.prepare(phase.objective, _optimizer(phase))
    keeper.restore_optimizer(stepper.optimizer, phase)
    work = Work(
        phase.objective,
        objective,
        stepper,
        parameters,
        settings.max_grad_norm,
        keeper.plan.blocks,
        accelerator,
    )
    driver = Driver(settings.engine, work, lambda text: keeper.tell(Noted(keeper.step, text)))
    watch = GradientWatch({keeper.names[parameter]: parameter for parameter in parameters})
    meter = Meter(accelerator, keeper.tell, settings.nonfinite_limit, keeper.last_good)
    meter.in_a_row, opening = keeper.in_a_row, keeper.step
    course = phase.stretch or Stretch(0, phase.steps)
    always = settings.log_every == 1 or phase.after_step is not nothing
    stream = phase.batches.start((opening - start) * settings.accumulate, process=rank, processes=share)
    objective.train()
    try:
        while keeper.step < start + phase.steps:
            with rescuing(keeper, phase.name, lambda: _kept(phase, keeper, meter, stepper)) as attempt:
                done = keeper.step - start
                rates = {
                    name: peak * factor(phase.schedule, course.first + done, course.course, peak)
                    for name, peak in peaks.items()
                }
                batches = list(itertools.islice(stream, settings.accumulate))
                attempt.batches = batches
                places = [(done * len(batches) + number) * share + rank for number in range(len(batches))]
                # dropout too must not remember what came before
                seeds = [streams.number("dropout", start, place) for place in places]
                losses = driver.do(lambda engine: _gradients(engine, batches, seeds, wish if alone else None))  # noqa: B023
                if len(losses) < len(batches):
                    # the half-done step is dropped: after a resume it is done whole
                    return _stop(phase, keeper, meter, stepper)
                attempt.place = "clipping"
                norm = driver.do(lambda engine: engine.clip())
                if not watch.satisfied and norm.isfinite():
                    watch.see(keeper.step + 1, meter.moved)
                    if keeper.step == opening:
                        check_processes_agree(parameters, accelerator)
                skip = (~norm.isfinite()).float()
                attempt.place, attempt.moving = "optimizer's part", True
                driver.do(lambda engine: engine.step(rates, skip))  # noqa: B023 - it is done at once
                keeper.step += 1
                if keeper.ema is not None:
                    keeper.ema.update(keeper.step, skip, keeper.moving)
                attempt.moving = False
                keys = [key for batch in batches for key in batch.keys]
                meter.add(Measured(keeper.step, phase.name, rates, losses, keys, norm))
                due, last = keeper.due(keeper.step), keeper.step == start + phase.steps
                if not (
                    always or due or last or not watch.satisfied or keeper.step % settings.log_every == 0
                ):
                    if alone and wish.asked:
                        return _stop(phase, keeper, meter, stepper)
                    continue
                meter.flush()
                keeper.in_a_row = meter.in_a_row
                if norm.isfinite():
                    attempt.moving = True
                    phase.after_step()
                    attempt.moving = False
                if due:
                    keeper.between(due, phase, stepper.optimizer)
                if _anyone(accelerator, wish) and keeper.step < keeper.total:
                    return _stop(phase, keeper, meter, stepper)
        keeper.leave(phase, stepper.optimizer)
        return True
    finally:
        driver.close()
        accelerator.unwrap_model(objective, keep_fp32_wrapper=False).eval()
        stepper.zero_grad()
        keeper.wake(None)
        accelerator.free_memory()


def _stop(phase: Phase, keeper: Keeper, meter: Meter, stepper: Any) -> bool:
    """Keep what was done so far; gives the False of an interrupted phase."""
    meter.flush()
    keeper.in_a_row = meter.in_a_row
    if keeper.step and keeper.accelerator.is_main_process and keeper.last_step_saved != keeper.step:
        keeper.save(phase, stepper.optimizer)
    return False


def _kept(phase: Phase, keeper: Keeper, meter: Meter, stepper: Any) -> str:
    """Keep the last whole step of a run that can't go on; a sentence on it."""
    if keeper.accelerator.num_processes == 1:  # else all would have to take part
        meter.flush()
        keeper.in_a_row = meter.in_a_row
    return keeper.rescue(phase, stepper.optimizer)


def _gradients(
    engine: Engine, batches: Sequence[Batch], seeds: Sequence[int], wish: Interrupt | None
) -> list[Tensor]:
    """The gradients of one step; the losses (B,) of its batches, fewer of them where `wish` asked to stop."""
    engine.zero()
    samples, losses = sum(map(len, batches)), list[Tensor]()
    for batch, seed in zip(batches, seeds, strict=True):
        if losses and wish is not None and wish.asked:
            break
        torch.manual_seed(seed)
        losses.append(engine.backward(batch, samples, last=len(losses) + 1 == len(batches)))
    return losses


def _anyone(accelerator: Accelerator, wish: Interrupt) -> bool:
    """Whether any process was asked to stop: all must stop after the same step, or they wait for each other
    forever."""
    if accelerator.num_processes == 1:
        return wish.asked
    asked = torch.tensor([float(wish.asked)], device=accelerator.device)
    return bool(accelerator.reduce(asked, reduction="sum").item())


def _silent(event: object) -> None:
    """What a process that is not the main one tells."""
