"""Every dialect in SD 1 and SDXL pipelines: the outputs that diffusers gives with the same file, and no trace after."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from scumble.adapters import Adapter, layers_of
from scumble.adapters.state import AdapterState, LayerState
from scumble.errors import FormatError, UnusedTensors, WrongBase
from scumble.formats import TensorFile, write
from scumble.formats.container import load, save
from scumble.formats.flat_names import original_name
from scumble.inference.attach import load_adapter, roots_of, unload_adapters
from scumble.models.tiny import tiny_pipeline
from tests.formats.sdxl import outputs, tiny_sdxl

PIPELINES: dict[str, Callable[[], Any]] = {"sd1": lambda: tiny_pipeline("sd1"), "sdxl": tiny_sdxl}
BOTH = pytest.mark.parametrize("base", PIPELINES)
KINDS = (
    ".proj_in",
    ".attn",
    ".ff.",
    "conv1",
    "time_emb_proj",
    "samplers.0.conv",
    "conv_shortcut",
    "self_attn",
    ".mlp.",
)
"""Layers that diffusers reads in kohya's names as in its own."""


@pytest.fixture(scope="module")
def pipes() -> dict[str, Any]:
    """One pipeline of each base, for tests that leave them as they were."""
    return {name: make() for name, make in PIPELINES.items()}


def adapter(
    pipeline: Any, alpha: float = 2.0, only: tuple[str, ...] = KINDS, size: float = 0.15
) -> AdapterState:
    """A random adapter of rank 4 on the layers whose path contains one of `only`."""
    generator = torch.Generator().manual_seed(0)
    layers = {}
    for path, layer in layers_of(roots_of(pipeline)).items():
        if any(part in path for part in only):
            out, *inner = layer.weight.shape
            down = torch.randn(4, *inner, generator=generator) * size
            up = torch.randn(out, 4, *(1 for _ in inner[1:]), generator=generator) * size
            layers[path] = LayerState("lora", 4, alpha, {"down": down, "up": up})
    return AdapterState(layers)


def rms(tensor: torch.Tensor) -> float:
    return float(tensor.double().square().mean().sqrt())


def check_same(
    mine: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], base: dict[str, torch.Tensor]
) -> None:
    """Equal to 5e-5 of the adapter's own effect, which must be there."""
    for name, output in theirs.items():
        effect = rms(output - base[name])
        assert effect > 1e-3 * rms(base[name]), f"the adapter must act on {name}, or this test shows nothing"
        assert rms(mine[name] - output) < 5e-5 * effect, name


@BOTH
@pytest.mark.parametrize("dialect", ["diffusers", "kohya"])
def test_unmodified_diffusers_gives_the_same_with_the_same_file(
    base: str, dialect: str, pipes: dict[str, Any], tmp_path: Path
) -> None:
    pipe = pipes[base]
    before = outputs(pipe)
    path = write(adapter(pipe), tmp_path, dialect)
    if dialect == "kohya":
        original = any("input_blocks" in name for name in load(path).tensors)
        assert original == (base == "sdxl"), "SDXL has the original code's names"
    load_adapter(pipe, path, quiet=True)
    mine = outputs(pipe)
    unload_adapters(pipe)
    other = PIPELINES[base]()
    other.load_lora_weights(str(tmp_path))
    check_same(mine, outputs(other), before)
    assert all(torch.equal(output, before[name]) for name, output in outputs(pipe).items())


@BOTH
@pytest.mark.parametrize("dialect", ["kohya", "peft", "comfyui"])
def test_every_dialect_acts_as_the_adapter_itself(
    base: str, dialect: str, pipes: dict[str, Any], tmp_path: Path
) -> None:
    pipe = pipes[base]
    before, state = outputs(pipe), adapter(pipe, alpha=3.0, only=("",))
    with Adapter.load(roots_of(pipe), state):
        direct = outputs(pipe)
    if dialect == "comfyui":
        save(in_comfyui(state, pipe), tmp_path / "a.safetensors")
    else:
        write(state, tmp_path, dialect)
    report = load_adapter(pipe, tmp_path, quiet=True).report
    assert f"applied {len([path for path in state.layers if path.startswith('unet.')])}/" in report
    check_same(outputs(pipe), direct, before)
    unload_adapters(pipe)
    assert all(torch.equal(output, before[name]) for name, output in outputs(pipe).items())


def in_comfyui(state: AdapterState, pipe: Any) -> TensorFile:
    """As OneTrainer writes for ComfyUI, `.alpha` beside the factors."""
    prefixes = {
        "text_encoder": "text_encoders.clip_l.transformer",
        "text_encoder_2": "text_encoders.clip_g.transformer",
    }
    tensors = {}
    for path, one in state.layers.items():
        root, _, rest = path.partition(".")
        if root == "unet":
            name = f"diffusion_model.{original_name(rest, pipe.unet.config.layers_per_block)}"
        else:
            name = f"{prefixes[root]}.{'' if rest.startswith('text_') else 'text_model.'}{rest}"
        tensors |= {f"{name}.lora_A.weight": one.tensors["down"], f"{name}.lora_B.weight": one.tensors["up"]}
        tensors[f"{name}.alpha"] = torch.tensor(one.alpha)
    return TensorFile(tensors)


