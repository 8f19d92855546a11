"""Text-to-image: what its plan trains, says, measures and proves."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from scumble.adapters.lora import LoraSettings
from scumble.errors import NoEffect, NoLayerMatches, TrainingError, UnknownName
from scumble.methods.method import METHODS
from scumble.methods.parts import HELD_OUT_LEVELS, HeldOutLoss
from scumble.methods.text_to_image import text_to_image
from scumble.models import FAMILIES
from scumble.training.settings import TrainSettings
from tests.training.world import make_plan

SETTINGS = TrainSettings(steps=3, batch=2)


def test_methods_are_found_by_name() -> None:
    assert METHODS.get("text-to-image") is text_to_image
    with pytest.raises(UnknownName, match="text-to-image"):
        METHODS.get("text-to-imagine")


def test_only_the_adapter_trains_and_the_base_answers_as_before() -> None:
    plan, base = make_plan(SETTINGS)
    untouched = FAMILIES.get("sd1").tiny(0)
    mine = {id(p) for t in plan.phases[0].trainables for p in t.parameters.values()}
    assert mine == {id(p) for root in base.roots.values() for p in root.parameters() if p.requires_grad}
    latents, t = torch.randn(1, 4, 8, 8), torch.tensor([300])
    with torch.no_grad():
        ours = base.denoise(latents, t, base.encode_prompts(["a fox"]), None)  # type: ignore[arg-type]
        theirs = untouched.denoise(latents, t, untouched.encode_prompts(["a fox"]), None)  # type: ignore[arg-type]
    assert torch.equal(ours, theirs)


def test_parameters_are_grouped_by_root() -> None:
    plan, _ = make_plan(
        SETTINGS, targets=("attention", "text_encoder.attention"), learning_rates={"text_encoder": 1e-5}
    )
    found = {t.name: (len(t.parameters), t.learning_rate) for t in plan.phases[0].trainables}
    assert found == {"unet": (64, None), "text_encoder": (16, 1e-5)}


def test_a_rate_for_a_root_without_layers_is_refused() -> None:
    with pytest.raises(TrainingError, match="text_encoder"):
        make_plan(SETTINGS, learning_rates={"text_encoder": 1e-5})


def test_a_target_that_matches_nothing_is_refused() -> None:
    with pytest.raises(NoLayerMatches):
        make_plan(SETTINGS, targets="*.attn9.to_q")


def test_the_facts_count() -> None:
    plan, _ = make_plan(SETTINGS, held_out=True)
    facts = plan.facts
    numbers = sum(p.numel() for t in plan.phases[0].trainables for p in t.parameters.values())
    assert (facts["layers"], facts["parameters"], facts["file bytes"]) == (32, numbers, 4 * numbers)
    assert (facts["pictures"], facts["held-out pictures"], facts["steps"]) == (6, 4, 3)


def test_held_out_loss_is_the_mean_over_evenly_spread_levels() -> None:
    plan, base = make_plan(SETTINGS, held_out=True)
    held_out = plan.held_out
    assert isinstance(held_out, HeldOutLoss) and HELD_OUT_LEVELS == 6
    losses, bare = held_out()
    assert losses.shape == bare.shape == (4,)
    batch = held_out._pictures[1]  # pictures 2 and 3
    expected = torch.zeros(2)
    for level in range(6):
        t = torch.full((2,), int((level + 0.5) / 6 * 1000))
        noise = held_out._streams.normal(
            "held-out noise", [2 * 6 + level, 3 * 6 + level], batch.latents.shape[1:]
        )
        assert batch.conditioning is not None
        with torch.no_grad():
            noisy = base.prediction.noisy(batch.latents, noise, t)
            answer = base.denoiser(noisy, t, batch.conditioning.tokens).sample
        expected += (answer - noise).square().mean((1, 2, 3)) / 6
    assert torch.allclose(losses[2:], expected, atol=1e-5)


def test_held_out_loss_sees_the_adapter_and_not_in_the_bases_column() -> None:
    plan, _ = make_plan(SETTINGS, held_out=True)
    assert plan.held_out is not None
    _, bare = plan.held_out()
    for parameter in plan.phases[0].trainables[0].parameters.values():
        parameter.data += 0.1
    losses, still = plan.held_out()
    assert torch.equal(still, bare) and not torch.allclose(losses, bare)


def test_verify_accepts_what_was_trained_and_nothing_else() -> None:
    plan, _ = make_plan(SETTINGS)
    with pytest.raises(NoEffect, match="changes nothing"):
        plan.verify(plan.export())  # `up` is still zero
    for parameter in plan.phases[0].trainables[0].parameters.values():
        parameter.data += 0.1
    state = plan.export()
    assert plan.verify(state) == 0.0
    path, layer = next(iter(state.layers.items()))
    lost = {name: tensor * 0 for name, tensor in layer.tensors.items()}
    broken = replace(state, layers={**state.layers, path: replace(layer, tensors=lost)})
    with pytest.raises(TrainingError, match="answers otherwise"):
        plan.verify(broken)


def test_identity_names_what_a_resume_compares() -> None:
    one, _ = make_plan(SETTINGS)
    two, _ = make_plan(SETTINGS, adapter=LoraSettings(rank=4))
    other, _ = make_plan(SETTINGS, family="sd2")
    assert one.identity != two.identity and one.identity["base"] == two.identity["base"]
    assert one.identity["base"] != other.identity["base"]
