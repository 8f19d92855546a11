"""LyCORIS's files against its own code: what its modules compute is what the file read here computes."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from scumble.adapters import FAMILIES, Adapter, AdapterState, layers_of
from scumble.errors import CannotRepresent, FormatError, NoEffect, UnusedTensors
from scumble.formats import TensorFile, read, write
from scumble.formats.container import save
from scumble.formats.lycoris import Lycoris

modules = pytest.importorskip("lycoris.modules")


class Model(nn.Module):
    """Layers where a UNet has them."""

    def __init__(self) -> None:
        super().__init__()
        block = nn.Module()
        block.conv1 = nn.Conv2d(12, 20, 3, stride=2, padding=1)
        block.time_emb_proj = nn.Linear(18, 24)
        block.conv_shortcut = nn.Conv2d(12, 20, 1)
        self.down_blocks = nn.ModuleList([nn.Module()])
        self.down_blocks[0].resnets = nn.ModuleList([block])


LAYERS: dict[str, tuple[int, ...]] = {
    "conv1": (2, 12, 9, 9),
    "time_emb_proj": (2, 5, 18),
    "conv_shortcut": (2, 12, 5, 5),
}
"""Layer -> the shape of an input."""

CASES: dict[str, tuple[str, dict[str, Any], str]] = {
    "loha": ("LohaModule", {"lora_dim": 3, "alpha": 2}, "loha"),
    "loha tucker": ("LohaModule", {"lora_dim": 3, "alpha": 2, "use_tucker": True}, "loha"),
    "loha stabilized": ("LohaModule", {"lora_dim": 4, "alpha": 2, "rs_lora": True}, "loha"),
    "loha with magnitude": ("LohaModule", {"lora_dim": 3, "alpha": 2, "weight_decompose": True}, "loha"),
    "lokr": ("LokrModule", {"lora_dim": 2, "alpha": 5, "factor": 2}, "lokr"),
    "lokr whole": ("LokrModule", {"lora_dim": 9, "alpha": 5, "full_matrix": True}, "lokr"),
    "lokr both": ("LokrModule", {"lora_dim": 1, "alpha": 5, "decompose_both": True}, "lokr"),
    "lokr unbalanced": ("LokrModule", {"lora_dim": 2, "alpha": 5, "unbalanced_factorization": True}, "lokr"),
    "lokr tucker": ("LokrModule", {"lora_dim": 2, "alpha": 5, "factor": 2, "use_tucker": True}, "lokr"),
    "lokr with input magnitude": (
        "LokrModule",
        {"lora_dim": 2, "alpha": 5, "weight_decompose": True, "wd_on_out": False},
        "lokr",
    ),
    "dora": ("LoConModule", {"lora_dim": 3, "alpha": 2, "weight_decompose": True}, "dora"),
    "dora on inputs": (
        "LoConModule",
        {"lora_dim": 3, "alpha": 2, "weight_decompose": True, "wd_on_out": False},
        "dora",
    ),
    "lokr tucker with magnitude": (
        "LokrModule",
        {"lora_dim": 2, "alpha": 5, "factor": 2, "use_tucker": True, "weight_decompose": True},
        "lokr",
    ),
    "oft": ("DiagOFTModule", {"lora_dim": 4}, "oft"),
    "oft limited": ("DiagOFTModule", {"lora_dim": 4, "constraint": 0.01}, "oft"),
    "oft rescaled": ("DiagOFTModule", {"lora_dim": 4, "rescaled": True}, "oft"),
    "boft": ("ButterflyOFTModule", {"lora_dim": 10}, "boft"),
    "boft limited": ("ButterflyOFTModule", {"lora_dim": 10, "constraint": 0.01}, "boft"),
    "boft rescaled": ("ButterflyOFTModule", {"lora_dim": 10, "rescaled": True}, "boft"),
    "glora": ("GLoRAModule", {"lora_dim": 3, "alpha": 2}, "glora"),
    "ia3": ("IA3Module", {}, "ia3"),
    "ia3 on inputs": ("IA3Module", {"train_on_input": True}, "ia3"),
}


def path_of(layer: str) -> str:
    return f"unet.down_blocks.0.resnets.0.{layer}"


def written_by_lycoris(case: str) -> tuple[dict[str, Tensor], dict[str, nn.Module]]:
    """A file's tensors and the modules that wrote them, with values as if trained."""
    kind, options, _ = CASES[case]
    torch.manual_seed(0)
    tensors, made = {}, {}
    for path, layer in layers_of({"unet": Model().requires_grad_(False)}).items():
        name = "lora_" + path.replace(".", "_")
        module = getattr(modules, kind)(name, layer, **options).eval()
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(0.2 * torch.randn(parameter.shape))
            if hasattr(module, "dora_scale"):
                module.dora_scale = nn.Parameter(module.dora_scale * 1.3)
            state = (
                module.custom_state_dict() if hasattr(module, "custom_state_dict") else module.state_dict()
            )
            state = state or {key: value for key, value in module.state_dict().items()}
        tensors |= {f"{name}.{key}": value.detach().clone().contiguous() for key, value in state.items()}
        made[path] = module
    return tensors, made


