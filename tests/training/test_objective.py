"""The denoising loss, against formulas written out by hand and diffusers' own."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError
from torch.nn import functional

from scumble.adapters.adapter import Adapter
from scumble.adapters.lora import LoraSettings
from scumble.data.record import Batch
from scumble.errors import ScumbleError
from scumble.models import FAMILIES
from scumble.models.family import BaseModel
from scumble.rng import Streams
from scumble.training.objective import DenoisingObjective, ObjectiveSettings
from scumble.training.timesteps import TimestepSettings
from tests.training.world import LatentBatches

STREAMS = Streams(11)


@pytest.fixture(scope="module", params=["sd1", "sd2"])
def base(request: pytest.FixtureRequest) -> BaseModel:
    return FAMILIES.get(request.param).tiny(0)


@pytest.fixture(scope="module")
def batch(base: BaseModel) -> Batch:
    return LatentBatches(base, samples=4).batch([0, 1, 2, 3])


def losses(base: BaseModel, batch: Batch, **settings: object) -> torch.Tensor:
    with torch.no_grad():
        return DenoisingObjective(base, STREAMS, ObjectiveSettings(**settings))(batch)  # type: ignore[arg-type]


def by_hand(base: BaseModel, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(answer, target, t) as diffusers' training script computes them, from the same noise and timesteps."""
    from diffusers import DDPMScheduler

    config = base.pipeline().scheduler.config
    scheduler = DDPMScheduler.from_config(config)
    noise = STREAMS.normal("noise", batch.positions, batch.latents.shape[1:])
    t = (STREAMS.uniform("timestep", batch.positions) * scheduler.config.num_train_timesteps).long()
    noisy = scheduler.add_noise(batch.latents, noise, t)
    target = noise if base.prediction.name == "epsilon" else scheduler.get_velocity(batch.latents, noise, t)
    assert batch.conditioning is not None
    with torch.no_grad():
        answer = base.denoiser(noisy, t, batch.conditioning.tokens).sample
    return answer, target, t


def test_l2_is_what_the_script_of_diffusers_computes(base: BaseModel, batch: Batch) -> None:
    answer, target, _ = by_hand(base, batch)
    expected = functional.mse_loss(answer, target, reduction="none").mean((1, 2, 3))
    assert torch.allclose(losses(base, batch), expected, atol=1e-5)


def test_min_snr_is_what_the_script_of_diffusers_computes(base: BaseModel, batch: Batch) -> None:
    from diffusers import DDPMScheduler
    from diffusers.training_utils import compute_snr

    answer, target, t = by_hand(base, batch)
    snr = compute_snr(DDPMScheduler.from_config(base.pipeline().scheduler.config), t)
    weight = torch.stack([snr, 5 * torch.ones_like(t)], dim=1).min(dim=1)[0]
    weight = weight / snr if base.prediction.name == "epsilon" else weight / (snr + 1)
    expected = functional.mse_loss(answer, target, reduction="none").mean((1, 2, 3)) * weight
    assert torch.allclose(losses(base, batch, snr_gamma=5.0), expected, rtol=1e-3, atol=1e-6)


def test_a_samples_loss_does_not_depend_on_its_batch(base: BaseModel) -> None:
    batches = LatentBatches(base, samples=6)
    together = losses(base, batches.batch([2, 3, 4]), noise_offset=0.1)
    alone = torch.cat([losses(base, batches.batch([n]), noise_offset=0.1) for n in (2, 3, 4)])
    assert torch.allclose(together, alone, atol=1e-5)


def test_noise_offset_moves_whole_channels(base: BaseModel, batch: Batch) -> None:
    plain = DenoisingObjective(base, STREAMS).noise(batch.positions, batch.latents.shape[1:])
    moved = DenoisingObjective(base, STREAMS, ObjectiveSettings(noise_offset=0.1)).noise(
        batch.positions, batch.latents.shape[1:]
    )
    shift = moved - plain
    assert torch.allclose(shift, shift[:, :, :1, :1].expand_as(shift), atol=1e-6)
    assert 0.03 < shift[:, :, 0, 0].std() < 0.3


def test_weights_multiply(base: BaseModel, batch: Batch) -> None:
    weight = torch.tensor([0.0, 0.5, 1.0, 2.0])
    assert torch.allclose(losses(base, replace(batch, weight=weight)), losses(base, batch) * weight)


