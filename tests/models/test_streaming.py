"""Bases read tensor by tensor, and held in few bits: the same base, and never two copies of it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from scumble.errors import ModelError, UnknownName
from scumble.models import FAMILIES, load_base, loading, streaming
from scumble.models.codes import CODES
from scumble.models.quantized import Quantized, layers_held
from scumble.models.streaming import stream
from scumble.tensor_files.lazy_tensors import LazyTensors

pytestmark = pytest.mark.usefixtures("no_network")

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


def held(base: Any) -> dict[str, Quantized]:
    return {name: part for name, part in base.denoiser.named_modules() if isinstance(part, Quantized)}


def answers(base: Any) -> Tensor:
    from scumble.models.family import Frame

    generator = torch.Generator().manual_seed(0)
    side = base.resolution // base.latent_factor
    latents = torch.randn(2, base.latent_channels, side, side, generator=generator)
    said = base.encode_prompts(["a fox", "a hen"])
    frame = Frame.plain(2, base.resolution, base.resolution)
    with torch.no_grad():
        return base.denoise(latents, torch.tensor([100, 700]), said, frame)


def test_bf16_is_read_without_a_wide_copy(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The library's loader would have the whole denoiser in fp32 first."""
    whole, parts = loading._load_part, []

    def watched(cls: Any, folder: Path, *told: Any) -> Any:
        parts.append(folder.name)
        return whole(cls, folder, *told)

    monkeypatch.setattr(loading, "_load_part", watched)
    base = load_base(folders["sd1"], dtype=torch.bfloat16, device="cpu")
    assert sorted(parts) == ["text_encoder", "vae"]
    tiny = FAMILIES.get("sd1").tiny(3)
    assert base.fingerprint() == tiny.fingerprint()
    for (name, mine), theirs in zip(
        base.denoiser.named_parameters(), tiny.denoiser.parameters(), strict=True
    ):
        assert torch.equal(mine, theirs.to(torch.bfloat16)), name
    assert not base.denoiser.training and not any(p.requires_grad for p in base.denoiser.parameters())


def test_one_tensor_at_a_time_is_read(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    import weakref

    read = LazyTensors.__getitem__
    alive: list[weakref.ref[Tensor]] = []

    def watched(self: LazyTensors, name: str) -> Tensor:
        # the one before may wait in the reader's variable, none of those before that
        assert sum(each() is not None for each in alive) <= 1
        tensor = read(self, name)
        alive.append(weakref.ref(tensor))
        return tensor

    monkeypatch.setattr(LazyTensors, "__getitem__", watched)
    load_base(folders["sd1"], dtype=torch.bfloat16, device="cpu", quantization="int8")
    assert len(alive) > 50


@pytest.mark.parametrize("quantization", CODES)
@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_a_quantised_base_is_the_same_base(folders: dict[str, Path], family: str, quantization: str) -> None:
    plain = load_base(folders[family], device="cpu")
    base = load_base(folders[family], device="cpu", quantization=quantization)
    assert base.quantization == quantization and plain.quantization == "none"
    assert base.fingerprint() == plain.fingerprint()
    layers = held(base)
    assert layers.keys() == layers_held(plain.denoiser).keys() and layers
    assert all(layer.held_in == quantization for layer in layers.values())
    assert any(".to_q" in name for name in layers) and any(".conv1" in name for name in layers)
    outside = ("conv_in", "conv_out", "time_embedding", "add_embedding")
    assert not any(name.startswith(outside) for name in layers)
    assert any(f"held in {quantization}" in note for note in base.notes)
    # what it answers is near to what the plain base answers, and not the same
    mine, theirs = answers(base), answers(plain)
    apart = ((mine - theirs).norm() / theirs.norm()).item()
    assert 0 < apart < {"int8": 0.02, "fp8": 0.08, "nf4": 0.3}[quantization]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_streamed_and_rounded_afterwards_hold_the_same(
    folders: dict[str, Path], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    streamed = load_base(folders["sd1"], dtype=dtype, device="cpu", quantization="nf4")
    monkeypatch.setattr(loading, "stream", lambda *_, **__: None)
    afterwards = load_base(folders["sd1"], dtype=dtype, device="cpu", quantization="nf4")
    assert streamed.fingerprint() == afterwards.fingerprint()
    mine, theirs = streamed.denoiser.state_dict(), afterwards.denoiser.state_dict()
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_one_file_of_several(folders: dict[str, Path], tmp_path: Path) -> None:
    tensors = load_file(folders["sd1"] / WEIGHTS)
    names = sorted(tensors)
    halves = [tmp_path / "1.safetensors", tmp_path / "2.safetensors"]
    for path, some in zip(halves, (names[::2], names[1::2]), strict=True):
        save_file({name: tensors[name] for name in some}, path)
    from diffusers import UNet2DConditionModel

    config = UNet2DConditionModel.load_config(folders["sd1"] / "unet")
    found = stream(UNet2DConditionModel, config, halves, dtype=torch.float32, base="x")
    assert found is not None and found[1] == FAMILIES.get("sd1").tiny(3).fingerprint()
    assert stream(UNet2DConditionModel, config, halves[:1], dtype=torch.float32, base="x") is None


def test_what_is_missing_is_said_by_the_librarys_loader(folders: dict[str, Path], tmp_path: Path) -> None:
    base = Path(shutil.copytree(folders["sd1"], tmp_path / "base"))
    tensors = load_file(base / WEIGHTS)
    del tensors["conv_in.weight"]
    save_file(tensors, base / WEIGHTS)
    with pytest.raises(ModelError, match=r"1 tensors of unet are missing in its file, e\.g\. conv_in"):
        load_base(base, dtype=torch.bfloat16, device="cpu")


def test_an_unknown_quantization_is_refused_before_a_weight_is_read(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streaming, "LazyTensors", None)
    with pytest.raises(UnknownName, match=r"int4.*Did you mean.*int8"):
        load_base(folders["sd1"], device="cpu", quantization="int4")


def test_weights_that_are_no_numbers_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    base = Path(shutil.copytree(folders["sd1"], tmp_path / "base"))
    tensors = load_file(base / WEIGHTS)
    name = next(name for name in tensors if name.endswith("conv1.weight"))
    tensors[name][0, 0, 0, 0] = float("nan")
    save_file(tensors, base / WEIGHTS)
    with pytest.raises(ModelError, match="infinite or NaN"):
        load_base(base, device="cpu", quantization="int8")
