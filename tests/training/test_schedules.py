"""Learning rates: diffusers' formulas, as pure functions of the optimizer step."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from scumble.training.schedules import SCHEDULES, ScheduleSettings, factor, same_past

RATE, STEPS = 1e-4, 37


def diffusers_rates(name: str, warmup: int, cycles: int, power: float) -> list[float]:
    from diffusers.optimization import get_scheduler

    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.AdamW([parameter], lr=RATE)
    schedule = get_scheduler(
        name, optimizer, num_warmup_steps=warmup, num_training_steps=STEPS, num_cycles=cycles, power=power
    )
    rates = []
    for _ in range(STEPS):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return rates


@pytest.mark.parametrize("name", list(SCHEDULES))
@pytest.mark.parametrize("warmup", [0, 5])
@pytest.mark.parametrize(("cycles", "power"), [(1, 1.0), (3, 2.0)])
def test_rates_equal_those_of_diffusers(name: str, warmup: int, cycles: int, power: float) -> None:
    if name == "constant" and warmup:
        pytest.skip("constant has no warm-up; tested below")
    settings = ScheduleSettings(name=name, warmup_steps=warmup, cycles=cycles, power=power)
    mine = [RATE * factor(settings, step, STEPS, RATE) for step in range(STEPS)]
    assert mine == pytest.approx(diffusers_rates(name, warmup, cycles, power), rel=1e-12, abs=1e-18)


@pytest.mark.parametrize("name", list(SCHEDULES))
def test_rates_stay_in_bounds_when_asked_beyond_the_end(name: str) -> None:
    settings = ScheduleSettings(name=name, cycles=2)
    for step in (0, 1, STEPS - 1, STEPS, STEPS + 10):
        assert 0 <= factor(settings, step, STEPS, RATE) <= 1


@pytest.mark.parametrize("name", [name for name in SCHEDULES if name != "constant"])
def test_warm_up_rises_linearly_from_zero(name: str) -> None:
    settings = ScheduleSettings(name=name, warmup_steps=4)
    assert [factor(settings, step, STEPS, RATE) for step in range(4)] == [0, 0.25, 0.5, 0.75]


def test_a_longer_run_has_the_same_past_only_where_the_rate_does_not_look_at_the_end() -> None:
    assert same_past(ScheduleSettings(name="constant_with_warmup", warmup_steps=3), 10, 20, RATE)
    assert not same_past(ScheduleSettings(name="cosine"), 10, 20, RATE)


def test_a_warm_up_without_effect_is_refused() -> None:
    with pytest.raises(ValidationError, match="constant_with_warmup"):
        ScheduleSettings(name="constant", warmup_steps=500)


def test_an_unknown_name_is_refused_with_a_suggestion() -> None:
    with pytest.raises(ValidationError, match='Did you mean "cosine"'):
        ScheduleSettings(name="cosin")
