"""Timesteps: which noise levels to train on, one number per sample from its own position.

Legend: u in [0, 1) is a noise level as a fraction, 0 clean, 1 noise; `Prediction.from_uniform` makes it a t.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from pydantic import Field, PositiveFloat, field_validator, model_validator
from torch import Tensor

from scumble.errors import UnknownName
from scumble.registry import Registry
from scumble.settings import Settings

TIMESTEPS: Registry[Callable[[TimestepSettings, Tensor], Tensor]] = Registry(
    "timestep distribution",
    {
        "uniform": "scumble.training.timesteps:uniform",
        "logit-normal": "scumble.training.timesteps:logit_normal",
        "mode": "scumble.training.timesteps:mode",
        "cosmap": "scumble.training.timesteps:cosmap",
    },
)


class TimestepSettings(Settings):
    """Which noise levels are trained on, and how often."""

    distribution: str = "uniform"
    """uniform, or one made for flow matching: logit-normal and mode (middle levels more often), cosmap (as often as the
    cosine schedule)."""
    minimum: float = Field(default=0.0, ge=0, lt=1)
    """Lowest level, as a fraction of the schedule: 0 is clean."""
    maximum: float = Field(default=1.0, gt=0, le=1)
    """Highest level, as a fraction of the schedule: 1 is pure noise."""
    mean: float = 0.0
    """Of the logit, for logit-normal: above 0 favours noisy levels."""
    spread: float = Field(default=1.0, gt=0)
    """Standard deviation of the logit, for logit-normal."""
    mode_scale: float = Field(default=1.29, ge=-1, le=2 / (math.pi - 2))
    """How much more often middle levels come, for mode: 0 is uniform, below 0 favours both ends."""
    shift: Literal["resolution"] | PositiveFloat | None = None
    """How far levels move towards noise: above 1 favours noisy levels. A number takes the place of the base's own (SD 3
    has 3); resolution takes what the base would draw pictures of the trained size with. Unset: the base's own."""

    @field_validator("distribution")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in TIMESTEPS:
            raise ValueError(str(UnknownName("timestep distribution", name, TIMESTEPS)))
        return name

    @model_validator(mode="after")
    def _ordered(self) -> TimestepSettings:
        if self.minimum >= self.maximum:
            raise ValueError(f"minimum ({self.minimum}) must be below maximum ({self.maximum})")
        return self


def levels(settings: TimestepSettings, u: Tensor) -> Tensor:
    """Uniform numbers (B,) in [0, 1) -> noise levels (B,) in [minimum, maximum), by the settings'
    distribution."""
    spread = TIMESTEPS.get(settings.distribution)(settings, u)
    return settings.minimum + (settings.maximum - settings.minimum) * spread


def uniform(settings: TimestepSettings, u: Tensor) -> Tensor:
    """All levels alike (Ho et al., 2020)."""
    return u


def logit_normal(settings: TimestepSettings, u: Tensor) -> Tensor:
    """The logit is normal (Esser et al., 2024, section 3.1): by inversion, so one uniform number gives one
    level."""
    inside = u.double().clamp(1e-6, 1 - 1e-6)
    return torch.sigmoid(settings.mean + settings.spread * torch.special.ndtri(inside)).to(u.dtype)


def mode(settings: TimestepSettings, u: Tensor) -> Tensor:
    """Middle levels more often, the ends never left out (Esser et al., 2024, eq. 20, whose u runs from noise)."""
    bow = torch.cos(math.pi / 2 * u.double()).square() - 1 + u
    return (u + settings.mode_scale * bow).clamp(0, 1).to(u.dtype)


def cosmap(settings: TimestepSettings, u: Tensor) -> Tensor:
    """Signal-to-noise ratios as often as the cosine schedule has them (Esser et al., 2024, eq. 21)."""
    return (1 - 1 / (torch.tan(math.pi / 2 * u.double()) + 1)).to(u.dtype)
