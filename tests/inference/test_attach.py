"""Adapters in a diffusers pipeline: diffusers' own pictures, and no trace of a load that failed."""

from __future__ import annotations

import copy
import hashlib
import math
import pickle
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from packaging.version import Version

from scumble.adapters import Adapted, Adapter, layers_of
from scumble.adapters.state import AdapterState, LayerState, Metadata
from scumble.errors import (
    AdapterError,
    FormatError,
    NoEffect,
    NotFinite,
    ScumbleError,
    UnusedTensors,
    WrongBase,
)
from scumble.formats import CODECS, WEIGHTS_NAME, TensorFile, write
from scumble.formats.container import load, save, to_bytes
from scumble.inference.attach import Attached, load_adapter, roots_of, unload_adapters
from scumble.models.tiny import tiny_pipeline


def fresh(family: str = "sd1") -> Any:
    pipeline = tiny_pipeline(family)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def pipe() -> Any:
    """One pipeline for the tests that must leave it as it was."""
    return fresh()


def draw(pipeline: Any) -> torch.Tensor:
    """A picture (1, 3, 16, 16) in [0, 1], always from the same seed."""
    generator = torch.Generator().manual_seed(1)
    drawn = pipeline(
        "a fox", num_inference_steps=3, guidance_scale=5.0, generator=generator, output_type="pt"
    )
    return drawn.images  # type: ignore[no-any-return]


def psnr(one: torch.Tensor, other: torch.Tensor) -> float:
    """Decibels, for values in [0, 1]."""
    error = (one - other).square().mean().item()
    return math.inf if error == 0 else -10 * math.log10(error)


def digest(pipeline: Any) -> str:
    """Over every module's identity and every tensor's bytes: what a failed load must not change."""
    found = hashlib.sha256()
    for root in roots_of(pipeline).values():
        for name, module in root.named_modules():
            found.update(f"{name} {id(module)} {type(module).__name__}".encode())
        for name, tensor in root.state_dict().items():
            found.update(name.encode() + tensor.view(torch.uint8).numpy().tobytes())
        found.update(str(sorted(root.__dict__)).encode())
    return found.hexdigest()


def adapter(
    pipeline: Any, only: str = "", mixed: bool = False, size: float = 0.2, **metadata: str
) -> AdapterState:
    """A random adapter on the layers whose path contains `only`; `mixed` in rank, alpha and kind of scale."""
    generator = torch.Generator().manual_seed(0)
    layers = {}
    chosen = [(path, layer) for path, layer in layers_of(roots_of(pipeline)).items() if only in path]
    for number, (path, layer) in enumerate(chosen):
        rank = (4, 2, 6)[number % 3] if mixed else 4
        alpha = (4.0, 1.0, 8.0, 2.5)[number % 4] if mixed else 4.0
        out, *inner = layer.weight.shape
        down = torch.randn(rank, *inner, generator=generator) * size
        up = torch.randn(out, rank, *(1 for _ in inner[1:]), generator=generator) * size
        layers[path] = LayerState("lora", rank, alpha, {"down": down, "up": up}, mixed and number % 5 == 0)
    return AdapterState(layers, metadata=Metadata(**metadata))


def theirs_whole(pipeline: Any, folder: Path) -> None:
    pipeline.load_lora_weights(str(folder))


def theirs_unet(pipeline: Any, folder: Path) -> None:
    """`unet.load_attn_procs`, or what its authors put in its place in 0.40, where it stopped reading LoRA."""
    if Version(diffusers.__version__) < Version("0.40"):
        pipeline.unet.load_attn_procs(str(folder))
    else:
        pipeline.unet.load_lora_adapter(str(folder), prefix="unet", weight_name=WEIGHTS_NAME)