@pytest.mark.parametrize("case", CASES)
def test_a_file_of_lycoris_computes_what_its_modules_compute(case: str, tmp_path: Path) -> None:
    tensors, made = written_by_lycoris(case)
    save(TensorFile(tensors), tmp_path / "file.safetensors")
    torch.manual_seed(0)
    unet = Model().requires_grad_(False)
    layers = layers_of({"unet": unet})
    found = read(tmp_path / "file.safetensors", layers)
    assert found.dialect == "lycoris" and not found.unused
    assert {layer.family for layer in found.state.layers.values()} == {CASES[case][2]}
    with Adapter.load({"unet": unet}, found.state), torch.no_grad():
        for layer, shape in LAYERS.items():
            x = torch.randn(shape, generator=torch.Generator().manual_seed(3))
            theirs, base = made[path_of(layer)](x), layers[path_of(layer)](x)
            assert (theirs - base).abs().max() > 1e-3
            torch.testing.assert_close(
                unet.get_submodule(path_of(layer)[5:])(x), theirs, rtol=1e-5, atol=1e-5
            )
    again = write(found.state, tmp_path / "again.safetensors")
    assert read(again, layers).state.equal(found.state)


def test_a_whole_difference_and_its_biases(tmp_path: Path) -> None:
    name, diff = "lora_unet_down_blocks_0_resnets_0_conv1", torch.randn(20, 12, 3, 3)
    layers = {path_of("conv1"): (20, 12, 3, 3)}
    tensors = {f"{name}.diff": diff, f"{name}.diff_b": torch.ones(20)}
    decoded = Lycoris().decode(TensorFile(tensors), layers)
    state = decoded.state.layers[path_of("conv1")]
    assert (state.family, state.scale) == ("full", 1.0) and torch.equal(state.tensors["diff"], diff)
    assert torch.equal(state.tensors["bias"], torch.ones(20)) and not decoded.unused
    tensors[f"{name}.diff_b"] = torch.ones(21)
    with pytest.raises(FormatError, match=r"change to the bias of .* 20 outputs: diff_b \(21,\)"):
        Lycoris().decode(TensorFile(tensors), layers)


