"""Changes of biases and normalisations in files: every spelling is read, and written where a dialect has a place."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from scumble.adapters import AdapterState, LayerState, layers_of
from scumble.errors import CannotRepresent, FormatError, UnusedTensors
from scumble.formats import CODECS, TensorFile, read, write
from scumble.formats.container import save
from scumble.formats.inspection import change_norm, inspect
from scumble.inference.attach import load_adapter, roots_of, unload_adapters
from scumble.models.tiny import tiny_pipeline
from tests.formats.adapters_of import ATTENTION, SHAPES, adapter
from tests.formats.sdxl import outputs, tiny_sdxl

PIPELINES = {"sd1": lambda: tiny_pipeline("sd1"), "sdxl": tiny_sdxl}


def changes(pipeline: object) -> AdapterState:
    """A whole difference of every normalisation, and of some layers with their biases."""
    layers, generator = {}, torch.Generator().manual_seed(0)
    for number, (path, layer) in enumerate(layers_of(roots_of(pipeline), norms=True).items()):
        if layer.weight.dim() > 1 and (number % 7 or layer.bias is None):
            continue
        tensors = {"diff": 0.1 * torch.randn(layer.weight.shape, generator=generator)}
        if layer.bias is not None:
            tensors["bias"] = 0.1 * torch.randn(layer.bias.shape, generator=generator)
        layers[path] = LayerState("full", 1, 1.0, tensors)
    return AdapterState(layers)


@pytest.mark.parametrize("base", PIPELINES)
def test_normalisations_and_biases_act_in_a_pipeline_and_leave_no_trace(base: str, tmp_path: Path) -> None:
    pipeline, wanted = PIPELINES[base](), PIPELINES[base]()
    state = changes(pipeline)
    before = outputs(pipeline)
    roots = roots_of(wanted)
    with torch.no_grad():
        for path, layer in state.layers.items():
            module = roots[path.partition(".")[0]].get_submodule(path.partition(".")[2])
            module.weight += layer.tensors["diff"]
            if "bias" in layer.tensors:
                module.bias += layer.tensors["bias"]
    path = write(state, tmp_path / "a.safetensors")
    found = read(path)  # by the names of the well-known bases
    assert found.dialect == "lycoris" and not found.unused and len(found.state.layers) == len(state.layers)
    load_adapter(pipeline, path, quiet=True)
    for name, theirs in outputs(wanted).items():
        mine = outputs(pipeline)[name]
        assert (theirs - before[name]).norm() > 0
        assert (mine - theirs).norm() <= 5e-5 * (theirs - before[name]).norm()
    assert unload_adapters(pipeline) == 1
    assert all(torch.equal(value, before[name]) for name, value in outputs(pipeline).items())


NAME = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out_0"
PATH = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0"


def pair() -> dict[str, Tensor]:
    return {
        "lora_down.weight": torch.ones(2, 32),
        "lora_up.weight": torch.ones(32, 2),
        "alpha": torch.tensor(1.0),
    }


@pytest.mark.parametrize(
    ("parts", "names"),
    [
        (pair() | {"diff_b": torch.ones(32)}, {"down", "up", "bias"}),
        (pair() | {"lora_up.bias": torch.ones(32)}, {"down", "up", "up_bias"}),
        (
            pair() | {"dora_scale": torch.ones(32, 1), "diff_b": torch.ones(32)},
            {"down", "up", "magnitude", "bias"},
        ),
        ({"diff_b": torch.ones(32)}, {"bias"}),
        (
            {"lokr_w1": torch.ones(4, 4), "lokr_w2": torch.ones(8, 8), "diff_b": torch.ones(32)},
            {"w1", "w2", "bias"},
        ),
    ],
)
def test_a_bias_is_read_beside_any_family(parts: dict[str, Tensor], names: set[str], tmp_path: Path) -> None:
    save(TensorFile({f"{NAME}.{part}": tensor for part, tensor in parts.items()}), tmp_path / "a.safetensors")
    for layers in (None, SHAPES):
        found = read(tmp_path, layers)
        assert set(found.state.layers[PATH].tensors) == names and not found.unused
    able = [name for name in CODECS if CODECS.get(name)().obstacle(found.state) is None]
    assert able
    for name in able:
        file = CODECS.get(name)().encode(found.state)
        assert CODECS.get(name)().decode(file, SHAPES).state.equal(found.state)


@pytest.mark.parametrize(
    ("extra", "error", "said"),
    [
        ({"diff_b": torch.ones(31)}, FormatError, "32 outputs: diff_b"),
        ({"diff_b": torch.ones(32, dtype=torch.int64)}, FormatError, "change to the bias"),
        ({"diff_b": torch.ones(32), "b_norm": torch.ones(32)}, FormatError, "b_norm .* diff_b"),
        ({"w_norm": torch.ones(32)}, FormatError, "no whole full"),
    ],
)
def test_what_is_no_bias_is_one_clear_error(
    extra: dict[str, Tensor], error: type[Exception], said: str, tmp_path: Path
) -> None:
    tensors = {f"{NAME}.{part}": tensor for part, tensor in (pair() | extra).items()}
    save(TensorFile(tensors), tmp_path / "a.safetensors")
    with pytest.raises(error, match=said):
        read(tmp_path, SHAPES)


def test_a_normalisation_of_another_width_does_not_fit(tmp_path: Path) -> None:
    norm = "unet.down_blocks.0.attentions.0.transformer_blocks.0.norm1"
    tensors = {NAME.replace("attn1_to_out_0", "norm1") + ".w_norm": torch.ones(31)}
    save(TensorFile(tensors), tmp_path / "a.safetensors")
    with pytest.raises(UnusedTensors, match=r"\(31,\), where the model has \(32,\)"):
        read(tmp_path, SHAPES | {norm: (32,)})


@pytest.mark.parametrize("name", ["kohya", "diffusers", "peft", "attention-processors"])
def test_a_dialect_without_a_place_for_it_names_one_that_has(name: str) -> None:
    state = adapter(ATTENTION)
    path = ATTENTION[0]
    out = state.layers[path].tensors["up"].shape[0]
    tensors = {**state.layers[path].tensors, "bias": torch.ones(out)}
    state = replace(state, layers={**state.layers, path: replace(state.layers[path], tensors=tensors)})
    with pytest.raises(CannotRepresent, match=r"change to the bias of .*Write it as lycoris"):
        CODECS.get(name)().encode(state)


def test_inspection_counts_them(tmp_path: Path) -> None:
    state = AdapterState({PATH: LayerState("full", 1, 1.0, {"bias": torch.full((4,), 3.0)})})
    assert change_norm(state.layers[PATH]) == 6.0
    assert inspect(write(state, tmp_path / "a.safetensors")).blocks[0].norm == 6.0