def test_numbered_layers_act_on_the_layers_that_their_tool_met(pipes: dict[str, Any], tmp_path: Path) -> None:
    pipe = pipes["sd1"]
    before = outputs(pipe)
    state = adapter(pipe, 4.0, (".to_q", ".to_k", ".to_v", ".to_out", "net.0.proj", "self_attn"))
    tensors, header = {}, {"unet": json.dumps(["CrossAttention", "Attention", "GEGLU"])}
    for root, classes in (("unet", ("Attention", "GEGLU")), ("text_encoder", ("CLIPAttention",))):
        met = [
            f"{root}.{path}.{inner}"
            for path, ancestor in getattr(pipe, root).named_modules()
            if type(ancestor).__name__ in classes
            for inner, module in ancestor.named_modules()
            if isinstance(module, nn.Linear)
        ]
        for number, path in enumerate(met):
            for part in ("up", "down"):
                tensors[f"{root}:{number}:{part}"] = state.layers[path].tensors[part]
            header[f"{root}:{number}:rank"] = "4"
    save(TensorFile(tensors, header), tmp_path / "a.safetensors")
    with Adapter.load(roots_of(pipe), state):
        direct = outputs(pipe)
    load_adapter(pipe, tmp_path, quiet=True)
    check_same(outputs(pipe), direct, before)
    unload_adapters(pipe)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn])
def test_files_of_every_precision_act_by_the_numbers_that_they_hold(
    dtype: torch.dtype, pipes: dict[str, Any], tmp_path: Path
) -> None:
    pipe = pipes["sdxl"]
    before, state = outputs(pipe), adapter(pipe)
    rounded = {
        path: replace(one, tensors={part: tensor.to(dtype).float() for part, tensor in one.tensors.items()})
        for path, one in state.layers.items()
    }
    with Adapter.load(roots_of(pipe), replace(state, layers=rounded)):
        direct = outputs(pipe)
    write(state, tmp_path, "kohya", dtype=dtype)
    load_adapter(pipe, tmp_path, quiet=True)
    check_same(outputs(pipe), direct, before)
    unload_adapters(pipe)


def test_several_files_of_several_dialects_at_once(pipes: dict[str, Any], tmp_path: Path) -> None:
    pipe = pipes["sdxl"]
    before = outputs(pipe)
    unet, text = adapter(pipe, only=("attn1",)), adapter(pipe, only=("text_encoder",))
    with (
        Adapter.load(roots_of(pipe), unet, name="a"),
        Adapter.load(roots_of(pipe), text, name="b", strength=0.5),
    ):
        direct = outputs(pipe)
    paths = [write(unet, tmp_path / "unet", "kohya"), write(text, tmp_path / "fox", "peft")]
    one, two = load_adapter(pipe, paths, [1.0, 0.5], quiet=True)
    assert (one.name, two.name) == ("unet", "fox")
    check_same(outputs(pipe), direct, before)
    unload_adapters(pipe)


def digest(pipe: Any) -> dict[str, Any]:
    """Every module and every tensor's bytes."""
    return {
        name: (id(module), [tensor.sum().item() for tensor in module.parameters(recurse=False)])
        for root in roots_of(pipe).values()
        for name, module in root.named_modules()
    }


def test_what_does_not_fit_leaves_no_trace(pipes: dict[str, Any], tmp_path: Path) -> None:
    sd1, sdxl = pipes["sd1"], pipes["sdxl"]
    before = digest(sd1), digest(sdxl)
    write(adapter(sd1), tmp_path / "a", "kohya")
    with pytest.raises(WrongBase, match="LoRA is for cross-attention 32; model is cross-attention 64"):
        load_adapter(sdxl, tmp_path / "a", allow_partial=True)
    second = adapter(sdxl, only=("text_encoder_2",))
    write(second, tmp_path / "b", "kohya")
    with pytest.raises(UnusedTensors, match="speaks of text_encoder_2; the model has text_encoder, unet"):
        load_adapter(sd1, tmp_path / "b", allow_partial=True)
    file = load(write(adapter(sdxl), tmp_path / "c", "kohya"))
    for damage in (
        "lora_te2",
        "output_blocks",
    ):  # what comes last, when the rest might be in the model already
        name = sorted(name for name in file.tensors if damage in name and "lora_up" in name)[-1]
        save(
            TensorFile({**file.tensors, name: file.tensors[name][:-1]}, file.metadata),
            tmp_path / "d.safetensors",
        )
        with pytest.raises(FormatError, match="where the model has"):
            load_adapter(sdxl, tmp_path / "d.safetensors")
    assert (digest(sd1), digest(sdxl)) == before
