"""The peft dialect against peft itself, in both directions, in one folder and in several."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from scumble.adapters.state import AdapterState, LayerState
from scumble.errors import CannotRepresent, FormatError, UnusedTensors
from scumble.formats import TensorFile, detect, read, write
from scumble.formats.container import PEFT_CONFIG, PEFT_NAME, files_of, find, load, save
from tests.formats.adapters_of import ATTENTION, BLOCK, SHAPES, adapter, layer

Q = f"{BLOCK}.attn1.to_q"
REST = Q.removeprefix("unet.")
UNET = [path for path in SHAPES if path.startswith("unet.")]


class Attention(nn.Module):
    """Enough of a UNet for peft: the layers of one block under their names."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        for path in UNET:
            *parents, name = path.removeprefix("unet.").split(".")
            place: nn.Module = self
            for parent in parents:
                if not hasattr(place, parent):
                    place.add_module(parent, nn.Module())
                place = getattr(place, parent)
            out, inside, *kernel = SHAPES[path]
            place.add_module(name, nn.Conv2d(inside, out, kernel[0]) if kernel else nn.Linear(inside, out))


def put(folder: Path, config: dict[str, Any] | None, tensors: dict[str, torch.Tensor] | None = None) -> Path:
    """A peft folder with these fields in its configuration, and a pair for one layer."""
    save(TensorFile(pair() if tensors is None else tensors), folder / PEFT_NAME)
    if config is not None:
        (folder / PEFT_CONFIG).write_text(
            json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 2, **config})
        )
    return folder


def pair(name: str = REST) -> dict[str, torch.Tensor]:
    return {
        f"base_model.model.{name}.lora_{p}.weight": layer(Q).tensors[t]
        for p, t in (("A", "down"), ("B", "up"))
    }