@pytest.mark.parametrize("scaled", [False, True])
def test_the_turns_of_onetrainer_are_read_and_written_again(scaled: bool, tmp_path: Path) -> None:
    name = "lora_unet_down_blocks_0_resnets_0_conv1"
    numbers = 0.1 * torch.randn(27, 6, dtype=torch.float32)
    marks = {f"{name}.oft_R.scaled_oft": torch.tensor(True)} if scaled else {}
    save(TensorFile({f"{name}.oft_R.weight": numbers, **marks}), tmp_path / "a.safetensors")
    layers = {path_of("conv1"): (20, 12, 3, 3)}
    state = read(tmp_path / "a.safetensors", layers).state
    layer = state.layers[path_of("conv1")]
    assert (layer.family, layer.rank, layer.alpha) == ("oft", 4, 0.0)
    torch.testing.assert_close(layer.tensors["weight_series"], numbers / (2 * 3**0.5 if scaled else 1))
    for found in (layers, None):
        again = read(write(state, tmp_path / "b.safetensors"), found)
        assert again.state.equal(state) and not again.unused
    with pytest.raises(UnusedTensors):  # blocks that do not fill the layer
        read(tmp_path / "a.safetensors", {path_of("conv1"): (20, 11, 3, 3)})


def test_a_limit_of_zero_is_no_turn_in_kohyas_own_oft() -> None:
    parts = {"oft_blocks": torch.ones(5, 4, 4), "alpha": torch.tensor(0.0)}
    layers = {path_of("conv1"): (20, 12, 3, 3)}
    for prefix in ("lora", "oft"):
        name = f"{prefix}_unet_down_blocks_0_resnets_0_conv1"
        file = TensorFile({f"{name}.{part}": tensor for part, tensor in parts.items()})
        if prefix == "lora":
            assert Lycoris().decode(file, layers).state.layers[path_of("conv1")].alpha == 0.0
            continue
        with pytest.raises(NoEffect, match="alpha is 0"):
            Lycoris().decode(file, layers)


def test_where_some_limits_are_zero_the_others_act_and_it_is_said() -> None:
    turns, still = "oft_unet_down_blocks_0_resnets_0_conv1", "oft_unet_down_blocks_0_resnets_0_conv2"
    down, up = torch.ones(2, 12), torch.ones(20, 2)
    beside = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
    tensors = {
        f"{turns}.oft_blocks": torch.ones(5, 4, 4),
        f"{turns}.alpha": torch.tensor(0.5),
        f"{still}.oft_blocks": torch.ones(5, 4, 4),
        f"{still}.alpha": torch.tensor(0.0),
        f"{beside}.lora_down.weight": down,
        f"{beside}.lora_up.weight": up,
    }
    found = Lycoris().decode(TensorFile(tensors), None)
    acting = {path.rpartition(".")[2] for path in found.state.layers}
    assert acting == {"conv1", "q_proj"} and not found.unused
    assert any("1 layer left out, where alpha 0 allows" in note for note in found.notes)
    without = {name: tensor for name, tensor in tensors.items() if not name.startswith(turns)}
    assert {path.rpartition(".")[2] for path in Lycoris().decode(TensorFile(without), None).state.layers} == {
        "q_proj"
    }


@pytest.mark.parametrize("word", [True, "True", "true"])
def test_a_scale_that_a_file_does_not_tell_is_refused(word: object) -> None:
    """LyCORIS saves the alpha of a rank-stabilized GLoRA as if it were none, and reads it back so."""
    tensors, _ = written_by_lycoris("glora")
    said = TensorFile(tensors, {"ss_network_args": json.dumps({"algo": "glora", "rs_lora": word})})
    with pytest.raises(FormatError, match="unsupported: a rank-stabilized GLoRA"):
        Lycoris().decode(said, None)
    plain = TensorFile(tensors, {"ss_network_args": json.dumps({"algo": "glora", "rs_lora": False})})
    assert Lycoris().decode(plain, None).used


