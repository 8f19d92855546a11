"""`read` and `write`: what is refused, and that the refusal is short and says what to do."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from scumble.adapters.state import AdapterState, Metadata
from scumble.errors import FormatError, NotFinite, UnknownFormat, UnknownName, UnusedTensors, WrongBase
from scumble.formats import WEIGHTS_NAME, TensorFile, detect, read, write
from scumble.formats.container import load, save
from tests.formats.adapters_of import ATTENTION, BLOCK, SHAPES, adapter, layer

WIDE = {path: tuple(2048 if side == 768 else side for side in shape) for path, shape in SHAPES.items()}
"""The same layers with the cross-attention of SDXL."""


def test_write_then_read(tmp_path: Path) -> None:
    state = adapter(alpha=2.0)
    path = write(state, tmp_path / "new" / "folder")
    assert path.name == WEIGHTS_NAME
    assert [file.name for file in path.parent.iterdir()] == [WEIGHTS_NAME]
    for given in (path, path.parent, str(path)):
        found = read(given, SHAPES)
        assert found.state.equal(state)
        assert (
            found.report
            == "8/8 unet layers, 2/2 text_encoder layers, 1/1 text_encoder_2 layers, 0 unused tensors"
        )
    assert write(state, tmp_path / "x.safetensors").read_bytes() == path.read_bytes()


def test_dtype_casts_and_none_does_not(tmp_path: Path) -> None:
    half = load(write(adapter(), tmp_path / "a", dtype=torch.float16))
    assert {tensor.dtype for tensor in half.tensors.values()} == {torch.float16}
    assert {tensor.dtype for tensor in load(write(adapter(), tmp_path / "b")).tensors.values()} == {
        torch.float32
    }


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_tensor_that_is_not_finite_is_refused_both_ways(bad: float, tmp_path: Path) -> None:
    path = f"{BLOCK}.attn1.to_q"
    state = adapter([path])
    file_name = write(state, tmp_path)
    broken = {**state.layers[path].tensors, "up": torch.full((32, 4), bad)}
    with pytest.raises(NotFinite, match=r"^refusing to save: 1 of 2 tensors not finite"):
        write(AdapterState({path: replace(state.layers[path], tensors=broken)}), tmp_path)
    assert read(tmp_path, SHAPES).state.equal(state)
    file = load(file_name)
    file.tensors[path + ".lora_B.weight"][0, 0] = bad  # type: ignore[index]
    save(file, file_name)
    with pytest.raises(NotFinite, match=r"1 of 2 tensors not finite \(NaN or infinity\), first 'unet"):
        read(tmp_path, SHAPES, allow_partial=True)


def test_a_cast_that_overflows_is_refused(tmp_path: Path) -> None:
    path = f"{BLOCK}.attn1.to_q"
    large = replace(layer(path), tensors={name: tensor * 1e6 for name, tensor in layer(path).tensors.items()})
    with pytest.raises(NotFinite, match="too large for float16, take bfloat16"):
        write(AdapterState({path: large}), tmp_path, dtype=torch.float16)
    write(AdapterState({path: large}), tmp_path, dtype=torch.bfloat16)


def test_a_lora_for_another_family_is_refused_in_one_line(tmp_path: Path) -> None:
    write(adapter(), tmp_path)
    said = r"^LoRA is for SD 1\.x \(cross-attention 768\); model is SDXL \(2048\)\. Not applied\.$"
    for partial in (False, True):
        with pytest.raises(WrongBase, match=said):
            read(tmp_path, WIDE, allow_partial=partial)
    other = {path: tuple(99 if side == 768 else side for side in shape) for path, shape in SHAPES.items()}
    with pytest.raises(WrongBase, match=r"; model is cross-attention 99\."):
        read(tmp_path, other)


def test_a_lora_for_another_family_is_told_by_its_header_when_shapes_are_mute(tmp_path: Path) -> None:
    plain = [path for path in ATTENTION if "attn2" not in path]
    write(adapter(plain, Metadata(base_family="sd2")), tmp_path)
    with pytest.raises(WrongBase, match=r"LoRA is for SD 2\.x; model is SD 1\.x \(768\)"):
        read(tmp_path, SHAPES)
    write(adapter(plain, Metadata(base_family="sd1")), tmp_path)
    assert read(tmp_path, SHAPES).unused == ()


def test_the_wrong_base_is_named_even_when_no_layer_has_the_right_name(tmp_path: Path) -> None:
    write(adapter([path for path in SHAPES if path.startswith("unet.")]), tmp_path)
    elsewhere = {path.replace("down_blocks.0", "down_blocks.1"): shape for path, shape in WIDE.items()}
    with pytest.raises(WrongBase, match=r"SD 1\.x .* SDXL"):
        read(tmp_path, elsewhere)


def test_nothing_matched_is_always_an_error(tmp_path: Path) -> None:
    write(adapter(ATTENTION), tmp_path)
    for partial in (False, True):
        with pytest.raises(UnusedTensors) as caught:
            read(tmp_path, {"unet.elsewhere": (3, 3)}, allow_partial=partial)
        text = str(caught.value)
        assert text.startswith(f"{2 * len(ATTENTION)} of {2 * len(ATTENTION)} tensors matched no layer.")
        assert "File dialect: diffusers." in text and "First 3 unmatched: " in text
        assert len(text.splitlines()) <= 15 and len(text) < 1000


def test_a_layer_of_another_shape_counts_as_unused(tmp_path: Path) -> None:
    write(adapter(), tmp_path)
    conv = "unet.down_blocks.0.resnets.0.conv1"
    other = {**SHAPES, conv: (99, 32, 3, 3)}
    with pytest.raises(
        UnusedTensors, match=r"change a weight of \(16, 32, 3, 3\), where the model has \(99, 32, 3, 3\)"
    ):
        read(tmp_path, other)
    found = read(tmp_path, other, allow_partial=True)
    assert conv not in found.state.layers and len(found.unused) == 2


def test_a_linear_layer_and_a_1x1_convolution_are_one_thing(tmp_path: Path) -> None:
    conv, linear = "unet.down_blocks.0.attentions.0.proj_in", f"{BLOCK}.attn1.to_q"
    write(adapter([conv, linear]), tmp_path)
    found = read(tmp_path, {conv: (32, 32), linear: (32, 32, 1, 1)}).state.layers
    assert found[conv].tensors["down"].shape == (4, 32) and found[conv].tensors["up"].shape == (32, 4)
    assert found[linear].tensors["down"].shape == (4, 32, 1, 1)
    assert torch.equal(found[linear].tensors["up"].flatten(), layer(linear, seed=1).tensors["up"].flatten())


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("oft_te_text_model.unheard_of", "kohya or LyCORIS adapter of another family"),
        ("lora_te3_encoder_block_0.lora_down.weight", "kohya adapter for another kind of base"),
        ("diffusion_model.input_blocks.1.1.to_q.unheard_of", "ComfyUI"),
        ("model.diffusion_model.input_blocks.0.0.weight", "whole Stable Diffusion checkpoint"),
        ("down_blocks.0.resnets.0.conv1.weight", "whole UNet"),
        ("something.else", "no adapter that is known"),
    ],
)
def test_other_dialects_are_refused_by_name(name: str, said: str, tmp_path: Path) -> None:
    save(TensorFile({name: torch.ones(4, 4)}), tmp_path / "a.safetensors")
    with pytest.raises(UnknownFormat, match=rf"{said}.*This version reads: attention-processors, .*kohya"):
        detect(tmp_path)


def test_what_is_for_a_transformer_is_refused_as_that(tmp_path: Path) -> None:
    save(
        TensorFile({f"transformer.blocks.0.to_q.lora_{part}.weight": torch.ones(4, 4) for part in "AB"}),
        tmp_path / "a.safetensors",
    )
    with pytest.raises(UnusedTensors, match=r"speaks of transformer \(a diffusion transformer such as Flux"):
        read(tmp_path, SHAPES)
    for name in (
        "lora_unet_joint_blocks_0_x_block_attn_qkv",
        "diffusion_model.joint_blocks.0.x_block.attn.qkv",
    ):
        tensors = {f"{name}.lora_{part}.weight": torch.ones(4, 4) for part in ("down", "up")}
        save(TensorFile(tensors), tmp_path / "a.safetensors")
        for layers in (SHAPES, None):
            with pytest.raises(WrongBase, match="diffusion transformer"):
                read(tmp_path, layers)
    for name in ("lora_unet_double_blocks_0_img_attn_qkv", "diffusion_model.double_blocks.0.img_attn.qkv"):
        tensors = {f"{name}.lora_down.weight": torch.ones(4, 4), f"{name}.lora_up.weight": torch.ones(12, 4)}
        save(TensorFile(tensors), tmp_path / "a.safetensors")
        with pytest.raises(
            UnusedTensors, match=r"speaks of transformer \(a diffusion transformer such as Flux"
        ):
            read(tmp_path, SHAPES)


def test_writing_refuses_pickles_unknown_dialects_and_nothing(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="would be a pickle"):
        write(adapter(), tmp_path / "a.bin")
    with pytest.raises(UnknownName, match='Did you mean "diffusers"'):
        write(adapter(), tmp_path, "difusers")
    with pytest.raises(FormatError, match="nothing to write"):
        write(AdapterState({}), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_file_without_tensors_is_refused(tmp_path: Path) -> None:
    save(TensorFile({}, {"format": "pt"}), tmp_path / "a.safetensors")
    with pytest.raises(UnknownFormat, match="holds no tensors"):
        read(tmp_path)


def test_custom_diffusion_is_refused_by_name_when_a_file_holds_nothing_else(tmp_path: Path) -> None:
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.processor.to_k_custom_diffusion.weight"
    save(TensorFile({name: torch.ones(32, 768)}), tmp_path / "a.safetensors")
    with pytest.raises(FormatError, match=r"unsupported: custom_diffusion \(.* on 1 module"):
        read(tmp_path / "a.safetensors")


def test_a_file_of_two_dialects_is_refused_with_a_way_out(tmp_path: Path) -> None:
    down, up = torch.ones(2, 32), torch.ones(32, 2)
    tensors = {
        "lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": down,
        "lora_unet_mid_block_attentions_0_proj_in.lora_up.weight": up,
        "unet.mid_block.attentions.0.proj_out.lora_A.weight": down,
        "unet.mid_block.attentions.0.proj_out.lora_B.weight": up,
    }
    save(TensorFile(tensors), tmp_path / "a.safetensors")
    with pytest.raises(UnknownFormat, match=r"claimed by 2 formats: diffusers, kohya\..*a file of their own"):
        read(tmp_path / "a.safetensors")
