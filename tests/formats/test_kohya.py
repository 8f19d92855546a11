"""The kohya dialect: alphas in every shape, convolutions, Tucker, dtypes, and the header that its tools show."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from scumble.adapters.state import AdapterState, LayerState, Metadata
from scumble.errors import CannotRepresent, FormatError, UnusedTensors
from scumble.formats import TensorFile, detect, read, write
from scumble.formats.container import load, read_header, save
from scumble.formats.kohya import Kohya
from tests.formats.adapters_of import BLOCK, CLIP, SHAPES, adapter, layer

Q = f"{BLOCK}.attn1.to_q"
FLAT = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
CONV, FLAT_CONV = "unet.down_blocks.0.resnets.0.conv1", "lora_unet_down_blocks_0_resnets_0_conv1"


def pair(name: str = FLAT, path: str = Q, rank: int = 4, alpha: Any = None) -> dict[str, torch.Tensor]:
    """A layer's tensors as the file calls them; without an alpha where that is None."""
    tensors = layer(path, rank).tensors
    found = {f"{name}.lora_down.weight": tensors["down"], f"{name}.lora_up.weight": tensors["up"]}
    return found if alpha is None else {**found, f"{name}.alpha": alpha}


def decode(
    tensors: dict[str, torch.Tensor], layers: Any = tuple(SHAPES), header: dict[str, str] | None = None
) -> Any:
    return Kohya().decode(TensorFile(tensors, header or {}), layers)


@pytest.mark.parametrize(
    ("alpha", "value"),
    [
        (torch.tensor(2.0), 2.0),
        (torch.tensor([2.0]), 2.0),
        (torch.tensor([[2.0]]), 2.0),
        (torch.tensor(2), 2.0),
        (torch.tensor(2.0).half(), 2.0),
        (torch.tensor(2.0).bfloat16(), 2.0),
        (torch.tensor(2.0).double(), 2.0),
        (torch.tensor([2.0]).to(torch.float8_e4m3fn), 2.0),
        (torch.tensor(-2.0), -2.0),
        (torch.tensor(0.01).half(), float(torch.tensor(0.01).half())),
    ],
)
def test_alpha_in_every_shape_and_dtype(alpha: torch.Tensor, value: float) -> None:
    decoded = decode(pair(alpha=alpha))
    assert decoded.state.layers[Q].alpha == value and decoded.state.layers[Q].rank == 4
    assert len(decoded.used) == 3 and not decoded.notes


def test_no_alpha_and_alpha_0_mean_the_rank_and_that_is_said() -> None:
    decoded = decode(pair())
    assert decoded.state.layers[Q].scale == 1.0 and decoded.notes == ("alpha absent: using alpha = rank",)
    decoded = decode(pair(alpha=torch.tensor(0.0)))
    assert decoded.state.layers[Q].scale == 1.0
    assert decoded.notes == ("alpha 0 on 1 of 1 layers means alpha = rank in this dialect",)


def test_rank_and_alpha_differ_from_layer_to_layer() -> None:
    other = f"{BLOCK}.attn1.to_out.0"
    flat = FLAT.replace("to_q", "to_out_0")
    decoded = decode(pair(rank=4, alpha=torch.tensor(1.0)) | pair(flat, other, 2, torch.tensor(8.0)))
    found = decoded.state.layers
    assert (found[Q].rank, found[Q].scale, found[other].rank, found[other].scale) == (4, 0.25, 2, 4.0)


@pytest.mark.parametrize("bad", [torch.tensor([1.0, 2.0]), torch.tensor(float("inf"))])
def test_an_alpha_that_is_no_number_is_refused(bad: torch.Tensor) -> None:
    with pytest.raises(FormatError, match="alpha"):
        decode(pair(alpha=bad))


def test_an_alpha_that_our_header_contradicts_is_refused() -> None:
    file = Kohya().encode(adapter([Q], alpha=2.0))
    assert Kohya().decode(file, SHAPES).state.layers[Q].alpha == 2.0
    edited = {**file.tensors, FLAT + ".alpha": torch.tensor(3.0)}
    with pytest.raises(FormatError, match="contradicts itself about the scale"):
        Kohya().decode(TensorFile(edited, file.metadata), SHAPES)
    rounded = {**file.tensors, FLAT + ".alpha": torch.tensor(2.003).half()}
    with pytest.raises(FormatError, match="contradicts itself"):
        Kohya().decode(TensorFile(rounded, file.metadata), SHAPES)
    state = adapter([Q], alpha=1 / 3)
    file = Kohya().encode(state)
    half = {
        name: tensor.half() if name.endswith("alpha") else tensor for name, tensor in file.tensors.items()
    }
    assert Kohya().decode(TensorFile(half, file.metadata), SHAPES).state.equal(state), "only rounded"