@pytest.mark.parametrize(
    ("theirs", "only", "mixed"),
    [
        (theirs_whole, ".attn", False),
        (theirs_whole, "", False),
        (theirs_whole, "", True),
        (theirs_unet, ".attn", False),
        (theirs_unet, "unet.", True),
    ],
)
def test_unmodified_diffusers_draws_the_same_picture(
    theirs: Callable[[Any, Path], None], only: str, mixed: bool, pipe: Any, tmp_path: Path
) -> None:
    if theirs is theirs_unet and mixed and Version(diffusers.__version__) < Version("0.40"):
        pytest.skip("this diffusers' load_attn_procs does not read the header")
    write(adapter(pipe, only, mixed), tmp_path)
    base = draw(pipe)
    load_adapter(pipe, tmp_path)
    ours = draw(pipe)
    unload_adapters(pipe)
    other = fresh()
    theirs(other, tmp_path)
    assert psnr(ours, draw(other)) >= 50
    assert psnr(ours, base) < 40, "the adapter must change the picture, or this test shows nothing"


@pytest.mark.parametrize("dialect", ["diffusers", "attention-processors"])
def test_every_dialect_draws_the_same_picture(dialect: str, pipe: Any, tmp_path: Path) -> None:
    state = adapter(pipe, "attn")
    write(state, tmp_path, dialect)
    with Adapter.load(roots_of(pipe), state):
        direct = draw(pipe)
    load_adapter(pipe, tmp_path)
    assert torch.equal(draw(pipe), direct)
    unload_adapters(pipe)


def test_unloading_restores_bit_for_bit(pipe: Any, tmp_path: Path) -> None:
    before, picture = digest(pipe), draw(pipe)
    write(adapter(pipe), tmp_path / "a")
    write(adapter(pipe, ".attn", mixed=True), tmp_path / "b")
    load_adapter(pipe, tmp_path / "a")
    load_adapter(pipe, tmp_path / "b", 0.5)
    assert digest(pipe) != before and not torch.equal(draw(pipe), picture)
    assert unload_adapters(pipe) == 2
    assert digest(pipe) == before and torch.equal(draw(pipe), picture)
    assert unload_adapters(pipe) == 0


def test_strength_zero_is_the_base_and_strength_counts(pipe: Any, tmp_path: Path) -> None:
    base = draw(pipe)
    write(adapter(pipe), tmp_path)
    attached = load_adapter(pipe, tmp_path, 0)
    assert attached.strength == 0 and torch.equal(draw(pipe), base)
    attached.adapter.strength = 1.0
    full = draw(pipe)
    unload_adapters(pipe)
    load_adapter(pipe, tmp_path)
    assert torch.equal(draw(pipe), full) and not torch.equal(full, base)
    unload_adapters(pipe)


