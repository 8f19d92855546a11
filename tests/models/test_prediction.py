"""prediction_from: what a base predicts, told from its scheduler config."""

from __future__ import annotations

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
)
from diffusers.pipelines.flux.pipeline_flux import calculate_shift

from scumble.errors import ModelError
from scumble.models.prediction import (
    Epsilon,
    Flow,
    Prediction,
    Velocity,
    prediction_from,
    prediction_type,
    shifted,
)

SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


@pytest.mark.parametrize("scheduler", [DDIMScheduler, PNDMScheduler, EulerDiscreteScheduler, DDPMScheduler])
def test_every_scheduler_of_a_base_gives_its_own_schedule(scheduler: type) -> None:
    built = scheduler(**SCHEDULE, prediction_type="v_prediction")
    prediction = prediction_from(built.config)
    assert isinstance(prediction, Velocity)
    torch.testing.assert_close(prediction.alphas_cumprod, built.alphas_cumprod)


def test_zero_terminal_snr_is_honoured() -> None:
    config = {**SCHEDULE, "prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    prediction = prediction_from(config)
    assert prediction.snr(torch.tensor([999])).item() == 0
    torch.testing.assert_close(prediction.alphas_cumprod, DDPMScheduler(**config).alphas_cumprod)


def test_min_snr_is_finite_at_zero_snr() -> None:
    prediction = prediction_from({**SCHEDULE, "prediction_type": "epsilon", "rescale_betas_zero_snr": True})
    snr = prediction.snr(torch.tensor([999]))
    assert (snr.clamp(max=5.0) * prediction.snr_weight(torch.tensor([999]), snr)).isfinite().all()


def test_missing_type_is_epsilon_with_a_note() -> None:
    kind, note = prediction_type(SCHEDULE)
    assert kind == "epsilon" and "prediction_type" in note
    assert isinstance(prediction_from(SCHEDULE), Epsilon)


def test_flow_is_told_by_its_scheduler() -> None:
    assert isinstance(prediction_from({"_class_name": "FlowMatchEulerDiscreteScheduler"}), Flow)
    assert prediction_from(FlowMatchEulerDiscreteScheduler(shift=2.0).config).shift == 2.0
    sampler = DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    assert prediction_from(sampler.config).shift == 3.0


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_levels_of_a_flow_are_the_schedulers_own(shift: float) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    prediction, steps = prediction_from(scheduler.config), scheduler.config.num_train_timesteps
    t = prediction.from_uniform(torch.arange(steps, 0, -1).float() / steps)
    torch.testing.assert_close(t, scheduler.sigmas)
    torch.testing.assert_close(1000 * t, scheduler.timesteps)
    x0, n = torch.randn(2, 5, 16, 3, 3, generator=torch.Generator().manual_seed(0))
    at = scheduler.timesteps[[0, 17, 500, 900, 999]]
    torch.testing.assert_close(prediction.noisy(x0, n, at / 1000), scheduler.scale_noise(x0, at, n))


@pytest.mark.parametrize("kind", ["exponential", "linear"])
def test_dynamic_shift_is_the_pipelines(kind: str) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.7, max_shift=1.3, time_shift_type=kind
    )
    prediction = prediction_from(scheduler.config)
    assert prediction.shift == 1  # diffusers' scripts train with the schedule as it is before any picture
    for tokens in (256, 1024, 4096):
        mu = calculate_shift(tokens, 256, 4096, 0.7, 1.3)
        u = torch.linspace(0.05, 0.95, 7)
        theirs = scheduler.time_shift(mu, 1.0, u)
        torch.testing.assert_close(shifted(u, prediction.shift_at(tokens, 1024)), theirs)


def test_a_fixed_shift_grows_with_the_side() -> None:
    assert Flow(3.0).shift_at(4096, 4096) == 3.0
    assert Flow(3.0).shift_at(1024, 4096) == 1.5


def test_shifts_multiply_and_keep_both_ends() -> None:
    u = torch.linspace(0, 1, 21)
    torch.testing.assert_close(shifted(shifted(u, 3.0), 0.5), shifted(u, 1.5))
    assert shifted(u, 3.0)[[0, -1]].tolist() == [0, 1] and shifted(u, 1.0) is u


@pytest.mark.parametrize("name", ["epsilon", "v_prediction"])
def test_a_schedule_has_no_shift_by_resolution(name: str) -> None:
    prediction: Prediction = prediction_from({**SCHEDULE, "prediction_type": name})
    with pytest.raises(ModelError, match=f"predicts {name}"):
        prediction.shift_at(1, 1)


@pytest.mark.parametrize(
    ("config", "word"),
    [
        ({**SCHEDULE, "prediction_type": "sample"}, "'sample'"),
        ({"_class_name": "EDMEulerScheduler", "prediction_type": "epsilon"}, "EDMEulerScheduler"),
        ({"beta_schedule": "squiggle"}, "squiggle"),
    ],
)
def test_what_is_not_trained_is_refused_by_name(config: dict[str, object], word: str) -> None:
    with pytest.raises(ModelError, match=word):
        prediction_from(config)
