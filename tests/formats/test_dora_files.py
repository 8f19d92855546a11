"""DoRA in diffusers' and peft's spelling, against their own code, in both directions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from scumble.adapters import FAMILIES, Adapter, AdapterState
from scumble.errors import CannotRepresent, FormatError
from scumble.formats import TensorFile, read, write
from scumble.formats.container import load, save
from scumble.formats.diffusers import ENTRY, Diffusers
from tests.inference.makers import tiny

TARGETS = ["attention", "conv", "text_encoder.attention"]


def trained(base: Any) -> AdapterState:
    """A DoRA on the toy base with values that show; the base is left as it was."""
    settings = FAMILIES.get("dora").settings(rank=2, alpha=3.0, rank_pattern={"*.to_k": 3})
    with Adapter.inject(base.roots, TARGETS, settings) as adapter, torch.no_grad():
        generator = torch.Generator().manual_seed(1)
        for name, parameter in adapter.named_parameters():
            change = torch.randn(parameter.shape, generator=generator) * 0.2
            parameter.add_(parameter * change.abs() if name.endswith("magnitude") else change)
        return adapter.state()


def answers(pipeline: Any) -> tuple[Tensor, Tensor]:
    """(the UNet's output, the text encoder's) on fixed inputs."""
    generator = torch.Generator().manual_seed(2)
    latents = torch.randn(2, pipeline.unet.config.in_channels, 8, 8, generator=generator)
    ids = pipeline.tokenizer(["a fox", "b"], padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        words = pipeline.text_encoder(ids)[0]
        return pipeline.unet(latents, torch.tensor([10, 700]), words).sample, words


def test_unmodified_diffusers_predicts_the_same(tmp_path: Path) -> None:
    base = tiny()
    state = trained(base)
    path = write(state, tmp_path / "dora.safetensors")
    plain = answers(base.pipeline())
    with Adapter.load(base.roots, state):
        ours = answers(base.pipeline())
    pipeline = tiny().pipeline()
    pipeline.load_lora_weights(str(path))
    for mine, theirs, before in zip(ours, answers(pipeline), plain, strict=True):
        assert (mine - before).abs().max() > 1e-2
        assert (mine - theirs).abs().max() <= 1e-5 * max(1.0, float(mine.abs().max()))


def test_a_file_of_diffusers_is_read_back(tmp_path: Path) -> None:
    base = tiny()
    state = trained(base)
    pipeline = tiny().pipeline()
    pipeline.load_lora_weights(str(write(state, tmp_path / "ours.safetensors")))
    from diffusers import StableDiffusionPipeline
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft.utils import get_peft_model_state_dict

    layers = {
        f"{root}_lora_layers": convert_state_dict_to_diffusers(
            get_peft_model_state_dict(module, adapter_name="default_0")
        )
        for root, module in (("unet", pipeline.unet), ("text_encoder", pipeline.text_encoder))
    }
    configs = {
        f"{root}_lora_adapter_metadata": module.peft_config["default_0"].to_dict()
        for root, module in (("unet", pipeline.unet), ("text_encoder", pipeline.text_encoder))
    }
    StableDiffusionPipeline.save_lora_weights(tmp_path / "theirs", **layers, **configs)
    found = read(tmp_path / "theirs", list(state.layers)).state
    assert found.equal(state)


def test_without_its_magnitudes_a_dora_file_is_refused(tmp_path: Path) -> None:
    file = load(write(trained(tiny()), tmp_path / "dora.safetensors"))
    tensors = {name: tensor for name, tensor in file.tensors.items() if "magnitude" not in name}
    header = {ENTRY: file.metadata[ENTRY]}
    assert json.loads(header[ENTRY])["unet.use_dora"] is True
    with pytest.raises(FormatError, match=r"use_dora, but .* has no lora_magnitude_vector"):
        Diffusers().decode(TensorFile(tensors, header), None)
    save(
        TensorFile({**tensors, "unet.x.lora_magnitude_vector": torch.ones(3)}, header),
        tmp_path / "x.safetensors",
    )
    with pytest.raises(FormatError, match="only one of the two factors"):
        read(tmp_path / "x.safetensors")


def test_lora_and_dora_in_one_component_are_refused() -> None:
    base = tiny()
    dora = trained(base)
    with Adapter.inject(base.roots, "attention", FAMILIES.get("lora").settings()) as adapter:
        lora = adapter.state()
    path = next(path for path in lora.layers if path.startswith("unet."))
    with pytest.raises(CannotRepresent, match=r"unet has both.*Write it as lycoris"):
        Diffusers().encode(AdapterState({**dora.layers, path: lora.layers[path]}))


def test_two_magnitudes_of_one_layer_are_told_as_two() -> None:
    pair = {"unet.x.lora_A.weight": torch.ones(2, 32), "unet.x.lora_B.weight": torch.ones(32, 2)}
    two = {"unet.x.dora_scale": torch.ones(32, 1), "unet.x.magnitude": torch.ones(32)}
    with pytest.raises(FormatError, match=r"'unet\.x' has two magnitudes, dora_scale and magnitude, where"):
        Diffusers().decode(TensorFile(pair | two), None)
