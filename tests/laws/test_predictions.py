"""The law of every prediction: what the denoiser is asked for gives the clean latents back."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr
from hypothesis import given, settings
from hypothesis import strategies as st

from scumble.models.prediction import Epsilon, Flow, Prediction, Velocity, prediction_from

SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SCHEDULER = DDPMScheduler(**SCHEDULE)
ALL: dict[str, Prediction] = {
    "epsilon": Epsilon(SCHEDULER.alphas_cumprod),
    "v_prediction": Velocity(SCHEDULER.alphas_cumprod),
    "flow": Flow(),
    "flow, shifted": Flow(3.0),
}
every = pytest.mark.parametrize("prediction", ALL.values(), ids=ALL.keys())
scheduled = pytest.mark.parametrize("name", ["epsilon", "v_prediction"])


def draw(seed: int, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(x0, noise, uniform numbers in [0, 0.995): the very end of a schedule has no signal left to invert)."""
    rng = torch.Generator().manual_seed(seed)
    x0, n = torch.randn(2, count, 4, 3, 5, generator=rng)
    return x0, n, torch.rand(count, generator=rng) * 0.995


@every
@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 2**32), count=st.integers(1, 5))
def test_clean_inverts_target(prediction: Prediction, seed: int, count: int) -> None:
    x0, n, u = draw(seed, count)
    t = prediction.from_uniform(u)
    back = prediction.clean(prediction.noisy(x0, n, t), prediction.target(x0, n, t), t)
    # epsilon divides by the signal, 0.07 at the end of the schedule: rounding grows by as much
    torch.testing.assert_close(back, x0, atol=1e-4, rtol=1e-4)


@every
def test_noise_grows_with_uniform(prediction: Prediction) -> None:
    t = prediction.from_uniform(torch.linspace(0, 0.999, 50))
    assert (prediction.noise(t).diff() > 0).all() and (prediction.signal(t).diff() < 0).all()
    assert (prediction.snr(t)[1:].diff() < 0).all()


@every
def test_snr_weight_turns_a_weight_on_x0_into_one_on_the_answer(prediction: Prediction) -> None:
    """Hang et al. 2023, section 3.4: |x0 - clean|^2 = snr_weight |answer - target|^2."""
    x0, n, u = draw(0, 6)
    t = prediction.from_uniform(u * 0.9 + 0.05)
    x = prediction.noisy(x0, n, t)
    error = torch.randn_like(x0)
    wrong = prediction.clean(x, prediction.target(x0, n, t) + error, t)
    ratio = (wrong - x0).square().flatten(1).mean(1) / error.square().flatten(1).mean(1)
    torch.testing.assert_close(prediction.snr_weight(t, prediction.snr(t)), ratio, rtol=2e-3, atol=1e-6)


@scheduled
def test_scheduled_predictions_are_those_of_diffusers(name: str) -> None:
    x0, n, _ = draw(1, 7)
    t = torch.tensor([0, 1, 17, 250, 500, 998, 999])
    scheduler = DDPMScheduler(**SCHEDULE, prediction_type=name)
    prediction = prediction_from(scheduler.config)
    assert prediction.name == name
    torch.testing.assert_close(prediction.noisy(x0, n, t), scheduler.add_noise(x0, n, t))
    theirs = n if name == "epsilon" else scheduler.get_velocity(x0, n, t)
    torch.testing.assert_close(prediction.target(x0, n, t), theirs)
    torch.testing.assert_close(prediction.snr(t), compute_snr(scheduler, t))


@scheduled
@pytest.mark.parametrize("gamma", [1.0, 5.0, 20.0])
def test_min_snr_weights_are_those_of_the_training_scripts(name: str, gamma: float) -> None:
    t = torch.arange(0, 1000, 13)
    scheduler = DDPMScheduler(**SCHEDULE, prediction_type=name)
    snr = compute_snr(scheduler, t)
    theirs = torch.stack([snr, gamma * torch.ones_like(t)], dim=1).min(dim=1)[0]
    theirs = theirs / snr if name == "epsilon" else theirs / (snr + 1)
    prediction = prediction_from(scheduler.config)
    ours = prediction.snr(t).clamp(max=gamma) * prediction.snr_weight(t, prediction.snr(t))
    torch.testing.assert_close(ours, theirs)


@every
def test_noisy_keeps_the_dtype_and_from_uniform_stays_in_range(prediction: Prediction) -> None:
    x0, n, _ = draw(2, 3)
    t = prediction.from_uniform(torch.tensor([0.0, 0.5, 1.0 - 2**-24]))
    assert prediction.noisy(x0.bfloat16(), n, t).dtype == torch.bfloat16
    if not isinstance(prediction, Flow):
        assert t.tolist() == [0, 500, 999]
