"""Equality with peft, on a real UNet; and the size of an adapter on the shape of SD 1.5."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from scumble.adapters import Adapter, LoraSettings, resolve

peft = pytest.importorskip("peft")

SD15 = {"cross_attention_dim": 768}
"""What SD 1.5's UNet says besides diffusers' defaults."""


@pytest.fixture(scope="module")
def unet() -> UNet2DConditionModel:
    """A small UNet with SD's kinds of blocks, frozen."""
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=24,
        attention_head_dim=4,
        norm_num_groups=8,
    ).requires_grad_(False)


ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
CONV = ["conv1", "conv2", "conv_shortcut", "conv_in", "downsamplers.0.conv", "upsamplers.0.conv", "proj_in"]
CONV_PATTERNS = [
    "*.conv?",
    "*.conv_shortcut",
    "unet.conv_in",
    "*.downsamplers.0.conv",
    "*.upsamplers.0.conv",
    "*.proj_in",
]
CASES: dict[str, tuple[Any, LoraSettings, dict[str, Any]]] = {
    "attention": ("attention", LoraSettings(rank=4), {"r": 4, "lora_alpha": 4, "target_modules": ATTENTION}),
    "alpha": (
        "attention",
        LoraSettings(rank=4, alpha=10),
        {"r": 4, "lora_alpha": 10, "target_modules": ATTENTION},
    ),
    "rsLoRA": (
        "attention",
        LoraSettings(rank=4, alpha=3, rank_stabilized=True),
        {"r": 4, "lora_alpha": 3, "use_rslora": True, "target_modules": ATTENTION},
    ),
    "convolutions": (CONV_PATTERNS, LoraSettings(rank=3), {"r": 3, "lora_alpha": 3, "target_modules": CONV}),
    "patterns": (
        ["attention", *CONV_PATTERNS],
        LoraSettings(
            rank=4,
            alpha=4,
            rank_pattern={"*.attn2.to_k": 2, "*.conv1": 6},
            alpha_pattern={"*.to_out.0": 1.5, "unet.conv_in": 9.0},
        ),
        {
            "r": 4,
            "lora_alpha": 4,
            "target_modules": ATTENTION + CONV,
            "rank_pattern": {"attn2.to_k": 2, "conv1": 6},
            "alpha_pattern": {"to_out.0": 1.5, "conv_in": 9.0},
        },
    ),
}


def theirs_and_mine(
    unet: UNet2DConditionModel, case: str
) -> tuple[UNet2DConditionModel, UNet2DConditionModel, Adapter]:
    """peft's model and ours, with the same random values in their adapters."""
    targets, settings, config = CASES[case]
    theirs, mine = copy.deepcopy(unet), copy.deepcopy(unet)
    theirs.add_adapter(peft.LoraConfig(**config))
    adapter = Adapter.inject({"unet": mine}, targets, settings)
    rng = torch.Generator().manual_seed(1)
    modules = dict(theirs.named_modules())
    with torch.no_grad():
        for path, delta in adapter.deltas.items():
            module = modules[path.removeprefix("unet.")]
            for name, half in (("down", module.lora_A), ("up", module.lora_B)):
                value = torch.randn(delta.get_parameter(name).shape, generator=rng) * 0.1
                delta.get_parameter(name).copy_(value)
                half["default"].weight.copy_(value)
    trainable = sum(p.numel() for p in theirs.parameters() if p.requires_grad)
    assert trainable == adapter.parameter_count  # the same layers, none more
    return theirs, mine, adapter


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Latents, timesteps, text."""
    rng = torch.Generator().manual_seed(2)
    latents, text = torch.randn(2, 4, 8, 8, generator=rng), torch.randn(2, 7, 24, generator=rng)
    return latents.to(dtype), torch.tensor([10, 700]), text.to(dtype)


def gradients(
    model: UNet2DConditionModel, parameters: list[Tensor], dtype: torch.dtype
) -> tuple[Tensor, list[Tensor]]:
    """The output, and the gradient of its mean square."""
    output = model(*inputs(dtype)).sample
    return output, list(torch.autograd.grad(output.square().mean(), parameters))


def pairs(theirs: UNet2DConditionModel, adapter: Adapter) -> tuple[list[Tensor], list[Tensor]]:
    """peft's parameters and ours, in one order."""
    modules = dict(theirs.named_modules())
    their_list: list[Tensor] = []
    my_list: list[Tensor] = []
    for path, delta in adapter.deltas.items():
        module = modules[path.removeprefix("unet.")]
        their_list += [module.lora_A["default"].weight, module.lora_B["default"].weight]
        my_list += [delta.get_parameter("down"), delta.get_parameter("up")]
    return their_list, my_list


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-10)])
def test_outputs_and_gradients_equal_pefts(
    unet: UNet2DConditionModel, case: str, dtype: torch.dtype, tolerance: float
) -> None:
    theirs, mine, adapter = theirs_and_mine(unet, case)
    theirs, mine = theirs.to(dtype), mine.to(dtype)
    base = copy.deepcopy(unet).to(dtype)(*inputs(dtype)).sample
    their_parameters, my_parameters = pairs(theirs, adapter)
    their_output, their_gradients = gradients(theirs, their_parameters, dtype)
    my_output, my_gradients = gradients(mine, my_parameters, dtype)
    assert (my_output - base).abs().max() > 1e-3  # the adapters do something
    assert (my_output - their_output).abs().max() <= tolerance
    for a, b in zip(my_gradients, their_gradients, strict=True):
        assert (a - b).abs().max() <= tolerance
        assert a.abs().max() > 0


def test_on_the_shape_of_sd15() -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel(**SD15)
    adapter = Adapter.inject({"unet": unet}, "attention", LoraSettings(rank=4))
    assert len(adapter) == 128
    assert adapter.parameter_count == 797_184
    counts = {
        preset: len(resolve({"unet": unet}, preset).layers)
        for preset in ("attention+mlp", "all-linear", "conv")
    }
    # 16 blocks with two feed-forward layers each; 22 resnets and 2 layers embed the time; 98 convolutions
    assert counts == {"attention+mlp": 160, "all-linear": 184, "conv": 98}
    adapter.eject()
    assert not any("Adapted" in type(module).__name__ for module in unet.modules())
