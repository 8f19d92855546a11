"""Schedules: the learning rate as a pure function of the optimizer step.

No counter is kept, so accumulation, processes and resumes can't shift it: step 17 has one rate, however it is
reached. The formulas are those of `diffusers.optimization.get_scheduler`, for one process.

Legend: `step` counts finished optimizer steps (0 for the first), `steps` is their total, the factor
multiplies the optimizer's learning rate `rate`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from pydantic import Field, field_validator, model_validator

from scumble.errors import UnknownName
from scumble.registry import Registry
from scumble.settings import Settings

SCHEDULES: Registry[Callable[[ScheduleSettings, int, int, float], float]] = Registry(
    "schedule",
    {
        name: f"scumble.training.schedules:{name}"
        for name in (
            "constant",
            "constant_with_warmup",
            "linear",
            "cosine",
            "cosine_with_restarts",
            "polynomial",
        )
    },
)


class ScheduleSettings(Settings):
    """How the learning rate changes over the run."""

    name: str = "constant"
    """constant, constant_with_warmup, linear, cosine, cosine_with_restarts or polynomial."""
    warmup_steps: int = Field(default=0, ge=0)
    """Optimizer steps over which the rate rises linearly from 0."""
    cycles: int = Field(default=1, ge=1)
    """Falls of cosine_with_restarts."""
    power: float = Field(default=1.0, gt=0)
    """Exponent of polynomial."""
    final_rate: float = Field(default=1e-7, ge=0)
    """Where polynomial ends."""

    @field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in SCHEDULES:
            raise ValueError(str(UnknownName("schedule", name, SCHEDULES)))
        return name

    @model_validator(mode="after")
    def _no_setting_without_effect(self) -> ScheduleSettings:
        if self.name == "constant" and self.warmup_steps:
            raise ValueError(
                f'schedule "constant" has no warm-up, but warmup_steps is {self.warmup_steps}; '
                'choose "constant_with_warmup", or set warmup_steps = 0'
            )
        return self


def factor(settings: ScheduleSettings, step: int, steps: int, rate: float = 1.0) -> float:
    """What to multiply the learning rate by at `step` of `steps`, in [0, 1].

    Only polynomial looks at `rate`, because its end is an absolute rate.
    """
    return SCHEDULES.get(settings.name)(settings, step, steps, rate)


def same_past(settings: ScheduleSettings, steps: int, other_steps: int, rate: float) -> bool:
    """Whether a run of `steps` and one of `other_steps` have equal rates as long as both last."""
    return all(
        factor(settings, step, steps, rate) == factor(settings, step, other_steps, rate)
        for step in range(min(steps, other_steps))
    )


def constant(settings: ScheduleSettings, step: int, steps: int, rate: float) -> float:
    """1, always."""
    return 1.0


def constant_with_warmup(settings: ScheduleSettings, step: int, steps: int, rate: float) -> float:
    """A linear rise, then 1."""
    return step / settings.warmup_steps if step < settings.warmup_steps else 1.0


def linear(settings: ScheduleSettings, step: int, steps: int, rate: float) -> float:
    """A linear rise, then a linear fall to 0."""
    if step < settings.warmup_steps:
        return step / settings.warmup_steps
    return max(0.0, (steps - step) / max(1, steps - settings.warmup_steps))


def cosine(settings: ScheduleSettings, step: int, steps: int, rate: float) -> float:
    """A linear rise, then half a cosine to 0 (Loshchilov & Hutter, 2017)."""
    if step < settings.warmup_steps:
        return step / settings.warmup_steps
    return max(0.0, 0.5 * (1 + math.cos(math.pi * _progress(settings, step, steps))))


def cosine_with_restarts(settings: ScheduleSettings, step: int, steps: int, rate: float) -> float:
    """A linear rise, then `cycles` half cosines, each from 1 to 0 (Loshchilov & Hutter, 2017)."""
    if step < settings.warmup_steps:
        return step / settings.warmup_steps
    progress = _progress(settings, step, steps)
    if progress >= 1:
        return 0.0
    return max(0.0, 0.5 * (1 + math.cos(math.pi * ((settings.cycles * progress) % 1.0))))


def polynomial(settings: ScheduleSettings, step: int, steps: int, rate: float) -> float:
    """A linear rise, then (1 - progress)^power from `rate` to `final_rate`."""
    if step < settings.warmup_steps:
        return step / settings.warmup_steps
    end = min(settings.final_rate, rate)
    left = max(0.0, 1 - _progress(settings, step, steps))
    return ((rate - end) * left**settings.power + end) / rate


def _progress(settings: ScheduleSettings, step: int, steps: int) -> float:
    """How much of the time after warm-up is over, from 0."""
    return (step - settings.warmup_steps) / max(1, steps - settings.warmup_steps)
