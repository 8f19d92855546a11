"""Noise levels: range, distribution, and one number per position."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers.training_utils import compute_density_for_timestep_sampling
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


@pytest.mark.parametrize("scale", [-1.0, 0.0, 0.5, 1.29, 1.75])
def test_mode_is_the_papers_and_grows(scale: float) -> None:
    u = torch.linspace(0, 1, 101)
    found = levels(TimestepSettings(distribution="mode", mode_scale=scale), u)
    paper = 1 - u - scale * (torch.cos(math.pi / 2 * u) ** 2 - 1 + u)  # eq. 20, from noise to clean
    torch.testing.assert_close(found, paper.flip(0), atol=1e-6, rtol=0)
    assert (found.diff() > -1e-6).all()


@pytest.mark.parametrize(
    ("name", "theirs", "options"),
    [
        ("logit-normal", "logit_normal", {"mean": 0.5, "spread": 0.8}),
        ("mode", "mode", {"mode_scale": 1.29}),
        ("uniform", "none", {}),
    ],
)
def test_distributions_are_those_of_diffusers(name: str, theirs: str, options: dict[str, float]) -> None:
    """Where diffusers' number counts from noise, ours counts from clean: a mean has the other sign there."""
    found = levels(TimestepSettings(distribution=name, **options), U)
    drawn = compute_density_for_timestep_sampling(
        theirs,
        40_000,
        logit_mean=-options.get("mean", 0.0),
        logit_std=options.get("spread", 1.0),
        mode_scale=options.get("mode_scale"),
        generator=torch.Generator().manual_seed(0),
    )
    at = torch.linspace(0.05, 0.95, 19)
    assert (found.quantile(at) - (1 - drawn).quantile(at)).abs().max() < 0.02


def test_cosmap_has_the_papers_density() -> None:
    found = levels(TimestepSettings(distribution="cosmap"), U)
    counts = torch.histc(found, bins=10, min=0, max=1) / len(U)
    middle = torch.arange(0.05, 1, 0.1)
    density = 2 / (math.pi - 2 * math.pi * middle + 2 * math.pi * middle**2)  # eq. 21
    assert (counts - density / 10).abs().max() < 0.02


@pytest.mark.parametrize("scale", [-1.1, 1.8])
def test_a_mode_that_would_not_grow_is_refused(scale: float) -> None:
    with pytest.raises(ValidationError, match="mode_scale"):
        TimestepSettings(distribution="mode", mode_scale=scale)


@pytest.mark.parametrize("shift", ["size", 0, -1.0])
def test_a_shift_is_a_positive_number_or_resolution(shift: object) -> None:
    with pytest.raises(ValidationError, match="shift"):
        TimestepSettings(shift=shift)  # type: ignore[arg-type]


def test_an_empty_range_is_refused() -> None:
    with pytest.raises(ValidationError, match="below maximum"):
        TimestepSettings(minimum=0.7, maximum=0.7)
