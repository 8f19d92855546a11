"""Inspection: the numbers it gives are those of the file."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch

from scumble.adapters.families import FAMILIES
from scumble.adapters.state import AdapterState, Metadata
from scumble.errors import UnknownFormat
from scumble.formats import TensorFile, inspect, write
from scumble.formats.container import save
from scumble.formats.inspection import blocks_of, change_norm, is_idle
from tests.formats.adapters_of import ATTENTION, SHAPES, adapter, layer


@pytest.mark.parametrize("path", SHAPES)
@pytest.mark.parametrize("stabilized", [False, True])
def test_the_norm_is_that_of_the_whole_change(path: str, stabilized: bool) -> None:
    one = layer(path, 3, 2.0, stabilized)
    whole = one.scale * one.tensors["up"].flatten(1) @ one.tensors["down"].flatten(1)
    assert change_norm(one) == pytest.approx(whole.norm().item(), rel=1e-5)


@pytest.mark.parametrize("name", ["lora", "loha", "lokr", "ia3", "full", "oft"])
def test_an_adapter_that_was_never_trained_is_idle_in_every_family(name: str) -> None:
    base = torch.nn.Linear(12, 10, bias=False).requires_grad_(False)
    family, rng = FAMILIES.get(name), torch.Generator().manual_seed(0)
    delta = family.fresh(base, family.settings(rank=2), rank=2, alpha=2.0, generator=rng)
    assert not delta.weight_delta(base.weight).any()
    assert is_idle(delta.state())
    with torch.no_grad():
        for parameter in delta.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=rng))
    assert not is_idle(delta.state())


def test_the_norm_of_every_family_is_that_of_its_weight_delta() -> None:
    base = torch.nn.Linear(12, 10, bias=False).requires_grad_(False)
    for name in FAMILIES:
        family = FAMILIES.get(name)
        rng = torch.Generator().manual_seed(0)
        delta = family.fresh(base, family.settings(rank=2), rank=2, alpha=2.0, generator=rng)
        with torch.no_grad():
            for parameter in delta.parameters():
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=rng))
        state, whole = delta.state(), delta.weight_delta(base.weight).norm().item()
        assert change_norm(state, base.weight) == pytest.approx(whole, rel=1e-4), name
        assert change_norm(state) in (None, pytest.approx(whole, rel=1e-4))
        one = AdapterState({"unet.conv_in": state})
        alone, beside = blocks_of(one)[0].norm, blocks_of(one, {"unet.conv_in": base.weight})[0].norm
        assert beside == pytest.approx(whole, rel=1e-4) and alone in (None, pytest.approx(whole, rel=1e-4))
    dora = FAMILIES.get("dora").fresh(base, FAMILIES.get("dora").settings(), rank=2, alpha=2.0, generator=rng)
    assert blocks_of(AdapterState({"unet.conv_in": dora.state()}))[0].norm is None


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
    save(TensorFile({"model.layers.0.weight": torch.ones(2, 2)}), tmp_path / "a.safetensors")
    with pytest.raises(UnknownFormat, match=r"model\.layers\.0\.weight"):
        inspect(tmp_path)