@pytest.mark.parametrize("stabilized", [False, True])
def test_what_peft_saved_is_read_with_its_scales(stabilized: bool, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    settings = LoraConfig(
        r=4,
        lora_alpha=2,
        target_modules=["to_q", "to_k", "conv1", "to_out.0"],
        rank_pattern={"to_k": 2, "mid_block.*to_q": 8},
        alpha_pattern={".*resnets.0.conv1": 16},
        use_rslora=stabilized,
        init_lora_weights=False,
    )
    model = get_peft_model(Attention(), settings)
    model.save_pretrained(tmp_path)
    assert detect(tmp_path) == detect(tmp_path / PEFT_NAME) == "peft"
    found = read(tmp_path, SHAPES)
    assert found.report == "5/5 unet layers, 0 unused tensors"
    for path, mine in found.state.layers.items():
        theirs: Any = model.get_submodule("base_model.model." + path.removeprefix("unet."))
        assert mine.rank == theirs.r["default"] and mine.scale == pytest.approx(
            theirs.scaling["default"], rel=1e-12
        )
        assert torch.equal(mine.tensors["down"], theirs.lora_A["default"].weight)
        assert torch.equal(mine.tensors["up"], theirs.lora_B["default"].weight)


def test_peft_loads_what_we_write_and_acts_the_same(tmp_path: Path) -> None:
    from peft import PeftModel

    layers = {
        path: layer(path, 2 + n % 3, (1.0, 2.5, 8.0)[n % 3], n % 4 == 0, n) for n, path in enumerate(UNET)
    }
    path = write(AdapterState(layers), tmp_path / "fox", "peft")
    assert path == tmp_path / "fox" / PEFT_NAME
    model = PeftModel.from_pretrained(Attention(), tmp_path / "fox")
    for name, mine in layers.items():
        theirs: Any = model.get_submodule("base_model.model." + name.removeprefix("unet."))
        with torch.no_grad():
            change = mine.scale * (mine.tensors["up"].flatten(1) @ mine.tensors["down"].flatten(1))
            assert torch.allclose(theirs.get_delta_weight("default").flatten(1), change, rtol=1e-5, atol=1e-6)
    assert read(path, SHAPES).state.equal(AdapterState(layers))


def test_several_components_are_a_folder_each(tmp_path: Path) -> None:
    state = adapter(alpha=2.0)
    for given in (tmp_path / "a", tmp_path / "b.safetensors"):
        path = write(state, given, "peft")
        assert path == given.with_suffix("") and find(path) == path
        assert set(files_of(path)) == {"unet", "text_encoder", "text_encoder_2"}
        found = read(path, SHAPES)
        assert found.state.equal(state) and found.dialect == "peft" and len(found.files) == 3
        assert (
            found.report
            == "8/8 unet layers, 2/2 text_encoder layers, 1/1 text_encoder_2 layers, 0 unused tensors"
        )
    one = read(tmp_path / "a" / "text_encoder", SHAPES)
    assert set(one.state.layers) == {path for path in SHAPES if path.startswith("text_encoder.")}
    config = json.loads((tmp_path / "a" / "text_encoder_2" / PEFT_CONFIG).read_text())
    assert config["auto_mapping"]["base_model_class"] == "CLIPTextModelWithProjection"


@pytest.mark.parametrize("root", ["unet", "text_encoder", "text_encoder_2"])
def test_the_component_of_one_folder_is_found_again(root: str, tmp_path: Path) -> None:
    state = adapter([path for path in SHAPES if path.startswith(root + ".")])
    assert read(write(state, tmp_path / "x", "peft"), SHAPES).state.equal(state)


def test_text_encoders_with_and_without_text_model(tmp_path: Path) -> None:
    path = "text_encoder.encoder.layers.0.self_attn.q_proj"
    for name in ("encoder.layers.0.self_attn.q_proj", "text_model.encoder.layers.0.self_attn.q_proj"):
        tensors = {
            f"base_model.model.{name}.lora_{p}.weight": layer(path).tensors[t]
            for p, t in (("A", "down"), ("B", "up"))
        }
        assert set(read(put(tmp_path, {}, tensors), SHAPES).state.layers) == {path}


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"fan_in_fan_out": True}, "unsupported: fan_in_fan_out"),
        ({"peft_type": "BOFT"}, "type BOFT"),
        ({"peft_type": "PeftType.PROMPT_TUNING"}, "type PROMPT_TUNING"),
        ({"init_lora_weights": "pissa_niter_4"}, "'pissa_niter_4'.*changes the base's own weights"),
        ({"layer_replication": [[0, 4]]}, "layer_replication"),
        ({"r": "4"}, "adapter_config.json is malformed"),
        ({"r": 8}, "gives 'unet.down_blocks.* rank 8, its tensors have rank 4"),
        ({"alpha_pattern": {"(a+)+x": 2}}, "refused"),
    ],
)
def test_what_the_configuration_says_and_no_tensor_shows_is_refused_by_name(
    config: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(FormatError, match=said):
        read(put(tmp_path, config), SHAPES)


def test_a_configuration_that_is_none_is_an_error_and_a_missing_one_is_said(tmp_path: Path) -> None:
    put(tmp_path, None)
    found = read(tmp_path, SHAPES)
    assert found.state.layers[Q].scale == 1.0
    assert "adapter_config.json is not beside the file; alpha absent: using alpha = rank" in found.report
    for content in (b"\xff\xfe", b"[1", b"[]", b"{" * 2**21):
        (tmp_path / PEFT_CONFIG).write_bytes(content)
        with pytest.raises(FormatError, match="adapter_config"):
            read(tmp_path, SHAPES)


def test_nothing_is_imported_by_its_word(tmp_path: Path) -> None:
    mapping = {"base_model_class": "UNet2DConditionModel", "parent_library": "no_such_module_anywhere"}
    assert set(read(put(tmp_path, {"auto_mapping": mapping}), SHAPES).state.layers) == {Q}


def test_weights_of_modules_that_were_trained_whole_are_reported(tmp_path: Path) -> None:
    tensors = pair() | {"base_model.model.conv_in.weight": torch.ones(3)}
    with pytest.raises(UnusedTensors, match="1 of 3 tensors matched no known kind"):
        read(put(tmp_path, {"modules_to_save": ["conv_in"]}, tensors), SHAPES)


def test_a_pickled_peft_folder_is_read(tmp_path: Path) -> None:
    put(tmp_path, {})
    torch.save(dict(load(tmp_path / PEFT_NAME).tensors), tmp_path / "adapter_model.bin")
    (tmp_path / PEFT_NAME).unlink()
    assert read(tmp_path, SHAPES).state.layers[Q].alpha == 2.0


def test_what_it_can_not_hold_is_refused(tmp_path: Path) -> None:
    stranger = AdapterState({"transformer.a": LayerState("lora", 4, 4.0, layer(Q).tensors)})
    with pytest.raises(CannotRepresent, match=r"no folder for 'transformer.a'"):
        write(stranger, tmp_path, "peft")
    assert not list(tmp_path.iterdir())
    assert write(adapter(ATTENTION), tmp_path, "peft") == tmp_path