@pytest.mark.parametrize(
    ("ending", "said"),
    [
        ("oft_diag", "the first OFT and BOFT of LyCORIS"),
        ("boft_R", "peft's BOFT"),
        ("bm.weight", "GLoRA with a kernel apart"),
        ("lokr_t1", "LoKr with two cores"),
    ],
)
def test_what_no_family_holds_is_refused_by_its_name(ending: str, said: str) -> None:
    tensors = {f"lora_unet_down_blocks_0_resnets_0_conv1.{ending}": torch.ones(2, 4, 4)}
    with pytest.raises(FormatError, match=f"unsupported: .*{said}"):
        Lycoris().decode(TensorFile(tensors), [path_of("conv1")])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"hada_w1_a": None}, "no whole loha"),
        ({"hada_w1_a": torch.ones(24, 7)}, "contradict each other"),
        ({"hada_w1_a": torch.ones(24, 3, dtype=torch.int64)}, "floating point"),
        ({"dora_scale": torch.ones(5, 1)}, "dora_scale .*24 outputs"),
        ({"dora_scale": torch.ones(24, 1), "magnitude": torch.ones(24)}, "Not applied"),
    ],
)
def test_a_damaged_layer_is_one_clear_error(change: dict[str, Any], said: str) -> None:
    name = "lora_unet_down_blocks_0_resnets_0_time_emb_proj"
    sides = {"a": torch.ones(24, 3), "b": torch.ones(3, 18)}
    tensors = {f"hada_w{n}_{side}": sides[side].clone() for n in (1, 2) for side in "ab"} | change
    file = TensorFile({f"{name}.{part}": tensor for part, tensor in tensors.items() if tensor is not None})
    with pytest.raises(FormatError, match=said):
        Lycoris().decode(file, {path_of("time_emb_proj"): (24, 18)})


def test_a_weight_of_another_shape_is_named(tmp_path: Path) -> None:
    tensors, _ = written_by_lycoris("lokr")
    save(TensorFile(tensors), tmp_path / "file.safetensors")
    layers = {path: (7, *layer.weight.shape[1:]) for path, layer in layers_of({"unet": Model()}).items()}
    with pytest.raises(UnusedTensors, match=r"change a weight of \(24, 18\), where the model has \(7, 18\)"):
        read(tmp_path / "file.safetensors", layers)


def test_a_scale_that_its_readers_would_ignore_is_refused() -> None:
    layer = nn.Linear(4, 6)
    family = FAMILIES.get("full")
    delta = family.fresh(layer, family.settings(), rank=1, alpha=2.0, generator=torch.Generator())
    with pytest.raises(CannotRepresent, match="a change without rank has no alpha"):
        Lycoris().encode(AdapterState({path_of("conv1"): delta.state()}))


def test_what_is_written_is_read_by_lycoris() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(18, 24).requires_grad_(False)
    family = FAMILIES.get("loha")
    delta = family.fresh(
        layer, family.settings(), rank=3, alpha=2.0, generator=torch.Generator().manual_seed(0)
    )
    with torch.no_grad():
        for parameter in delta.parameters():
            parameter.add_(0.2)
    file = Lycoris().encode(AdapterState({path_of("time_emb_proj"): delta.state()}))
    assert file.metadata["ss_network_module"] == "lycoris.kohya"
    name = "lora_unet_down_blocks_0_resnets_0_time_emb_proj"
    parts = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2", "alpha", "dora_scale")
    values = [file.tensors.get(f"{name}.{part}") for part in parts]
    with torch.no_grad():
        theirs = modules.LohaModule.make_module_from_state_dict(name, copy.deepcopy(layer), *values)
        x = torch.randn(2, 18)
        torch.testing.assert_close(theirs.eval()(x), delta(x, layer), rtol=1e-5, atol=1e-5)


def test_where_no_layer_has_a_rank_nothing_is_said_of_alphas(tmp_path: Path) -> None:
    whole = {"lora_unet_mid_block_attentions_0_proj_in.diff": torch.ones(32, 32)}
    save(TensorFile(whole), tmp_path / "a.safetensors")
    assert read(tmp_path / "a.safetensors").report == "1/1 unet layers, 0 unused tensors"
    name = "lora_unet_mid_block_attentions_0_proj_out"
    pair = {f"{name}.lora_down.weight": torch.ones(2, 32), f"{name}.lora_up.weight": torch.ones(32, 2)}
    save(TensorFile(whole | pair), tmp_path / "b.safetensors")
    assert read(tmp_path / "b.safetensors").notes == ("alpha absent: using alpha = rank",)
