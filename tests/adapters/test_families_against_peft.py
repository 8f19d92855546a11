"""Equality with peft's DoRA, LoHa, LoKr and IA3: the same values give the same outputs and gradients."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from scumble.adapters import FAMILIES, Adapter, Delta
from scumble.adapters.delta import DeltaSettings
from scumble.adapters.lokr import factorize

peft = pytest.importorskip("peft")


class Model(nn.Module):
    """A linear layer, a convolution and a 1x1 convolution: (B, 12, 8, 8) -> (B, 64, 24)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(12, 20, 3, stride=2, padding=1)
        self.point = nn.Conv2d(20, 18, 1)
        self.linear = nn.Linear(18, 24)

    def forward(self, x: Tensor) -> Tensor:
        """A picture to rows."""
        h = torch.tanh(self.point(torch.tanh(self.conv(x))))
        return self.linear(h.flatten(2).transpose(1, 2))


TARGETS = ["conv", "point", "linear"]
CASES: dict[str, tuple[str, dict[str, Any], Any]] = {
    "dora": ("dora", {"rank": 3, "alpha": 5.0}, peft.LoraConfig(r=3, lora_alpha=5, use_dora=True)),
    "dora stabilized": (
        "dora",
        {"rank": 4, "alpha": 3.0, "rank_stabilized": True},
        peft.LoraConfig(r=4, lora_alpha=3, use_dora=True, use_rslora=True),
    ),
    "loha": ("loha", {"rank": 3, "alpha": 6.0}, peft.LoHaConfig(r=3, alpha=6)),
    "loha tucker": (
        "loha",
        {"rank": 3, "alpha": 6.0, "tucker": True},
        peft.LoHaConfig(r=3, alpha=6, use_effective_conv2d=True),
    ),
    "lokr": (
        "lokr",
        {"rank": 2, "factor": 2, "alpha": 5.0},
        peft.LoKrConfig(r=2, alpha=5, decompose_factor=2),
    ),
    "lokr whole": ("lokr", {"rank": 9}, peft.LoKrConfig(r=9, alpha=9)),
    "lokr both": (
        "lokr",
        {"rank": 1, "alpha": 5.0, "decompose_both": True},
        peft.LoKrConfig(r=1, alpha=5, decompose_both=True),
    ),
    "lokr tucker": (
        "lokr",
        {"rank": 2, "alpha": 5.0, "factor": 2, "tucker": True},
        peft.LoKrConfig(r=2, alpha=5, decompose_factor=2, use_effective_conv2d=True),
    ),
}
NAMES = {
    "down": "lora_A",
    "up": "lora_B",
    "magnitude": "lora_magnitude_vector",
    **{f"w{n}{end}": f"hada_w{n}{end}" for n in (1, 2) for end in ("_a", "_b")},
    **{f"t{n}": f"hada_t{n}" for n in (1, 2)},
}
"""Our tensor -> peft's; LoKr's are `lokr_` and ours."""


def pair(case: str, dtype: torch.dtype) -> tuple[nn.Module, nn.Module, list[tuple[Tensor, Tensor]]]:
    """peft's model and ours with the same random values, and their parameters in pairs."""
    family, options, config = CASES[case]
    torch.manual_seed(0)
    base = Model().requires_grad_(False)
    mine = copy.deepcopy(base)
    config = copy.deepcopy(config)
    config.target_modules = TARGETS
    theirs = peft.inject_adapter_in_model(config, copy.deepcopy(base))
    settings: DeltaSettings = FAMILIES.get(family).settings(**options)
    adapter = Adapter.inject({"model": mine}, "model.*", settings)
    mine, theirs = mine.to(dtype), theirs.to(dtype)
    rng = torch.Generator().manual_seed(1)
    pairs = []
    for path, delta in adapter.deltas.items():
        module = theirs.get_submodule(path.removeprefix("model."))
        for name, parameter in delta.named_parameters():
            other = value_of(module, f"lokr_{name}" if family == "lokr" else NAMES[name])
            with torch.no_grad():
                new = torch.randn(parameter.shape, generator=rng).to(dtype) * 0.3
                new = parameter + new.abs() if name == "magnitude" else new
                parameter.copy_(new)
                other.copy_(new.view(other.shape))
            pairs.append((parameter, other))
    trainable = sum(p.numel() for p in theirs.parameters() if p.requires_grad)
    assert trainable == sum(parameter.numel() for parameter, _ in pairs)  # none more
    return theirs, mine, pairs


def value_of(module: nn.Module, name: str) -> Tensor:
    """peft's parameter of that name."""
    found = getattr(module, name)["default"]
    return found if isinstance(found, Tensor) else found.weight


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_outputs_and_gradients_equal_pefts(case: str, dtype: torch.dtype, tolerance: float) -> None:
    theirs, mine, pairs = pair(case, dtype)
    x = torch.randn(2, 12, 8, 8, generator=torch.Generator().manual_seed(2)).to(dtype)
    torch.manual_seed(0)
    plain = Model().to(dtype)(x)
    my_output, their_output = mine(x), theirs(x)
    assert (my_output - plain).abs().max() > 1e-2
    assert (my_output - their_output).abs().max() <= tolerance
    if case == "loha tucker":
        return  # peft's own backward gives w?_a the other pair's product; ours is checked against differences
    mine_parameters, their_parameters = zip(*pairs, strict=True)
    my_gradients = torch.autograd.grad(my_output.square().mean(), mine_parameters)
    their_gradients = torch.autograd.grad(their_output.square().mean(), their_parameters)
    for a, b in zip(my_gradients, their_gradients, strict=True):
        assert (a - b.reshape(a.shape)).abs().max() <= tolerance
        assert a.abs().max() > 0


def test_the_factors_are_pefts_where_those_are_small_and_large() -> None:
    from peft.tuners.lokr.layer import factorization

    for width in (1, 2, 12, 30, 64, 127, 320, 640, 768, 1280, 2560, 10240):
        assert factorize(width, None) == factorization(width, -1)
        for factor in (1, 2, 3, 4, 8, 16):
            assert factorize(width, factor) == tuple(sorted(factorization(width, factor)))


def test_ia3_is_pefts_up_to_the_identity() -> None:
    torch.manual_seed(0)
    base = Model().requires_grad_(False)
    mine = copy.deepcopy(base)
    theirs = peft.inject_adapter_in_model(
        peft.IA3Config(target_modules=["conv", "linear"], feedforward_modules=["linear"]), base
    )
    deltas: dict[str, Delta] = {}
    for name, inputs in (("conv", False), ("linear", True)):
        settings = FAMILIES.get("ia3").settings(inputs=inputs)
        deltas |= Adapter.inject({"model": mine}, f"model.{name}", settings, name=name).deltas
    for path, delta in deltas.items():
        factors = next(delta.parameters())
        with torch.no_grad():
            factors.copy_(torch.randn(factors.shape) * 0.3)
            other = theirs.get_submodule(path.removeprefix("model.")).ia3_l["default"]
            other.copy_((1 + factors).view(other.shape))
    x = torch.randn(2, 12, 8, 8)
    # peft scales what a convolution gives with its bias; ours is a change of the weight, which bias has no part in
    bias = theirs.conv.base_layer.bias
    with torch.no_grad():
        mine.conv.base.bias.copy_(bias * theirs.conv.ia3_l["default"].flatten())
    assert (mine(x) - theirs(x)).abs().max() < 1e-5
