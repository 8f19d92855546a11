"""The names of ComfyUI and its kin, and who claims what."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from scumble.adapters.families import FAMILIES
from scumble.errors import CannotRepresent, UnusedTensors, WrongBase
from scumble.formats import TensorFile, detect, read, write
from scumble.formats.container import save
from scumble.formats.flat_names import original_name
from scumble.formats.kinds import parts_of
from tests.formats.adapters_of import BLOCK, CLIP, SHAPES, adapter, layer, of_family

Q, CONV = f"{BLOCK}.attn1.to_q", "unet.down_blocks.0.resnets.0.conv1"
SECOND = "text_encoder_2.text_model.encoder.layers.1.mlp.fc1"


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q", Q),
        ("diffusion_model.input_blocks.1.0.in_layers.2", CONV),
        ("diffusion_model.down_blocks.0.resnets.0.conv1", CONV),
        ("diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q", list(SHAPES)[7]),
        ("input_blocks.1.1.transformer_blocks.0.attn1.to_q", Q),
        ("lora_unet.down_blocks.0.resnets.0.conv1", CONV),
        ("text_encoders.clip_l.transformer.text_model.encoder.layers.0.self_attn.q_proj", f"{CLIP}.q_proj"),
        ("text_encoders.clip_h.transformer.text_model.encoder.layers.0.self_attn.q_proj", f"{CLIP}.q_proj"),
        ("text_encoders.clip_l.text_model.encoder.layers.0.self_attn.q_proj", f"{CLIP}.q_proj"),
        ("text_encoders.clip_g.transformer.text_model.encoder.layers.1.mlp.fc1", SECOND),
        ("lora_te.text_model.encoder.layers.0.self_attn.q_proj", f"{CLIP}.q_proj"),
        ("lora_te2.text_model.encoder.layers.1.mlp.fc1", SECOND),
    ],
)
@pytest.mark.parametrize("ending", [("lora_A", "lora_B"), ("lora_down", "lora_up")])
def test_every_spelling_finds_its_layer(
    name: str, path: str, ending: tuple[str, str], tmp_path: Path
) -> None:
    tensors = dict(
        zip((f"{name}.{part}.weight" for part in ending), layer(path).tensors.values(), strict=True)
    )
    save(TensorFile({**tensors, f"{name}.alpha": torch.tensor(2.0)}), tmp_path / "a.safetensors")
    assert detect(tmp_path) == "comfyui"
    found = read(tmp_path, SHAPES)
    assert set(found.state.layers) == {path} and found.state.layers[path].alpha == 2.0 and not found.unused
    assert found.report == f"1/1 {path.partition('.')[0]} layers, 0 unused tensors"
    assert len(read(tmp_path).state.layers) == 1, "also without a base at hand"


@pytest.mark.parametrize("name", [f"diffusion_model.{original_name(Q[5:])}", Q])
@pytest.mark.parametrize("family", ["loha", "lokr"])
def test_other_families_under_dotted_names(name: str, family: str, tmp_path: Path) -> None:
    """As OneTrainer writes them for ComfyUI and for diffusers."""
    one = of_family(FAMILIES.get(family).settings(rank=2), [Q]).layers[Q]
    tensors = {f"{name}.{part}": tensor for part, tensor in parts_of(one).items()}
    save(TensorFile({**tensors, f"{name}.alpha": torch.tensor(one.alpha)}), tmp_path / "a.safetensors")
    found = read(tmp_path, SHAPES).state.layers[Q]
    assert found.family == family and found.scale == one.scale
    assert all(torch.equal(found.tensors[part], tensor) for part, tensor in one.tensors.items())


def test_without_alpha_the_scale_is_1_and_a_stranger_is_reported(tmp_path: Path) -> None:
    tensors = {
        f"diffusion_model.{Q[5:]}.lora_{p}.weight": layer(Q).tensors[t]
        for p, t in (("A", "down"), ("B", "up"))
    }
    save(TensorFile(tensors), tmp_path / "a.safetensors")
    assert read(tmp_path, SHAPES).state.layers[Q].scale == 1.0
    save(TensorFile({**tensors, "diffusion_model.what.weight": torch.ones(2)}), tmp_path / "a.safetensors")
    with pytest.raises(UnusedTensors, match="1 of 3 tensors matched no known kind"):
        read(tmp_path, SHAPES)


@pytest.mark.parametrize(
    "name", ["diffusion_model.joint_blocks.0.x", "text_encoders.t5xxl.transformer.encoder.x"]
)
def test_what_is_for_a_transformer_is_refused_as_that(name: str, tmp_path: Path) -> None:
    tensors = {f"{name}.lora_{part}.weight": torch.ones(4, 4) for part in "AB"}
    tensors |= {f"diffusion_model.x.lora_{part}.weight": torch.ones(4, 4) for part in "AB"}
    save(TensorFile(tensors), tmp_path / "a.safetensors")
    with pytest.raises(WrongBase, match="Flux, SD 3 or later"):
        read(tmp_path, SHAPES)


def test_it_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(CannotRepresent, match=r"read and not written.*Write it as .*diffusers.*kohya"):
        write(adapter([Q]), tmp_path, "comfyui")
