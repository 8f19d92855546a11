"""Inspection: the numbers it gives are those of the file."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch

from scumble.adapters.state import AdapterState, Metadata
from scumble.errors import UnknownFormat
from scumble.formats import TensorFile, inspect, write
from scumble.formats.container import save
from scumble.formats.inspection import change_norm
from tests.formats.adapters_of import ATTENTION, SHAPES, adapter, layer


@pytest.mark.parametrize("path", SHAPES)
@pytest.mark.parametrize("stabilized", [False, True])
def test_the_norm_is_that_of_the_whole_change(path: str, stabilized: bool) -> None:
    one = layer(path, 3, 2.0, stabilized)
    whole = one.scale * one.tensors["up"].flatten(1) @ one.tensors["down"].flatten(1)
    assert change_norm(one) == pytest.approx(whole.norm().item(), rel=1e-5)


def test_a_change_of_zero_has_norm_zero() -> None:
    one = layer(ATTENTION[0])
    one.tensors["up"].zero_()
    assert change_norm(one) == 0.0


def test_inspection_counts_what_is_there(tmp_path: Path) -> None:
    layers = {
        path: layer(path, rank=8 if "attn2" in path else 4, alpha=2.0, rank_stabilized=".ff." in path)
        for path in SHAPES
    }
    state = AdapterState(
        layers, metadata=Metadata(base_name="picturebook", base_family="sd1", extra={"k": "v"})
    )
    path = write(state, tmp_path, dtype=torch.float16)
    found = inspect(tmp_path)
    assert found.path == path and found.dialect == "diffusers" and found.families == ("lora",)
    assert found.base == "picturebook, SD 1.x (cross-attention 768)"
    assert found.ranks == {4: 9, 8: 2} and found.alphas == {2.0: 11} and found.rank_stabilized == 1
    assert found.layers == {"unet": 8, "text_encoder": 2, "text_encoder_2": 1}
    assert found.parameters == sum(t.numel() for one in layers.values() for t in one.tensors.values())
    assert found.dtypes == ("float16",) and found.size == path.stat().st_size
    assert found.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert found.metadata.extra == {"k": "v"} and found.notes == ()
    blocks = {block.name: block for block in found.blocks}
    assert set(blocks) == {
        "unet.down_blocks.0",
        "unet.mid_block",
        "text_encoder.layers.0",
        "text_encoder_2.layers.1",
    }
    assert sum(block.layers for block in found.blocks) == 11
    assert blocks["unet.mid_block"].norm == pytest.approx(
        change_norm(layers["unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"]), rel=1e-2
    )


def test_what_was_assumed_is_said(tmp_path: Path) -> None:
    from scumble.formats.attention_processors import AttentionProcessors

    file = AttentionProcessors().encode(adapter(ATTENTION))
    save(TensorFile(file.tensors), tmp_path / "a.safetensors")
    assert inspect(tmp_path).notes == ("alpha absent: using alpha = rank",)


def test_what_is_not_known_is_refused(tmp_path: Path) -> None:
    save(TensorFile({"lora_unet_a.hada_w1_a": torch.ones(2, 2)}), tmp_path / "a.safetensors")
    with pytest.raises(UnknownFormat):
        inspect(tmp_path)