def test_tucker_is_folded_exactly() -> None:
    generator = torch.Generator().manual_seed(0)
    out, inside, rank = 16, 32, 4
    up, down = (
        torch.randn(out, rank, 1, 1, generator=generator),
        torch.randn(rank, inside, 1, 1, generator=generator),
    )
    mid = torch.randn(rank, rank, 3, 3, generator=generator)
    tensors = {
        f"{FLAT_CONV}.lora_up.weight": up,
        f"{FLAT_CONV}.lora_down.weight": down,
        f"{FLAT_CONV}.lora_mid.weight": mid,
        f"{FLAT_CONV}.alpha": torch.tensor(2.0),
    }
    decoded = decode(tensors, SHAPES)
    assert len(decoded.used) == 4 and "lora_mid of 1 layer folded" in decoded.notes[0]
    found = decoded.state.layers[CONV]
    change = found.scale * torch.einsum(
        "or,rikl->oikl", found.tensors["up"].flatten(1), found.tensors["down"]
    )
    x = torch.randn(2, inside, 8, 8, generator=generator)
    conv = torch.nn.functional.conv2d
    theirs = 0.5 * conv(conv(conv(x, down), mid, padding=1), up)
    assert torch.allclose(conv(x, change, padding=1), theirs, rtol=1e-4, atol=1e-3)
    for wrong in (mid[:, :2], mid[0]):
        with pytest.raises(FormatError, match="lora_mid"):
            decode({**tensors, f"{FLAT_CONV}.lora_mid.weight": wrong}, SHAPES)


def test_convolutions_3x3_1x1_flat_and_for_linear_layers() -> None:
    tensors = pair(FLAT_CONV, CONV)
    assert decode(tensors, SHAPES).state.layers[CONV].tensors["down"].shape == (4, 32, 3, 3)
    flat = {name: tensor.flatten(1) for name, tensor in tensors.items()}
    again = decode(flat, SHAPES).state.layers[CONV].tensors
    assert torch.equal(again["down"], tensors[f"{FLAT_CONV}.lora_down.weight"]) and again["up"].shape == (
        16,
        4,
        1,
        1,
    )
    square = {name: tensor[..., None, None] for name, tensor in pair().items()}  # SD 2 files
    assert decode(square, SHAPES).state.layers[Q].tensors["down"].shape == (4, 32)
    mixed = {**pair(), f"{FLAT}.lora_up.weight": pair()[f"{FLAT}.lora_up.weight"][..., None, None]}
    assert decode(mixed, SHAPES).state.layers[Q].tensors["up"].shape == (32, 4)
    turned = {
        name: tensor.transpose(1, 2) if tensor.shape[-1] == 3 else tensor for name, tensor in tensors.items()
    }
    assert decode(turned, SHAPES).unused


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2]
)
def test_dtypes_survive_and_alpha_keeps_its_precision(dtype: torch.dtype, tmp_path: Path) -> None:
    path = write(adapter(alpha=0.3), tmp_path, "kohya", dtype=dtype)
    found = load(path).tensors
    assert {t.dtype for name, t in found.items() if not name.endswith("alpha")} == {dtype}
    assert {float(t) for name, t in found.items() if name.endswith("alpha")} == {float(torch.tensor(0.3))}
    assert {one.alpha for one in read(path, SHAPES).state.layers.values()} == {0.3}


def test_a_partner_or_a_layer_that_is_missing_is_not_dropped_in_silence(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="only one of the two factors"):
        decode({name: tensor for name, tensor in pair().items() if "up" not in name})
    save(TensorFile(pair() | pair("lora_unet_nowhere")), tmp_path / "a.safetensors")
    with pytest.raises(UnusedTensors, match=r"^2 of 4 tensors matched no layer\..*'lora_unet_nowhere"):
        read(tmp_path, SHAPES)
    assert read(tmp_path, SHAPES, allow_partial=True).report.startswith("1/2 unet layers, 2 unused tensors")


