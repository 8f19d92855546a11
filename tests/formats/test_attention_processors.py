"""The dialect of early 2023, as each release of diffusers spelled it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from scumble.errors import CannotRepresent, FormatError
from scumble.formats import TensorFile, read, write
from scumble.formats.attention_processors import AttentionProcessors
from scumble.formats.container import save
from tests.formats.adapters_of import ATTENTION, BLOCK, CLIP, adapter, layer

OUT = f"{BLOCK}.attn1.to_out.0"
PROCESSOR = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor"
CLASSIC = "text_encoder.text_model.encoder.layers.0.self_attn"


def pair(name: str, path: str) -> dict[str, torch.Tensor]:
    return {f"{name}.{part}.weight": layer(path).tensors[part] for part in ("down", "up")}


@pytest.mark.parametrize(
    ("name", "path"),
    [
        (f"{PROCESSOR}.to_q_lora", f"{BLOCK}.attn1.to_q"),
        (f"{PROCESSOR}.to_out_lora", OUT),
        (f"unet.{PROCESSOR}.to_out_lora", OUT),
        (f"{CLASSIC}.to_q_lora", f"{CLIP}.q_proj"),
        (f"{CLASSIC}.to_out_lora", f"{CLIP}.out_proj"),
        (f"{CLASSIC}.out_proj.to_out_lora", f"{CLIP}.out_proj"),
    ],
)
def test_every_spelling_finds_its_layer(name: str, path: str, tmp_path: Path) -> None:
    save(TensorFile(pair(name, path), {"format": "pt"}), tmp_path / "a.safetensors")
    found = read(tmp_path, ATTENTION)
    assert set(found.state.layers) == {path}
    assert found.state.layers[path].scale == 1.0
    assert found.report.endswith("0 unused tensors (alpha absent: using alpha = rank)")


def test_the_unused_three_of_0_16_are_set_aside_and_said(tmp_path: Path) -> None:
    tensors: dict[str, torch.Tensor] = {}
    for which in ("q", "k", "v", "out"):
        tensors |= pair(f"{CLASSIC}.q_proj.to_{which}_lora", f"{CLIP}.q_proj")
    save(TensorFile(tensors), tmp_path / "a.safetensors")
    found = read(tmp_path, ATTENTION)
    assert set(found.state.layers) == {f"{CLIP}.q_proj"} and not found.unused
    assert "6 tensors of this dialect without content" in found.report


def test_files_of_0_19_hold_the_next_dialect_in_their_text_encoder(tmp_path: Path) -> None:
    tensors = pair(f"unet.{PROCESSOR}.to_out_lora", OUT)
    tensors |= pair(f"{CLASSIC}.q_proj.lora_linear_layer", f"{CLIP}.q_proj")
    save(TensorFile(tensors), tmp_path / "a.safetensors")
    found = read(tmp_path, ATTENTION)
    assert found.dialect == "attention-processors"
    assert set(found.state.layers) == {OUT, f"{CLIP}.q_proj"} and not found.unused


def test_todays_diffusers_reads_what_we_write() -> None:
    """Its own table of old names leads to the layers that we meant."""
    from diffusers.utils import convert_unet_state_dict_to_peft

    state = adapter([path for path in ATTENTION if path.startswith("unet.")])
    theirs = convert_unet_state_dict_to_peft(dict(AttentionProcessors().encode(state).tensors))
    assert set(theirs) == {f"{path}.{part}.weight" for path in state.layers for part in ("lora_A", "lora_B")}


@pytest.mark.parametrize(
    ("how", "path", "why"),
    [
        ({"alpha": 8.0}, OUT, "has no alpha"),
        ({"rank": 4, "alpha": 2.0, "rank_stabilized": True}, OUT, "has no alpha"),
        ({}, f"{BLOCK}.ff.net.0.proj", "attention projections only"),
        ({}, "unet.down_blocks.0.resnets.0.conv1", "attention projections only"),
        ({}, "text_encoder_2.text_model.encoder.layers.1.mlp.fc1", "attention projections only"),
    ],
)
def test_what_it_can_not_hold_is_refused_and_diffusers_is_named(
    how: dict[str, float], path: str, why: str, tmp_path: Path
) -> None:
    with pytest.raises(CannotRepresent, match=rf"{why}.*Write it as diffusers or kohya or peft\.$"):
        write(adapter([path], **how), tmp_path, "attention-processors")
    assert not list(tmp_path.iterdir())


def test_a_header_that_speaks_of_an_alpha_is_refused() -> None:
    file = AttentionProcessors().encode(adapter([OUT]))
    edited = dict(file.metadata) | {
        "scumble.layers": file.metadata["scumble.layers"].replace('"alpha":4.0', '"alpha":9.0')
    }
    with pytest.raises(FormatError, match="contradicts itself"):
        AttentionProcessors().decode(TensorFile(file.tensors, edited), [OUT])
