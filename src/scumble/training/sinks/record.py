"""RunRecord: what a run's report shows, gathered from events and kept as JSON inside the report itself."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from scumble.training.events import (
    Event,
    Finished,
    HeldOut,
    Noted,
    Previewed,
    Saved,
    Started,
    StepDone,
    StepSkipped,
)
from scumble.training.sinks.jsonl import plain


@dataclass
class RunRecord:
    """A run so far, in plain values.

    Law: after a resume (`Started.first_step` > 0) it holds what an uninterrupted run would: what was recorded
    beyond the checkpoint is done again, so it is left out first.
    """

    name: str = "run"
    started: str = ""
    total_steps: int = 0
    resumed_after: list[int] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    steps: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    samples: list[int] = field(default_factory=list)
    rates: dict[str, list[float | None]] = field(default_factory=dict)
    """Trainable -> learning rate at each of `steps`, None where it did not train (another phase)."""
    phases: list[tuple[int, str]] = field(default_factory=list)
    """(first step, name) of each phase."""
    held_out: list[dict[str, Any]] = field(default_factory=list)
    previews: list[dict[str, Any]] = field(default_factory=list)
    saved: list[dict[str, Any]] = field(default_factory=list)
    skipped: list[dict[str, Any]] = field(default_factory=list)
    notes: list[dict[str, Any]] = field(default_factory=list)
    finished: dict[str, Any] | None = None

    def add(self, event: Event) -> None:
        """Take one event."""
        match event:
            case Started():
                self._start(event)
            case StepDone():
                self._step(event)
            case HeldOut():
                self.held_out.append(_row(event))
            case Previewed():
                self.previews.append(_row(event))
            case Saved():
                self.saved.append(_row(event))
            case StepSkipped():
                self.skipped.append(_row(event))
            case Noted():
                self.notes.append(_row(event))
            case Finished():
                self.finished = _row(event)

    def _start(self, event: Started) -> None:
        self.name = Path(event.run).resolve().name
        self.started = self.started or datetime.now(UTC).isoformat(timespec="seconds")
        self.total_steps, self.finished = event.total_steps, None
        self.facts, self.settings = plain(event.facts), plain(event.settings)
        if event.first_step:
            self._forget_after(event.first_step)
            self.resumed_after.append(event.first_step)

    def _forget_after(self, step: int) -> None:
        keep = sum(s <= step for s in self.steps)
        columns: list[list[Any]] = [self.steps, self.losses, self.norms, self.seconds, self.samples]
        for column in columns + list(self.rates.values()):
            del column[keep:]
        self.phases = [(first, name) for first, name in self.phases if first <= step]
        for name in ("held_out", "previews", "saved", "skipped"):
            setattr(self, name, [row for row in getattr(self, name) if row["step"] <= step])

    def _step(self, event: StepDone) -> None:
        if not self.phases or self.phases[-1][1] != event.phase:
            self.phases.append((event.step, event.phase))
        before = len(self.steps)
        self.steps.append(event.step)
        self.losses.append(event.loss)
        self.norms.append(event.gradient_norm)
        self.seconds.append(event.seconds)
        self.samples.append(event.samples)
        for name in {*self.rates, *event.learning_rates}:
            column = self.rates.setdefault(name, [None] * before)
            column.append(event.learning_rates.get(name))

    def as_json(self) -> dict[str, Any]:
        """Plain values; numbers of curves to 6 digits. Inverse of `from_json`."""
        values = plain({f.name: getattr(self, f.name) for f in dataclasses.fields(self)})
        for name in ("losses", "norms", "seconds"):
            values[name] = [_short(x) for x in values[name]]
        values["rates"] = {name: [_short(x) for x in column] for name, column in values["rates"].items()}
        return values

    @staticmethod
    def from_json(values: dict[str, Any]) -> RunRecord:
        """Inverse of `as_json`.

        Raises:
            TypeError: `values` has other fields (another version of scumble wrote it).
        """
        record = RunRecord(**values)
        for name in ("losses", "norms", "seconds"):
            setattr(record, name, [float(x) for x in getattr(record, name)])
        record.phases = [(int(first), str(name)) for first, name in record.phases]
        return record


def _short(value: float | str | None) -> float | str | None:
    return float(f"{value:.6g}") if isinstance(value, float | int) else value


def _row(event: Event) -> dict[str, Any]:
    return plain(event)
