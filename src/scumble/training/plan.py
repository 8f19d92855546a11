"""Plan and Phase: what to train, on what, for how long, as values.

A method builds phases; the loop runs them and knows nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor, nn

from scumble.training.optimizers import OptimizerSettings
from scumble.training.schedules import ScheduleSettings

if TYPE_CHECKING:
    from scumble.adapters.state import AdapterState
    from scumble.data.record import Batches


def nothing() -> None:
    """The default `after_step`."""


@dataclass(frozen=True)
class Trainable:
    """A named group of parameters with its own learning rate."""

    name: str
    """For the logs: "unet", "text_encoder", "tokens"."""
    parameters: Mapping[str, nn.Parameter]
    """Name -> parameter; fp32, requires_grad."""
    learning_rate: float | None = None
    """None: the optimizer's own."""


@dataclass(frozen=True)
class Stretch:
    """A phase's place in a longer course: the schedule and the optimizer go through the whole course as if it were
    one phase.

    Law: a phase cut into stretches that all train the same gives, without dropout, what the whole phase gives.
    """

    first: int
    """Steps of the course before this phase. Above 0, the optimizer's memory of the phase before is taken over, whose
    trainables must include this phase's."""
    course: int
    """Steps of the whole course."""


@dataclass(frozen=True)
class Phase:
    """One stretch of training: an objective, what it moves, and how long.

    `objective` is a module whose `forward(batch) -> losses (B,)` is exactly what is differentiated, so that
    Accelerate's `prepare` wraps it under DDP, FSDP and compile alike.
    """

    name: str
    trainables: Sequence[Trainable]
    batches: Batches
    objective: nn.Module
    steps: int
    """Optimizer steps."""
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    schedule: ScheduleSettings = field(default_factory=ScheduleSettings)
    after_step: Callable[[], None] = nothing
    """Called after each optimizer step: textual inversion keeps its rows at the table's norm."""
    stretch: Stretch | None = None
    """None: the phase is a course of its own."""


@dataclass(frozen=True)
class Plan:
    """A whole run: its phases, and how to turn what was trained into an adapter and prove that it acts."""

    phases: Sequence[Phase]
    export: Callable[[], AdapterState]
    """The adapter as it is now, as data (with metadata): copies, not views of what trains."""
    verify: Callable[[AdapterState], float]
    """Loads the state (read back from the saved file) into a fresh base, compares a fixed forward with the
    live model, and returns the largest absolute difference; raises NoEffect when base and adapter give the
    same output."""
    held_out: Callable[[], tuple[Tensor, Tensor]] | None = None
    """(adapter losses, base losses), each (pictures,), on fixed noise and timesteps; None without held-out
    pictures."""
    identity: Mapping[str, object] = field(default_factory=dict)
    """What a resume must find unchanged, beside what the loop compares itself: base, adapter and objective
    settings. JSON values."""
    blocks: Sequence[nn.Module] = ()
    """Blocks of the base of which there are many alike: what `engine = "compile"` compiles."""
    facts: Mapping[str, object] = field(default_factory=dict)
    """What a person is told before the start: layers, parameters, pictures, batches an epoch, file size."""
