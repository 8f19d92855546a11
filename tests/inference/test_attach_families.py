"""LoHa, LoKr, IA3 and OFT at the door of an SDXL pipeline: peft's folders and LyCORIS's files act as in their own tool.

In float64, where rounding can't hide a difference nor be taken for one: in float32 a strong LoHa moves an output by
more through the order of its products alone than a wrong scale would in a weak one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from scumble.inference.attach import load_adapter, unload_adapters
from tests.formats.sdxl import outputs, tiny_sdxl

ROOTS = ("unet", "text_encoder", "text_encoder_2")
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0", "q_proj", "k_proj", "v_proj", "out_proj"]
EVERY = [*ATTENTION, "ff.net.0.proj", "fc1", "proj_in", "conv1", "conv_shortcut"]
PEFT: dict[str, Callable[[Any], Any]] = {
    "loha": lambda peft: peft.LoHaConfig(r=4, alpha=3, target_modules=EVERY, rank_pattern={"to_q": 2}),
    "loha cores": lambda peft: peft.LoHaConfig(r=4, alpha=3, target_modules=EVERY, use_effective_conv2d=True),
    "lokr": lambda peft: peft.LoKrConfig(r=2, alpha=3, target_modules=EVERY, alpha_pattern={"to_k": 5}),
    "lokr both": lambda peft: peft.LoKrConfig(
        r=1, alpha=3, target_modules=EVERY, decompose_both=True, decompose_factor=8
    ),
    "ia3": lambda peft: peft.IA3Config(target_modules=EVERY, feedforward_modules=["to_out.0", "fc1"]),
    "oft": lambda peft: peft.OFTConfig(target_modules=ATTENTION, oft_block_size=4, use_cayley_neumann=False),
}


def exact() -> Any:
    """The toy pipeline in float64."""
    pipeline = tiny_sdxl()
    for root in ROOTS:
        getattr(pipeline, root).double()
    return pipeline


@torch.no_grad()
def stir(parameters: Iterator[nn.Parameter], size: float) -> None:
    """As if trained."""
    generator = torch.Generator().manual_seed(0)
    for parameter in parameters:
        parameter.add_(size * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))


@pytest.fixture(scope="module")
def pipeline() -> Any:
    """One for all tests, which leave it as it was."""
    return exact()


def check(pipeline: Any, path: Path, theirs: dict[str, torch.Tensor], acting: tuple[str, ...]) -> None:
    """What their tool's modules gave, and every bit of the base's outputs afterwards."""
    base = outputs(pipeline)
    load_adapter(pipeline, path, quiet=True)
    ours = outputs(pipeline)
    for name, output in theirs.items():
        effect = (output - base[name]).abs().max()
        assert (effect > 1e-2) == name.startswith(acting), f"{name}: it must act, or this shows nothing"
        assert (ours[name] - output).abs().max() <= 1e-9 * (1 + effect), name
    unload_adapters(pipeline)
    assert all(torch.equal(output, base[name]) for name, output in outputs(pipeline).items())


@pytest.mark.parametrize("case", PEFT)
def test_pefts_folders_act_as_peft_does(case: str, pipeline: Any, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    other = exact()
    for root in ROOTS:
        wrapped = peft.get_peft_model(getattr(other, root), PEFT[case](peft)).double().eval()
        stir((p for p in wrapped.parameters() if p.requires_grad), 0.02 if case == "oft" else 0.2)
        wrapped.save_pretrained(str(tmp_path / root))
    check(pipeline, tmp_path, outputs(other), ROOTS)


@pytest.mark.parametrize("size", [0.1, 0.2])
def test_a_rank_stabilised_loha_acts_as_lycoris_does(size: float, pipeline: Any, tmp_path: Path) -> None:
    lycoris = pytest.importorskip("lycoris")
    network_class = lycoris.LycorisNetwork
    before, network_class.LORA_PREFIX = network_class.LORA_PREFIX, "lora_unet"
    try:
        network_class.apply_preset({"target_module": ["Transformer2DModel", "ResnetBlock2D"]})
        other = exact()
        network = lycoris.create_lycoris(
            other.unet, 1.0, linear_dim=4, linear_alpha=3, algo="loha", rs_lora=True
        )
        network.apply_to()
        network.double().eval()
        stir(network.parameters(), size)
        network.save_weights(str(tmp_path / "lycoris.safetensors"), torch.float64, {})
        check(pipeline, tmp_path / "lycoris.safetensors", outputs(other), ("unet",))
    finally:
        network_class.LORA_PREFIX = before
