"""Noise levels: range, distribution, and one number per position."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from scumble.rng import Streams
from scumble.training.timesteps import TIMESTEPS, TimestepSettings, levels

U = Streams(3).uniform("timestep", range(4000))


@pytest.mark.parametrize("name", list(TIMESTEPS))
def test_levels_stay_in_their_range(name: str) -> None:
    found = levels(TimestepSettings(distribution=name, minimum=0.2, maximum=0.6), U)
    assert found.min() >= 0.2 and found.max() < 0.6
    assert found.max() - found.min() > 0.3


def test_uniform_is_uniform() -> None:
    found = levels(TimestepSettings(), U)
    counts = torch.histc(found, bins=10, min=0, max=1)
    assert counts.min() > 340 and counts.max() < 460  # 400 expected, 3 standard deviations are 57


def test_logit_normal_has_the_mean_and_spread_that_are_asked_for() -> None:
    found = levels(TimestepSettings(distribution="logit-normal", mean=0.5, spread=0.8), U).double()
    logits = torch.logit(found)
    assert logits.mean().item() == pytest.approx(0.5, abs=0.05)
    assert logits.std().item() == pytest.approx(0.8, abs=0.05)


def test_an_empty_range_is_refused() -> None:
    with pytest.raises(ValidationError, match="below maximum"):
        TimestepSettings(minimum=0.7, maximum=0.7)
