"""Optimizers: what they compute, what they need installed, and that a saved state goes on exactly."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from scumble.errors import ConfigError
from scumble.training.optimizers import (
    OptimizerSettings,
    ProdigySettings,
    build_optimizer,
    group_values,
    optimizer_data,
    restore_optimizer,
    skipping,
    skips_on_device,
)

SETTINGS = {
    "adamw": OptimizerSettings(learning_rate=0.01),
    "adamw8bit": OptimizerSettings(name="adamw8bit", learning_rate=0.01),
    "prodigy": OptimizerSettings(
        name="prodigy", learning_rate=1.0, prodigy=ProdigySettings(bias_correction=True)
    ),
}


def parameters(seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((4, 1100), (5,))]


def give_gradients(tensors: list[nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for tensor in tensors:
        tensor.grad = torch.randn(tensor.shape, generator=generator)


def groups(tensors: list[nn.Parameter], rate: float) -> list[dict[str, object]]:
    return [
        {"params": [tensors[0]], "lr": rate, "name": "a"},
        {"params": [tensors[1]], "lr": rate, "name": "b"},
    ]


def test_adamw_equals_torchs_plain_implementation() -> None:
    mine, plain = parameters(), parameters()
    settings = OptimizerSettings(learning_rate=0.01, betas=(0.8, 0.95), weight_decay=0.1, epsilon=1e-6)
    optimizer = build_optimizer(settings, groups(mine, 0.01))
    reference = torch.optim.AdamW(
        plain, lr=0.01, betas=(0.8, 0.95), weight_decay=0.1, eps=1e-6, foreach=False, fused=False
    )
    for step in range(5):
        give_gradients(mine, step)
        give_gradients(plain, step)
        optimizer.step()
        reference.step()
    for a, b in zip(mine, plain, strict=True):
        assert torch.allclose(a, b, atol=1e-6)


@pytest.mark.parametrize("name", SETTINGS)
def test_a_saved_state_goes_on_exactly(name: str) -> None:
    settings = SETTINGS[name]
    straight = parameters()
    optimizer = build_optimizer(settings, groups(straight, settings.learning_rate))
    fresh = group_values(optimizer)
    for step in range(3):
        give_gradients(straight, step)
        optimizer.step()
    names = {parameter: f"p{n}" for n, parameter in enumerate(straight)}
    tensors, values = optimizer_data(optimizer, names, fresh)
    tensors = {key: tensor.clone() for key, tensor in tensors.items()}
    values = json.loads(json.dumps(values))

    resumed = [nn.Parameter(parameter.detach().clone()) for parameter in straight]
    other = build_optimizer(settings, groups(resumed, settings.learning_rate))
    restore_optimizer(other, {parameter: f"p{n}" for n, parameter in enumerate(resumed)}, tensors, values)
    for step in range(3, 6):
        for tensors_, stepper in ((straight, optimizer), (resumed, other)):
            give_gradients(tensors_, step)
            stepper.step()
    for a, b in zip(straight, resumed, strict=True):
        assert torch.equal(a, b)


def test_settings_changed_on_purpose_survive_a_restore() -> None:
    tensors = parameters()
    names = {parameter: f"p{n}" for n, parameter in enumerate(tensors)}
    optimizer = build_optimizer(SETTINGS["prodigy"], groups(tensors, 1.0))
    fresh = group_values(optimizer)
    give_gradients(tensors, 0)
    optimizer.step()
    saved, values = optimizer_data(optimizer, names, fresh)
    changed = SETTINGS["prodigy"].model_copy(update={"weight_decay": 0.5})
    other = build_optimizer(changed, groups(tensors, 1.0))
    restore_optimizer(other, names, saved, values)
    assert [group["weight_decay"] for group in other.param_groups] == [0.5, 0.5]
    assert [group["k"] for group in other.param_groups] == [1, 1], "what Prodigy counts is state"


def test_without_its_state_the_optimizer_goes_elsewhere() -> None:
    """The test above can fail: a cold start differs."""
    straight = parameters()
    optimizer = build_optimizer(SETTINGS["adamw"], groups(straight, 0.01))
    for step in range(3):
        give_gradients(straight, step)
        optimizer.step()
    cold = [nn.Parameter(parameter.detach().clone()) for parameter in straight]
    other = build_optimizer(SETTINGS["adamw"], groups(cold, 0.01))
    for tensors, stepper in ((straight, optimizer), (cold, other)):
        give_gradients(tensors, 3)
        stepper.step()
    assert not torch.equal(straight[0], cold[0])


def test_a_step_left_out_on_the_device_leaves_weights_and_state() -> None:
    tensors = parameters()
    optimizer = build_optimizer(SETTINGS["adamw"], groups(tensors, 0.01))
    assert skips_on_device(optimizer)
    give_gradients(tensors, 0)
    optimizer.step()
    before = [t.detach().clone() for t in tensors]
    moments = optimizer.state[tensors[0]]["exp_avg"].clone()
    for tensor in tensors:
        tensor.grad = torch.full_like(tensor, float("nan"))
    with skipping(optimizer, torch.tensor(1.0)):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, tensors, strict=True))
    assert torch.equal(moments, optimizer.state[tensors[0]]["exp_avg"])
    assert optimizer.state[tensors[0]]["step"].item() == 1
    give_gradients(tensors, 1)
    with skipping(optimizer, torch.tensor(0.0)):
        optimizer.step()
    assert not torch.equal(before[0], tensors[0])


@pytest.mark.parametrize(("name", "package"), [("prodigy", "prodigyopt")])
def test_a_missing_package_is_named_with_what_to_do(
    name: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=rf'{package}.*pip install "scumble.*choose optimizer "adamw"'):
        build_optimizer(OptimizerSettings(name=name, learning_rate=1.0), groups(parameters(), 1.0))


def test_prodigy_at_a_rate_for_adamw_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"learning_rate = 1\.0"):
        build_optimizer(OptimizerSettings(name="prodigy"), groups(parameters(), 1e-4))


def test_settings_without_effect_or_sense_are_refused() -> None:
    with pytest.raises(ValidationError, match="no effect on 'adamw'"):
        OptimizerSettings(prodigy=ProdigySettings(d_coefficient=2))
    with pytest.raises(ValidationError, match=r"\[0, 1\)"):
        OptimizerSettings(betas=(0.9, 1.0))
    with pytest.raises(ValidationError, match='Did you mean "prodigy"'):
        OptimizerSettings(name="prodigi")