def test_the_mean_of_a_masked_sample_is_over_its_mask(base: BaseModel, batch: Batch) -> None:
    answer, target, _ = by_hand(base, batch)
    mask = torch.zeros(4, 1, 4, 4)
    mask[:, :, :2] = 1.0
    mask[1] = 0.0  # nothing of it counts
    error = functional.mse_loss(answer, target, reduction="none")
    expected = error[:, :, :2].mean((1, 2, 3))
    expected[1] = 0
    assert torch.allclose(losses(base, replace(batch, mask=mask)), expected, atol=1e-5)


def test_outside_the_mask_the_gradient_is_exactly_zero(base: BaseModel, batch: Batch) -> None:
    mask = torch.zeros(4, 1, 4, 4)
    mask[:, :, :, 0] = 1.0
    target = torch.zeros(4, 4, 4, 4, requires_grad=True)
    error = functional.mse_loss(torch.ones(4, 4, 4, 4), target, reduction="none")
    from scumble.training.objective import _mean

    _mean(error, mask).sum().backward()
    assert target.grad is not None
    assert (target.grad[:, :, :, 1:] == 0).all() and (target.grad[:, :, :, 0] != 0).all()


def test_huber_equals_l2_near_zero_and_is_below_it_far_away(base: BaseModel, batch: Batch) -> None:
    l2 = losses(base, batch)
    assert torch.allclose(losses(base, batch, loss="huber", huber_delta=1e3), l2, atol=1e-5)
    assert (losses(base, batch, loss="huber", huber_delta=0.1) < l2).all()


def test_levels_are_kept_to_their_range(base: BaseModel) -> None:
    settings = ObjectiveSettings(timesteps=TimestepSettings(minimum=0.5, maximum=0.6))
    t = DenoisingObjective(base, STREAMS, settings).timesteps(tuple(range(200)), (200, 4, 4, 4))
    assert t.min() >= 500 and t.max() < 600


def test_captions_are_encoded_where_no_embedding_is_given(base: BaseModel, batch: Batch) -> None:
    assert torch.allclose(losses(base, replace(batch, conditioning=None)), losses(base, batch), atol=1e-5)


def test_only_roots_that_train_are_registered_and_the_base_keeps_its_mode() -> None:
    base = FAMILIES.get("sd1").tiny(0)
    with Adapter.inject(base.roots, "attention", LoraSettings(rank=2, dropout=0.5)) as adapter:
        objective = DenoisingObjective(base, STREAMS)
        assert list(objective.roots) == ["unet"]
        assert sum(p.requires_grad for p in objective.parameters()) == len(list(adapter.parameters()))
        objective.train()
        assert all(delta.training for delta in adapter.deltas.values())
        assert not base.denoiser.training and not base.denoiser.conv_in.training
        objective.eval()
        assert not any(delta.training for delta in adapter.deltas.values())


def test_shifted_levels_take_the_place_of_the_bases_own(base: BaseModel) -> None:
    u = STREAMS.uniform("timestep", (0, 1, 2))
    settings = ObjectiveSettings(timesteps=TimestepSettings(shift=3.0))
    found = DenoisingObjective(base, STREAMS, settings).timesteps((0, 1, 2), (3, 4, 8, 8))
    assert torch.equal(found, base.prediction.from_uniform(3 * u / (1 + 2 * u)))


def test_the_error_in_the_clean_latents(base: BaseModel, batch: Batch) -> None:
    answer, _, t = by_hand(base, batch)
    noise = STREAMS.normal("noise", batch.positions, batch.latents.shape[1:])
    clean = base.prediction.clean(base.prediction.noisy(batch.latents, noise, t), answer, t)
    expected = (clean - batch.latents).square().mean((1, 2, 3))
    torch.testing.assert_close(losses(base, batch, measured="clean"), expected, rtol=1e-3, atol=1e-5)
    weighted = expected * base.prediction.snr(t).clamp(max=5.0)
    found = losses(base, batch, measured="clean", snr_gamma=5.0)
    torch.testing.assert_close(found, weighted, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"weighting": "cosmap"}, 'weighting = "cosmap" is for flow matching'),
        ({"timesteps": {"shift": "resolution"}}, "by resolution is for flow matching"),
    ],
)
def test_what_is_for_flow_matching_is_refused_elsewhere(
    base: BaseModel, settings: dict[str, object], match: str
) -> None:
    with pytest.raises(ScumbleError, match=match):
        DenoisingObjective(base, STREAMS, ObjectiveSettings(**settings))  # type: ignore[arg-type]


def test_two_weightings_are_refused() -> None:
    with pytest.raises(ValidationError, match="both weigh noise levels"):
        ObjectiveSettings(weighting="cosmap", snr_gamma=5.0)


def test_a_delta_without_effect_is_refused() -> None:
    with pytest.raises(ValidationError, match='set loss = "huber"'):
        ObjectiveSettings(huber_delta=0.5)
