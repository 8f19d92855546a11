"""Events: what happened in a run, as values. Sinks receive them and cannot reach back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


@dataclass(frozen=True)
class Started:
    """A run begins or goes on."""

    run: Path
    total_steps: int
    first_step: int
    """0, or the step that a resume continues after."""
    facts: Mapping[str, object]
    settings: Mapping[str, object]


@dataclass(frozen=True)
class StepDone:
    """One optimizer step, over all processes and accumulations."""

    step: int
    """1 is the first."""
    phase: str
    loss: float
    """Mean over the step's samples."""
    learning_rates: Mapping[str, float]
    """Trainable name -> rate used in this step."""
    gradient_norm: float
    """Before clipping."""
    seconds: float
    samples: int


@dataclass(frozen=True)
class StepSkipped:
    """A step was left out because its loss or gradient was not finite. The weights did not move."""

    step: int
    reason: str
    pictures: Sequence[str]
    in_a_row: int


@dataclass(frozen=True)
class Saved:
    """A checkpoint or the final adapter is on disk, whole."""

    step: int
    path: Path
    final: bool


@dataclass(frozen=True)
class Panel:
    """One prompt, drawn twice from one seed."""

    prompt: str
    seed: int
    base: Path
    adapter: Path
    difference: float
    """Mean absolute difference in 8-bit steps. 0 means the adapter does nothing."""


@dataclass(frozen=True)
class Previewed:
    """Validation pictures, drawn from the saved file through the public inference path."""

    step: int
    panels: Sequence[Panel]


@dataclass(frozen=True)
class HeldOut:
    """Loss on pictures kept out of training, at fixed noise and noise levels."""

    step: int
    adapter: float
    base: float
    interval: float
    """Half width of the 95 % interval of mean(adapter - base), paired by picture and noise level."""
    best: bool
    """The lowest so far."""


@dataclass(frozen=True)
class Noted:
    """Something a person should know: a warning, an assumption, a fallback with its reason."""

    step: int
    text: str


@dataclass(frozen=True)
class Finished:
    """The run ended."""

    step: int
    seconds: float
    adapter: Path | None
    reason: str
    """"complete", "interrupted" or what went wrong."""


Event = Started | StepDone | StepSkipped | Saved | Previewed | HeldOut | Noted | Finished


class Sink(Protocol):
    """Takes events. A sink that fails is reported once and dropped; it never stops the run."""

    def handle(self, event: Event) -> None:
        """React to one event."""

    def close(self) -> None:
        """Flush; called once, also after an error."""
