"""Keeper: what a run does between its steps: go on from a checkpoint, save, measure, draw, prove the
result."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from scumble.data.together import ALONE, Together
from scumble.errors import NoEffect, ResumeError, TrainingError
from scumble.models.shortage import ERRORS, recover, shortage_of, telling
from scumble.rng import Streams
from scumble.training import state as checkpoints
from scumble.training.ema import EMA
from scumble.training.events import Event, HeldOut, Noted, Panel, Previewed, Saved
from scumble.training.optimizers import group_values, optimizer_data, restore_optimizer
from scumble.training.plan import Phase, Plan
from scumble.training.proofs import check_changed, check_dtypes, digests
from scumble.training.schedules import same_past
from scumble.training.settings import TrainSettings
from scumble.training.state import Layout, TrainState

if TYPE_CHECKING:
    from accelerate import Accelerator

    from scumble.adapters.state import AdapterState

Previewer = Callable[[Path, int], Sequence[Panel]]
"""(adapter file, step) -> panels: draws validation pictures from the saved file. What it has to say of them
it keeps in an attribute `notes`."""


@dataclass(frozen=True)
class Due:
    """What is to be done after a step."""

    checkpoint: bool
    held_out: bool
    preview: bool

    def __bool__(self) -> bool:
        return self.checkpoint or self.held_out or self.preview


class Keeper:
    """Holds the facts of a run that outlive a step, and does what is not training. Only the main process
    writes."""

    def __init__(
        self,
        plan: Plan,
        run: Path,
        settings: TrainSettings,
        tell: Callable[[Event], None],
        streams: Streams,
        accelerator: Accelerator,
        previewer: Previewer | None,
        layout: Layout,
        together: Together = ALONE,
    ) -> None:
        self.plan, self.run, self.settings, self.tell = plan, run, settings, tell
        self.streams, self.accelerator, self.previewer, self.layout = streams, accelerator, previewer, layout
        self.together = together
        self.total = sum(phase.steps for phase in plan.phases)
        self.parameters = named_parameters(plan)
        self.names = {parameter: name for name, parameter in self.parameters.items()}
        self.moving = self.parameters
        """What trains in the phase that runs."""
        self.initial = digests(self.parameters)
        self.ema = EMA(self.parameters, settings.ema) if settings.ema is not None else None
        self.identity = self._identity()
        self.step = 0
        self.in_a_row = 0
        self.best_step: int | None = None
        self.best_loss: float | None = None
        self.last_saved: Path | None = None
        self.last_step_saved = 0
        self._resumed: TrainState | None = None
        self._carried: tuple[str, Mapping[str, Tensor], Mapping[str, Any]] | None = None
        """(phase, tensors, values) of an optimizer whose phase ended, for one that goes on with it."""
        self._fresh_groups: list[dict[str, Any]] = []
        self._notes: list[str] = []

    # -- going on ----------------------------------------------------------------------------------

    def resume(self, source: Path | str | None, accept_changes: bool) -> None:
        """Take over a checkpoint: "latest", a folder, or the name of one in the run; None starts anew.

        Raises:
            ResumeError: it is damaged, or belongs to a run with other settings (each difference is listed).
        """
        main = self.accelerator.is_main_process
        folder, notes = self._find(source) if main else (None, [])
        if main:
            for leftover in checkpoints.unfinished(self.run):
                shutil.rmtree(leftover)
        folder = self.together.gather(folder)[0]
        self._notes += notes
        if folder is None:
            return
        saved = self._loaded(folder)
        self._check_identity(folder, saved, accept_changes)
        self._restore(saved)
        self.last_saved, self.last_step_saved = folder, self.step
        self._notes.append(f"Going on from {folder.name}, after step {self.step} of {self.total}.")

    def _loaded(self, folder: Path) -> TrainState:
        """The checkpoint that the main process found; one that sees no such folder is handed its content."""
        marks = self.together.gather(checkpoints.mark(folder))
        own = checkpoints.load(folder) if marks[self.together.rank] == marks[0] else None
        given = own
        if len(set(marks)) > 1:
            given = self.together.gather(own if self.together.rank == 0 else None)[0]
        assert given is not None  # the main process has what it found
        return given

    def tell_notes(self) -> None:
        """Tell what the resume found; separate, because a run's first event is `Started`."""
        for note in self._notes:
            self.tell(Noted(self.step, note))
        self._notes = []

    def restore_optimizer(self, optimizer: Optimizer, phase: Phase) -> None:
        """Bring the optimizer (and fp16's loss scale) to where the checkpoint left them, if it was in this
        phase, or to where the phase that this one goes on from left it."""
        self._fresh_groups = group_values(optimizer)
        saved, self._resumed = self._resumed, None
        carried, self._carried = self._carried, None
        before = self._before(phase)
        if before is not None:
            if saved is not None and saved.phase == before.name:  # saved after that phase's very last step
                carried = (saved.phase, saved.optimizer, saved.optimizer_values)
            if carried is not None and carried[0] == before.name:
                _, tensors, values = carried
                place = {trainable.name: index for index, trainable in enumerate(before.trainables)}
                groups = [values["groups"][place[trainable.name]] for trainable in phase.trainables]
                restore_optimizer(optimizer, self.names, tensors, {**values, "groups": groups})
        if saved is None or saved.phase not in (phase.name, before and before.name):
            return
        if saved.scaler is not None and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(dict(saved.scaler))
        if saved.phase != phase.name:
            return
        earlier = saved.identity["phases"][phase.name]["optimizer"]["name"]
        if earlier != phase.optimizer.name:
            self.tell(
                Noted(
                    self.step,
                    f"The optimizer starts anew: {earlier} kept other facts than {phase.optimizer.name} does.",
                )
            )
            return
        restore_optimizer(optimizer, self.names, saved.optimizer, saved.optimizer_values)

    def wake(self, phase: Phase | None) -> None:
        """Only what `phase` trains takes gradients: no work is done for the rest. None: everything again."""
        trains = None if phase is None else {id(p) for t in phase.trainables for p in t.parameters.values()}
        for parameter in self.parameters.values():
            parameter.requires_grad_(trains is None or id(parameter) in trains)
        self.moving = {name: p for name, p in self.parameters.items() if trains is None or id(p) in trains}
        if self.ema is not None:
            self.ema.settle(self.parameters.keys() - self.moving.keys())

    def leave(self, phase: Phase, optimizer: Optimizer) -> None:
        """Keep the optimizer's memory at the end of `phase` where the next one goes on with it."""
        if any(self._before(later) is phase for later in self.plan.phases):
            self._carried = (phase.name, *optimizer_data(optimizer, self.names, self._fresh_groups))

    def _before(self, phase: Phase) -> Phase | None:
        """The phase whose course `phase` goes on with."""
        index = next(number for number, each in enumerate(self.plan.phases) if each is phase)
        return self.plan.phases[index - 1] if phase.stretch is not None and phase.stretch.first else None

    def _find(self, source: Path | str | None) -> tuple[Path | None, list[str]]:
        if source is None:
            old = [path.name for _, path in self.layout.checkpoints(self.run)]
            if not old:
                return None, []
            return None, [
                f"{self.run} already holds {', '.join(old)}, of an earlier run; this run starts anew."
            ]
        if str(source) == "latest":
            folder, notes = checkpoints.latest_valid(self.run, self.layout)
            if folder is None:
                notes.append(f"There is no whole checkpoint in {self.run}; training starts at step 0.")
            return folder, notes
        given = Path(source)
        return (given if given.is_dir() or given.is_absolute() else self.run / given), []

    def _check_identity(self, folder: Path, saved: TrainState, accept_changes: bool) -> None:
        now = json.loads(json.dumps(self.identity))
        steps_before, steps_now = saved.identity["steps"], now["steps"]
        differences = checkpoints.compare(
            {k: v for k, v in saved.identity.items() if k != "steps"},
            {k: v for k, v in now.items() if k != "steps"},
        )
        for number, phase in enumerate(self.plan.phases):
            before, after = steps_before.get(phase.name), steps_now[phase.name]
            last = number == len(self.plan.phases) - 1
            if before is None or before == after:
                continue
            rate = phase.optimizer.learning_rate
            # more steps at rates that don't look at the total is simply a longer run
            if not (last and same_past(phase.schedule, before, after, rate)):
                differences.append(
                    f"steps of phase {phase.name!r} (and with it every learning rate): {before} -> {after}"
                )
        listed = "\n".join(f"  {difference}" for difference in differences)
        shapes = {name: tuple(tensor.shape) for name, tensor in saved.parameters.items()}
        mine = {name: tuple(parameter.shape) for name, parameter in self.parameters.items()}
        if shapes != mine:
            count = len(set(shapes.items()) ^ set(mine.items()))
            raise ResumeError(
                f"{folder} holds other weights than this run trains ({count} names or shapes differ), so it "
                "can't go on.\n"
                f"{listed}\nGive the settings that it was made with, or start anew without resume."
            )
        if differences and not accept_changes:
            raise ResumeError(
                f"{folder} was made with other settings:\n{listed}\n"
                "Give the old ones, or accept the change (--accept-changes) and it goes on with the new ones."
            )
        if differences:
            self._notes.append(f"Going on with changed settings, as accepted:\n{listed}")
        if saved.step > self.total:
            raise ResumeError(
                f"{folder} is at step {saved.step}, this run ends at {self.total}. Raise steps."
            )

    @torch.no_grad()
    def _restore(self, saved: TrainState) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(saved.parameters[name])
        if self.ema is not None:
            self.ema.load(saved.means or saved.parameters)
        self.initial = dict(saved.initial)
        self.step, self.in_a_row = saved.step, saved.skipped_in_a_row
        self.best_step, self.best_loss = saved.best_step, saved.best_loss
        self._resumed = saved

    def _identity(self) -> dict[str, Any]:
        """What decides the numbers of this run, as JSON values."""
        settings, phases = self.settings, self.plan.phases
        return {
            **self.plan.identity,
            "seed": self.streams.seed,
            "precision": settings.precision,
            "max_grad_norm": settings.max_grad_norm,
            "ema": settings.ema,
            "steps": {phase.name: phase.steps for phase in phases},
            "phases": {
                phase.name: {
                    "data": phase.batches.fingerprint,
                    "pictures per step": phase.batches.batch_size
                    * settings.accumulate
                    * self.accelerator.num_processes,
                    "optimizer": phase.optimizer.model_dump(mode="json"),
                    "schedule": phase.schedule.model_dump(mode="json"),
                    **({"stretch": [phase.stretch.first, phase.stretch.course]} if phase.stretch else {}),
                    "trainables": {
                        trainable.name: {
                            "learning rate": trainable.learning_rate,
                            "tensors": len(trainable.parameters),
                            "names and shapes": _fingerprint(trainable.parameters),
                        }
                        for trainable in phase.trainables
                    },
                }
                for phase in phases
            },
        }

    # -- between steps -----------------------------------------------------------------------------

    def due(self, step: int) -> Due:
        """What is to be done after `step`; everything that is on at all is done after the last one."""
        settings = self.settings

        def now(every: int) -> bool:
            return every > 0 and (step % every == 0 or step == self.total)

        return Due(
            checkpoint=now(settings.checkpoint_every),
            held_out=now(settings.held_out_every) and self.plan.held_out is not None,
            preview=now(settings.preview_every) and self.previewer is not None,
        )

    def between(self, due: Due, phase: Phase, optimizer: Optimizer) -> None:
        """Do what is due, on the main process; the others wait at their next collective."""
        if not self.accelerator.is_main_process:
            return
        with self._resting(phase):
            if due.held_out:
                self._measure()
            if due.checkpoint:
                self.save(phase, optimizer)
            if due.preview:
                self._preview()

    def save(self, phase: Phase, optimizer: Optimizer) -> Path:
        """Write the checkpoint of the current step."""
        tensors, values = optimizer_data(optimizer, self.names, self._fresh_groups)
        scaler = self.accelerator.scaler
        state = TrainState(
            step=self.step,
            phase=phase.name,
            identity=self.identity,
            parameters=self.parameters,
            initial=self.initial,
            optimizer=tensors,
            optimizer_values=values,
            means=self.ema.means if self.ema is not None else {},
            scaler=scaler.state_dict() if scaler is not None else None,
            skipped_in_a_row=self.in_a_row,
            best_step=self.best_step,
            best_loss=self.best_loss,
        )
        folder = self.layout.checkpoint_folder(self.run, self.step)

        def write() -> None:
            checkpoints.save(state, self.export(), folder, self.settings.checkpoint_limit, self.layout)

        try:
            write()
        except ERRORS as error:
            if shortage_of(error) is None:
                raise
            recover(error)
            with telling(f"{folder.name} was saved", self._close_others):
                write()  # a second time with what could be given back
        check_dtypes(self.moving, f"after saving {folder.name}")
        self.last_saved, self.last_step_saved = folder, self.step
        self.tell(Saved(self.step, folder, final=False))
        return folder

    def _close_others(self) -> str:
        return f"{self.last_good()} Close what else takes memory, and go on from there with --resume latest."

    def rescue(self, phase: Phase, optimizer: Optimizer) -> str:
        """Write the checkpoint of the last whole step, if there is none, though the next one failed: by whichever
        process it failed in, because the others wait for that one. A sentence on it."""
        if self.step == 0:
            return "No step was done yet, so there is nothing to keep."
        folder = self.layout.checkpoint_folder(self.run, self.step)
        kept = f"All up to step {self.step} is kept in {folder}."
        if self.last_step_saved == self.step or checkpoints.damage(folder) is None:
            return kept
        if not self.run.is_dir():  # another machine's disk
            return self.last_good()
        turn = self.run / f".rescue-{self.step:06d}.partial"
        try:
            turn.mkdir()
        except FileExistsError:  # another process ran out of memory in the same step
            return kept
        try:
            if not self.accelerator.is_main_process:
                self._know_best()
            self.save(phase, optimizer)
        finally:
            turn.rmdir()
        return kept

    def _know_best(self) -> None:
        """What the main process alone measured, from where it wrote it."""
        facts = self.run / self.layout.best / "held_out.json"
        if facts.is_file():
            found = json.loads(facts.read_text(encoding="utf-8"))
            self.best_step, self.best_loss = found["step"], found["adapter"]

    def finished_so_far(self) -> str:
        """A sentence on what there is of a run whose last step is done."""
        path = self.run / self.layout.adapter
        there = f"{path} is written, and not proven. " if path.is_file() else ""
        again = "" if self.last_saved is None else " --resume latest does this last part again."
        return f"{there}{self.last_good()}{again} Close what else takes memory, or set train.quantization."

    def export(self) -> AdapterState:
        """The adapter as it would be saved now: the running mean where EMA is on."""
        with self.exported():
            return self.plan.export()

    def exported(self) -> Any:
        """A context in which the live model holds what is exported."""
        return nullcontext() if self.ema is None else self.ema.swapped()

    def last_good(self) -> str:
        """A sentence that names the last good file."""
        if self.last_saved is None:
            return "There is no checkpoint yet: set checkpoint_every lower to have one next time."
        return f"The last good file is {self.last_saved / checkpoints.ADAPTER}."

    def _measure(self) -> None:
        """The held-out loss, beside the base's; a new best is kept in `best/`. Without the memory for it, it is told
        that it was not measured."""
        assert self.plan.held_out is not None
        try:
            with torch.no_grad(), self.exported(), self.accelerator.autocast():
                adapter, base = (losses.double().cpu() for losses in self.plan.held_out())
        except ERRORS as error:
            if (lack := shortage_of(error)) is None:
                raise
            recover(error)
            text = f"Out of {lack.memory} while the held-out loss was measured, and training goes on. {lack}"
            text += f" It takes train.batch = {self.settings.batch} pictures at once."
            self.tell(Noted(self.step, text))
            return
        loss, difference = adapter.mean().item(), adapter - base
        best = math.isfinite(loss) and (self.best_loss is None or loss < self.best_loss)
        if best:
            from scumble.formats import write

            self.best_step, self.best_loss = self.step, loss
            write(self.export(), self.run / self.layout.best / checkpoints.ADAPTER)
            facts = {"step": self.step, "adapter": loss, "base": base.mean().item()}
            (self.run / self.layout.best / "held_out.json").write_text(json.dumps(facts), encoding="utf-8")
        self.tell(HeldOut(self.step, loss, base.mean().item(), half_width(difference), best))

    def _preview(self) -> None:
        """Pictures from the saved file. A failure to draw is told and does not end the run."""
        assert self.previewer is not None
        checkpoint = self.layout.checkpoint_folder(self.run, self.step)
        own = self.last_step_saved != self.step
        folder = self.run / f".preview-{self.step:06d}" if own else checkpoint
        if own:
            from scumble.formats import write

            write(self.export(), folder / checkpoints.ADAPTER)
        before = digests(self.parameters)
        try:
            panels = self.previewer(folder / checkpoints.ADAPTER, self.step)
        except Exception as error:
            text = f"The preview failed and training goes on. {type(error).__name__}: {error}"
            if (lack := shortage_of(error)) is not None:
                said = f"{type(error).__name__}: {error}".splitlines()[0]
                text = (
                    f"Out of {lack.memory} while the preview was drawn, and training goes on. {lack} ({said})"
                )
            recover(error)
            self.tell(Noted(self.step, text))
        else:
            self.tell(Previewed(self.step, panels))
            for note in getattr(self.previewer, "notes", ()):
                self.tell(Noted(self.step, note))
            same = [panel.prompt for panel in panels if panel.difference == 0]
            if same:
                text = f"Base and adapter draw the very same picture for {', '.join(map(repr, same))}."
                self.tell(Noted(self.step, text))
        finally:
            if own:
                shutil.rmtree(folder, ignore_errors=True)
        check_dtypes(self.moving, f"after the preview at step {self.step}")
        changed = [name for name, value in digests(self.parameters).items() if before[name] != value]
        if changed:
            raise TrainingError(
                f"The preview at step {self.step} changed {len(changed)} weights of the run, first "
                f"{changed[0]}. It must draw with a model of its own, or put the live one back as it was."
            )

    @contextmanager
    def _resting(self, phase: Phase) -> Iterator[None]:
        """The objective in eval mode, the generators as they were afterwards."""
        mode = phase.objective.training
        devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
        with torch.random.fork_rng(devices):
            phase.objective.eval()
            try:
                yield
            finally:
                phase.objective.train(mode)

    # -- the end -----------------------------------------------------------------------------------

    def finish(self) -> tuple[Path, float]:
        """Write the adapter, read it back and prove that it is what was trained: (file, largest difference).

        Raises:
            NothingTrained: a tensor never changed.
            NoEffect: the saved adapter changes nothing.
            TrainingError: the file read back is not what was written, or acts otherwise than the live model.
        """
        from scumble.formats import read, write

        check_changed(self.initial, self.parameters)
        check_dtypes(self.parameters, "at the end")
        adapter = self.export()
        path = write(adapter, self.run / self.layout.adapter)
        again = read(path, list(adapter.layers)).state
        if not replace(again, metadata=adapter.metadata).equal(adapter):
            raise TrainingError(
                f"{path} read back is not the adapter that was written. Its checkpoint {self.last_saved} is "
                "whole; please report this with both files."
            )
        with torch.no_grad(), self.exported():
            difference = self.plan.verify(again)
        if math.isnan(difference):
            raise NoEffect(f"{path}: comparing it with the live model gave NaN.")
        self.tell(Saved(self.step, path, final=True))
        self.tell(
            Noted(
                self.step,
                f"{path.name} was loaded into a fresh base: same output as the live model to "
                f"{difference:.1e}.",
            )
        )
        return path, difference

    @property
    def best_path(self) -> Path | None:
        """The adapter with the lowest held-out loss."""
        return None if self.best_step is None else self.run / self.layout.best / checkpoints.ADAPTER