def test_the_report_is_one_line_and_is_printed(
    pipe: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(adapter(pipe, "attn"), tmp_path / "fox")
    attached = load_adapter(pipe, path)
    assert isinstance(attached, Attached) and attached.name == "fox" and attached.notes == ()
    assert attached.report == "applied 32/32 unet layers, 8/8 text_encoder layers, 0 unused tensors"
    assert capsys.readouterr().out == f"fox: {attached.report}\n"
    file = load(path)
    save(TensorFile(file.tensors), tmp_path / "old.safetensors")
    old = load_adapter(pipe, tmp_path / "old.safetensors", quiet=True)
    assert old.report.endswith("0 unused tensors (alpha absent: using alpha = rank)")
    assert capsys.readouterr().out == ""
    assert load_adapter(pipe, path, quiet=True).name == "fox-2"
    unload_adapters(pipe)


def test_several_at_once_or_none(pipe: Any, tmp_path: Path) -> None:
    before = digest(pipe)
    paths = [write(adapter(pipe, only), tmp_path / name) for name, only in [("a", "attn1"), ("b", "attn2")]]
    one, two = load_adapter(pipe, paths, [0.5, -1.0], quiet=True)
    assert (one.name, one.strength, two.name, two.strength) == ("a", 0.5, "b", -1.0)
    unload_adapters(pipe)
    with pytest.raises(AdapterError, match="2 adapters were given with 3 strengths"):
        load_adapter(pipe, paths, [1.0, 1.0, 1.0])
    with pytest.raises(
        AdapterError, match="already has an adapter"
    ):  # found only when the second one is put in
        load_adapter(pipe, paths * 2, 1.0, ["a", "b", "c", "a"])
    with pytest.raises(FormatError, match="There is no file"):
        load_adapter(pipe, [*paths, tmp_path / "missing"])
    assert digest(pipe) == before


def test_an_adapter_of_zeros_has_no_effect(pipe: Any, tmp_path: Path) -> None:
    before = digest(pipe)
    state = adapter(pipe, ".attn")
    write(adapter(pipe, ".attn", size=0.0), tmp_path / "zeros")
    write(
        replace(state, layers={path: replace(one, alpha=0.0) for path, one in state.layers.items()}),
        tmp_path / "alpha",
    )
    for name in ("zeros", "alpha"):
        with pytest.raises(NoEffect, match="zero in all 32 layers"):
            load_adapter(pipe, tmp_path / name)
    assert digest(pipe) == before
    first = next(iter(state.layers))
    state.layers[first].tensors["up"].zero_()
    write(state, tmp_path / "one")
    assert (
        load_adapter(pipe, tmp_path / "one", quiet=True)
        .notes[0]
        .startswith("1 of 32 layers have a change of zero")
    )
    unload_adapters(pipe)


def test_every_claimed_layer_changes(pipe: Any, tmp_path: Path) -> None:
    write(adapter(pipe, mixed=True), tmp_path)
    attached = load_adapter(pipe, tmp_path, quiet=True)
    layers = layers_of(roots_of(pipe))
    for path, delta in attached.adapter.deltas.items():
        assert delta.weight_delta(layers[path].weight).abs().max() > 0
    unload_adapters(pipe)


def test_another_base_of_the_same_family_is_said_and_not_refused(pipe: Any, tmp_path: Path) -> None:
    from scumble.models import FAMILIES

    base = FAMILIES.get("sd1").tiny(0)
    write(
        adapter(
            pipe, ".attn", base_name="mine", base_fingerprint=base.fingerprint(), prediction_type="epsilon"
        ),
        tmp_path,
    )
    assert load_adapter(pipe, tmp_path, quiet=True).notes == ()
    assert load_adapter(pipe, tmp_path, quiet=True).notes == (), "adapters must not change the fingerprint"
    unload_adapters(pipe)
    write(
        adapter(pipe, ".attn", base_name="far", base_fingerprint="f" * 64, prediction_type="v_prediction"),
        tmp_path,
    )
    notes = load_adapter(pipe, tmp_path, quiet=True).notes
    assert len(notes) == 2
    assert "predicts v_prediction; this pipeline's scheduler says epsilon" in notes[0]
    assert notes[1].startswith(
        "It was trained on far (weights ffffffffffff), and is loaded on this base, which has other weights ("
    )
    unload_adapters(pipe)


def test_weights_that_changed_since_are_another_base(tmp_path: Path) -> None:
    from scumble.models import FAMILIES

    pipeline = fresh()
    write(adapter(pipeline, ".attn", base_fingerprint=FAMILIES.get("sd1").tiny(0).fingerprint()), tmp_path)
    assert load_adapter(pipeline, tmp_path, quiet=True).notes == ()
    with torch.no_grad():
        pipeline.unet.conv_in.weight.add_(1)
    assert len(load_adapter(pipeline, tmp_path, quiet=True).notes) == 1


def test_another_family_is_refused(pipe: Any, tmp_path: Path) -> None:
    other = fresh("sd2")
    before = digest(other)
    write(adapter(pipe, ".attn"), tmp_path)
    with pytest.raises(
        WrongBase, match=r"^LoRA is for cross-attention 32; model is cross-attention \d+\. Not applied\.$"
    ):
        load_adapter(other, tmp_path, allow_partial=True)
    assert digest(other) == before


def test_a_pipeline_with_peft_adapters_is_refused(tmp_path: Path) -> None:
    pipeline = fresh()
    write(adapter(pipeline, "unet."), tmp_path)
    pipeline.load_lora_weights(str(tmp_path))
    with pytest.raises(AdapterError, match="unload_lora_weights"):
        load_adapter(pipeline, tmp_path)


def test_fused_attention_is_refused_because_nothing_would_happen(tmp_path: Path) -> None:
    pipeline = fresh()
    write(adapter(pipeline, "unet."), tmp_path)
    pipeline.fuse_qkv_projections(vae=False)
    before = digest(pipeline)
    with pytest.raises(AdapterError, match=r"fused.*unfuse_qkv_projections"):
        load_adapter(pipeline, tmp_path)
    assert digest(pipeline) == before
    pipeline.unfuse_qkv_projections(vae=False)
    load_adapter(pipeline, tmp_path, quiet=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_finite_numbers_whose_products_are_not_are_refused(tmp_path: Path, dtype: torch.dtype) -> None:
    pipeline = fresh()
    state = adapter(pipeline, "unet.")
    huge = {
        path: replace(layer, tensors={name: (t * 1e25).to(dtype) for name, t in layer.tensors.items()})
        for path, layer in state.layers.items()
    }
    write(replace(state, layers=huge), tmp_path / "huge.safetensors")
    large = {path: replace(layer, alpha=1e30) for path, layer in state.layers.items()}
    write(replace(state, layers=large), tmp_path / "large.safetensors")
    before = digest(pipeline)
    with pytest.raises(NotFinite, match=r"huge.safetensors can't be used.*diverged"):
        load_adapter(pipeline, tmp_path / "huge.safetensors")
    assert digest(pipeline) == before
    load_adapter(pipeline, tmp_path / "large.safetensors", quiet=True)  # large, and finite


def test_a_copy_of_a_unet_is_one_with_its_own_adapter(tmp_path: Path) -> None:
    pipeline = fresh()
    write(adapter(pipeline, "unet."), tmp_path)
    attached = load_adapter(pipeline, tmp_path, quiet=True)
    twin = copy.deepcopy(pipeline.unet)
    inputs = (torch.ones(1, 4, 8, 8), 300, torch.ones(1, 77, twin.config.cross_attention_dim))
    with torch.no_grad():
        drawn = twin(*inputs).sample
        assert torch.equal(drawn, pipeline.unet(*inputs).sample)
        attached.adapter.strength = 0.0
        assert torch.equal(drawn, twin(*inputs).sample)
        assert not torch.equal(drawn, pipeline.unet(*inputs).sample)


def test_what_is_no_pipeline_is_refused() -> None:
    with pytest.raises(AdapterError, match="no unet and no transformer"):
        roots_of(object())


def test_loading_and_unloading_leaves_nothing_behind(pipe: Any, tmp_path: Path) -> None:
    import gc
    import weakref

    write(adapter(pipe), tmp_path)
    gone = weakref.ref(load_adapter(pipe, tmp_path, quiet=True).adapter)
    unload_adapters(pipe)
    gc.collect()
    assert gone() is None
    assert not any(
        isinstance(module, Adapted) for root in roots_of(pipe).values() for module in root.modules()
    )


# Damage: every kind gives exactly one ScumbleError, and the model is the one from before.

Damage = Callable[[dict[str, torch.Tensor], str], None]


def rename(tensors: dict[str, torch.Tensor], name: str) -> None:
    tensors[name.replace("attn", "btn")] = tensors.pop(name)


def drop(tensors: dict[str, torch.Tensor], name: str) -> None:
    del tensors[name]


def transpose(tensors: dict[str, torch.Tensor], name: str) -> None:
    tensors[name] = tensors[name].T


def add_unknown(tensors: dict[str, torch.Tensor], name: str) -> None:
    tensors["unet.unknown.weight"] = torch.ones(3)


def add_layer(tensors: dict[str, torch.Tensor], name: str) -> None:
    tensors["unet.nowhere.lora_A.weight"], tensors["unet.nowhere.lora_B.weight"] = (
        torch.ones(1, 3),
        torch.ones(3, 1),
    )


def spoil(tensors: dict[str, torch.Tensor], name: str) -> None:
    tensors[name] = tensors[name].clone()
    tensors[name].view(-1)[0] = math.nan


def overflow(tensors: dict[str, torch.Tensor], name: str) -> None:
    tensors[name] = torch.full_like(tensors[name], math.inf)


def shrink(tensors: dict[str, torch.Tensor], name: str) -> None:
    tensors[name] = tensors[name][:1]


def to_integers(tensors: dict[str, torch.Tensor], name: str) -> None:
    tensors[name] = tensors[name].to(torch.int32)


@settings(max_examples=60, deadline=None)
@given(data=some.data())
def test_damaged_tensors_are_one_error_and_no_trace(
    data: some.DataObject, pipe: Any, tmp_path_factory: Any
) -> None:
    before = digest(pipe)
    sound = _file(pipe, data.draw(some.sampled_from(["diffusers", "kohya", "attention-processors"])))
    tensors = dict(sound.tensors)
    kind: Damage = data.draw(
        some.sampled_from(
            [rename, drop, transpose, add_unknown, add_layer, spoil, overflow, shrink, to_integers]
        )
    )
    # an alpha that is not there is no damage: files without it are sound
    kind(tensors, data.draw(some.sampled_from(sorted(n for n in tensors if not n.endswith(".alpha")))))
    header = dict(sound.metadata) if data.draw(some.booleans()) else {}
    file = TensorFile(tensors, header)
    path = tmp_path_factory.getbasetemp() / "damaged-tensors.safetensors"
    save(file, path)
    with pytest.raises(ScumbleError) as caught:
        load_adapter(pipe, path)
    assert len(str(caught.value).splitlines()) <= 15 and len(str(caught.value)) < 1500
    assert digest(pipe) == before


def _file(pipe: Any, dialect: str = "diffusers") -> TensorFile:
    return CODECS.get(dialect)().encode(adapter(pipe, ".attn"))


@settings(max_examples=40, deadline=None)
@given(data=some.data())
def test_damaged_files_are_one_error_and_no_trace(
    data: some.DataObject, pipe: Any, tmp_path_factory: Any
) -> None:
    before = digest(pipe)
    content = to_bytes(_file(pipe))
    how = data.draw(some.sampled_from(["truncate", "empty", "huge header", "noise", "pickle"]))
    canary = tmp_path_factory.getbasetemp() / "canary"
    if how == "truncate":
        content = content[: data.draw(some.integers(1, len(content) - 1))]
    elif how == "empty":
        content = b""
    elif how == "huge header":
        content = data.draw(some.integers(2**24, 2**63 - 1)).to_bytes(8, "little") + content[8:]
    elif how == "noise":
        content = data.draw(some.binary(max_size=200))
    else:
        content = pickle.dumps(_Payload(canary), data.draw(some.integers(0, 5)))
    suffix = data.draw(some.sampled_from([".safetensors", ".bin", ".pt", ".ckpt"]))
    path = tmp_path_factory.getbasetemp() / f"damaged-file{suffix}"
    path.write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(FormatError) as caught:
            load_adapter(pipe, path, allow_partial=True)
    assert len(str(caught.value)) < 1000
    assert digest(pipe) == before and not canary.exists()


class _Payload:
    """Unpickling it makes a file."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return (Path.touch, (self.canary,))


def test_partial_loads_are_asked_for_and_said(pipe: Any, tmp_path: Path) -> None:
    before = digest(pipe)
    tensors = dict(_file(pipe).tensors)
    add_layer(tensors, "")
    save(TensorFile(tensors), tmp_path / "a.safetensors")
    with pytest.raises(
        UnusedTensors,
        match=r"^2 of 66 tensors matched no layer\..*other 64: scumble generate --allow-partial, ",
    ):
        load_adapter(pipe, tmp_path)
    assert digest(pipe) == before
    attached = load_adapter(pipe, tmp_path, allow_partial=True, quiet=True)
    assert attached.report.startswith("applied 32/33 unet layers, 2 unused tensors")
    assert attached.notes == ("2 tensors were left out, first 'unet.nowhere.lora_A.weight'.",)
    unload_adapters(pipe)
    assert digest(pipe) == before