def test_the_layers_of_each_component_are_counted_apart(tmp_path: Path) -> None:
    found = read(write(adapter(), tmp_path, "kohya"), SHAPES)
    assert (
        found.report
        == "8/8 unet layers, 2/2 text_encoder layers, 1/1 text_encoder_2 layers, 0 unused tensors"
    )
    assert set(read(tmp_path).state.layers) == {
        path.replace("encoder.layers", "text_model.encoder.layers")
        if path.startswith(CLIP.partition(".encoder")[0] + ".enc")
        else path
        for path in SHAPES
    }


@pytest.mark.parametrize(
    ("state", "why"),
    [
        (adapter([Q], alpha=0.0), "alpha 0 means alpha = rank"),
        (AdapterState({"transformer.a": replace(layer(Q))}), "no name for 'transformer.a'"),
        (
            AdapterState({"unet.a.b": layer(Q), "unet.a_b": layer(Q)}),
            "one name for 'unet.a.b' and 'unet.a_b'",
        ),
        (AdapterState({Q: LayerState("loha", 1, 1.0, {"w1_a": torch.zeros(1)})}), "not loha"),
    ],
)
def test_what_it_can_not_hold_is_refused(state: AdapterState, why: str, tmp_path: Path) -> None:
    with pytest.raises(CannotRepresent, match=why):
        write(state, tmp_path, "kohya")
    assert not list(tmp_path.iterdir())


def test_rank_stabilized_scales_are_in_alpha() -> None:
    file = Kohya().encode(adapter([Q], rank=4, alpha=3.0, rank_stabilized=True))
    assert float(file.tensors[FLAT + ".alpha"]) == 6.0  # 3 / sqrt(4) = 6 / 4