def named_parameters(plan: Plan) -> dict[str, nn.Parameter]:
    """Everything that trains in any phase: "<trainable>/<parameter>" -> parameter.

    Raises:
        TrainingError: nothing trains, two parameters share a name, or one is not fp32.
    """
    found: dict[str, nn.Parameter] = {}
    for phase in plan.phases:
        for trainable in phase.trainables:
            for name, parameter in trainable.parameters.items():
                key = f"{trainable.name}/{name}"
                if found.setdefault(key, parameter) is not parameter:
                    raise TrainingError(
                        f"Two trainable tensors are called {key!r}. Name the trainables apart."
                    )
        if not any(trainable.parameters for trainable in phase.trainables):
            raise TrainingError(f"Phase {phase.name!r} trains nothing: no trainable has a parameter.")
    check_dtypes(found, "before the first step")
    return found


def half_width(differences: Tensor) -> float:
    """Half width of the 95 % interval of the mean of `differences` (n,), Student's t; infinite for fewer than
    two."""
    n = len(differences)
    if n < 2:
        return math.inf
    return _student(n - 1) * (differences.double().std() / math.sqrt(n)).item()


def _student(degrees: int) -> float:
    """97.5 % quantile of Student's t. Above 30: Cornish-Fisher's first two terms, right to 0.001."""
    table: tuple[float, ...] = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
    table += (2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086)
    table += (2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042)
    if degrees <= len(table):
        return table[degrees - 1]
    z = 1.959964
    return z + (z**3 + z) / (4 * degrees) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)


def _fingerprint(parameters: Mapping[str, nn.Parameter]) -> str:
    text = "".join(f"{name}{tuple(parameters[name].shape)}" for name in sorted(parameters))
    return hashlib.sha256(text.encode()).hexdigest()[:16]
