"""prediction_from: what a base predicts, told from its scheduler config."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler, PNDMScheduler

from scumble.errors import ModelError
from scumble.models.prediction import Epsilon, Flow, Velocity, prediction_from, prediction_type

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