def kohyas_hashes(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> tuple[str, str]:
    """As kohya's scripts take them: of the library's own bytes, with `ss_*` entries alone."""
    shown = {key: text for key, text in metadata.items() if key.startswith("ss_")}
    content = safetensors.torch.save(tensors, shown)
    start = 8 + int.from_bytes(content[:8], "little")
    return hashlib.sha256(content[start:]).hexdigest(), hashlib.sha256(
        content[0x100000:0x110000]
    ).hexdigest()[:8]


def test_the_hashes_are_those_that_kohyas_tools_take(tmp_path: Path) -> None:
    path = write(adapter(alpha=2.0), tmp_path, "kohya")
    file = load(path)
    assert kohyas_hashes(dict(file.tensors), dict(file.metadata)) == (
        file.metadata["sshs_model_hash"],
        file.metadata["sshs_legacy_hash"],
    )
    assert file.metadata["modelspec.hash_sha256"] == "0x" + file.metadata["sshs_model_hash"]
    content = path.read_bytes()
    body = content[8 + int.from_bytes(content[:8], "little") :]
    assert hashlib.sha256(body).hexdigest() == file.metadata["sshs_model_hash"]
    half = load(write(adapter(alpha=2.0), tmp_path / "half", "kohya", dtype=torch.float16))
    assert half.metadata["sshs_model_hash"] == kohyas_hashes(dict(half.tensors), {})[0]


def test_the_header_says_what_tools_show(tmp_path: Path) -> None:
    settings = json.dumps(
        {"train": {"steps": 40, "seed": 7, "optimizer": {"name": "adamw", "learning_rate": 1e-4}}}
    )
    metadata = Metadata(base_name="acme/base", prediction_type="epsilon", settings=settings)
    sd1 = [path for path in SHAPES if "text_encoder_2" not in path]
    header = load(write(adapter(sd1, alpha=2.0, metadata=metadata), tmp_path, "kohya")).metadata
    said = {
        key: text
        for key, text in header.items()
        if key.startswith(("ss_", "modelspec.")) and "hash" not in key
    }
    assert said == {
        "ss_network_module": "networks.lora",
        "ss_network_dim": "4",
        "ss_network_alpha": "2",
        "ss_network_args": '{"conv_alpha":"2","conv_dim":"4"}',
        "ss_base_model_version": "sd_v1",
        "ss_v2": "False",
        "ss_sd_model_name": "acme/base",
        "ss_steps": "40",
        "ss_max_train_steps": "40",
        "ss_seed": "7",
        "ss_optimizer": "adamw",
        "ss_learning_rate": "0.0001",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "stable-diffusion-v1/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": "LoRA",
        "modelspec.resolution": "512x512",
        "modelspec.prediction_type": "epsilon",
    }


def test_what_a_file_said_of_its_training_stays_and_what_it_said_of_its_tensors_does_not(
    tmp_path: Path,
) -> None:
    extra = {
        "ss_output_name": "fox",
        "ss_tag_frequency": json.dumps({"a": {"fox": 3}}),
        "ss_network_dim": "128",
        "ss_network_module": "lycoris.kohya",
        "sshs_model_hash": "old",
        "modelspec.author": "me",
    }
    save(TensorFile(pair(alpha=torch.tensor(2.0)), extra), tmp_path / "a.safetensors")
    state = read(tmp_path).state
    assert dict(state.metadata.extra) == extra
    header = read_header(write(state, tmp_path / "b", "kohya")).metadata
    assert header["ss_tag_frequency"] == extra["ss_tag_frequency"] and header["modelspec.author"] == "me"
    assert header["modelspec.title"] == "fox" and header["ss_network_dim"] == "4"
    assert header["ss_network_module"] == "networks.lora" and header["sshs_model_hash"] != "old"
    assert "sshs_model_hash" not in read_header(write(state, tmp_path / "c", "diffusers")).metadata


def test_ranks_that_differ_are_dynamic_and_sdxl_is_said(tmp_path: Path) -> None:
    layers = {Q: layer(Q, 4), f"{BLOCK}.attn1.to_out.0": layer(f"{BLOCK}.attn1.to_out.0", 2)}
    state = AdapterState(layers, metadata=Metadata(base_family="sdxl"))
    file = read_header(write(state, tmp_path, "kohya"))
    assert file.metadata["ss_network_dim"] == file.metadata["ss_network_alpha"] == "Dynamic"
    assert file.metadata["ss_base_model_version"] == "sdxl_base_v1-0"
    assert file.metadata["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
    assert any(
        name.startswith("lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q") for name in file.tensors
    )


def test_what_diffusers_converts_to_kohya_is_read(tmp_path: Path) -> None:
    """Its names are `lora_te1_` even for SD 1, its alphas int64 and equal to the rank."""
    from diffusers.utils import convert_state_dict_to_kohya

    state = adapter([path for path in SHAPES if "text_encoder_2" not in path])
    peft = {}
    for path, one in state.layers.items():
        for part, name in (("down", "lora_A"), ("up", "lora_B")):
            peft[f"{path}.{name}.weight"] = one.tensors[part]
    safetensors.torch.save_file(
        {k: v.contiguous() for k, v in convert_state_dict_to_kohya(peft).items()}, tmp_path / "a.safetensors"
    )
    assert detect(tmp_path) == "kohya"
    found = read(tmp_path, SHAPES)
    assert found.state.equal(state) and not found.unused


def test_bundled_embeddings_are_tokens_and_the_lora_is_not_dropped(tmp_path: Path) -> None:
    rows = torch.randn(2, 24)
    tensors = pair() | {"bundle_emb.my lora word.clip_l": rows, "bundle_emb.x.string_to_param.*": rows[0]}
    save(TensorFile(tensors), tmp_path / "a.safetensors")
    found = read(tmp_path, SHAPES)
    assert (
        set(found.state.tokens) == {"my lora word", "x"}
        and set(found.state.layers) == {Q}
        and not found.unused
    )
    assert torch.equal(found.state.tokens["my lora word"].vectors["text_encoder"], rows)
    assert found.state.tokens["x"].vectors["text_encoder"].shape == (1, 24)
    save(TensorFile(pair() | {"bundle_emb.x.clip_l_out": rows}), tmp_path / "a.safetensors")
    with pytest.raises(FormatError, match="output embedding"):
        read(tmp_path, SHAPES)


def test_whole_matrices_of_ai_toolkit_are_refused_by_name(tmp_path: Path) -> None:
    name = "lora_unet_mid_block_attentions_0_proj_in"
    tensors = {f"{name}.alpha": torch.tensor(4.0), f"{name}.lora_down.weight": torch.ones(32, 32)}
    save(TensorFile(tensors), tmp_path / "a.safetensors")
    said = rf"unsupported: lora_down without lora_up on 1 module, first '{name}.*': ai-toolkit's fullrank"
    with pytest.raises(FormatError, match=said):
        read(tmp_path / "a.safetensors")
    pair = {f"{name}_2.lora_down.weight": torch.ones(4, 32), f"{name}_2.lora_up.weight": torch.ones(32, 4)}
    save(TensorFile(tensors | pair), tmp_path / "a.safetensors")
    said = rf"1 layer of 2 has only one of the two factors; the first is '{name}.lora_down.weight'"
    with pytest.raises(FormatError, match=said):
        read(tmp_path / "a.safetensors")
