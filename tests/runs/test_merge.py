"""Merging on disk: what is written loads, predicts what base and adapter predict, and comes out again."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from scumble.adapters import Adapter, AdapterState, LoraSettings, TokenState
from scumble.adapters.factors import Keep, change_of
from scumble.adapters.mix import MixSettings
from scumble.adapters.state import LayerState
from scumble.errors import AdapterError, FormatError, ModelError, NoLayerMatches, UnusedTensors, WrongBase
from scumble.formats import read, write
from scumble.models import FAMILIES, tiny
from scumble.models.family import BaseModel, Frame
from scumble.models.loading import load_base
from scumble.models.tiny import tiny_tokenizer
from scumble.runs.base_files import open_base
from scumble.runs.extract import extract_from_base
from scumble.runs.merge import Source, merge_into_base
from scumble.runs.rework import RECORD
from tests.models import original
from tests.models import original_transformers as transformers


def trained(base: BaseModel, targets: list[str], seed: int, rank: int = 2) -> AdapterState:
    """An adapter with values as if trained; the base is left as it was."""
    adapter = Adapter.inject(base.roots, targets, LoraSettings(rank=rank), name=f"a{seed}")
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=rng))
    state = adapter.state()
    adapter.eject()
    return state


@torch.no_grad()
def predict(base: BaseModel) -> Tensor:
    """The denoiser's answer to fixed noise and words."""
    latents = torch.randn(1, base.latent_channels, 8, 8, generator=torch.Generator().manual_seed(5))
    words = base.encode_prompts(["a fox"])
    pixels = 8 * base.latent_factor
    return base.denoise(latents, torch.tensor([500]), words, Frame.plain(1, pixels, pixels))


@torch.no_grad()
def predict_with(base: BaseModel, *states: tuple[AdapterState, float]) -> Tensor:
    """The same with adapters attached."""
    adapters = [
        Adapter.load(base.roots, state, name=f"m{n}", strength=strength)
        for n, (state, strength) in enumerate(states)
    ]
    answer = predict(base)
    for adapter in adapters:
        adapter.eject()
    return answer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small SD 1 base as a folder."""
    return Path(tiny.save("sd1", tmp_path_factory.mktemp("bases") / "base"))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """Small SD 1 and SD 2 bases as single files."""
    place = tmp_path_factory.mktemp("checkpoints")
    tiny_tokenizer().save_pretrained(place / "tokenizer")
    return {
        linear: original.write(
            place / f"sd{1 + linear}.safetensors",
            linear,
            {"modelspec.prediction_type": "epsilon", "modelspec.hash_sha256": "stale", "format": "pt"},
        )
        for linear in (False, True)
    }


TARGETS = ["attention", "conv", "text_encoder.attention"]


def test_a_folder_with_adapters_in_it_predicts_as_base_and_adapters(folder: Path, tmp_path: Path) -> None:
    base = load_base(folder, device="cpu")
    one, two = trained(base, TARGETS, 0), trained(base, ["attention"], 1, rank=3)
    files = [write(one, tmp_path / "one.safetensors"), write(two, tmp_path / "two.safetensors")]
    told: list[tuple[int, int]] = []
    merged = merge_into_base(
        [Source(files[0], 0.8), Source(files[1], -0.5)],
        folder,
        tmp_path / "out",
        progress=lambda *n: told.append(n),
    )
    assert merged.path == tmp_path / "out" and merged.layers == len(one.layers) and merged.notes == ()
    assert told[-1] == (len(one.layers), len(one.layers))
    found = load_base(tmp_path / "out", device="cpu")
    expected = predict_with(base, (one, 0.8), (two, -0.5))
    assert (expected - predict(base)).norm() > 0.01 * expected.norm()
    torch.testing.assert_close(predict(found), expected, rtol=1e-4, atol=1e-5)


def test_everything_else_is_copied_bit_for_bit(folder: Path, tmp_path: Path) -> None:
    base = load_base(folder, device="cpu")
    state = trained(base, ["unet.*.attn1.to_q"], 0)
    merge_into_base([Source(write(state, tmp_path / "a.safetensors"))], folder, tmp_path / "out")
    before = {p.relative_to(folder): p for p in folder.rglob("*") if p.is_file()}
    after = {p.relative_to(tmp_path / "out"): p for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert before.keys() == after.keys()
    differing = [name for name, path in before.items() if path.read_bytes() != after[name].read_bytes()]
    assert [name.parent.name for name in differing] == ["unet"]
    old, new = load_file(before[differing[0]]), load_file(after[differing[0]])
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert {f"unet.{name.removesuffix('.weight')}" for name in changed} == set(state.layers)


def test_the_file_says_what_is_in_it(folder: Path, tmp_path: Path) -> None:
    base = load_base(folder, device="cpu")
    file = write(trained(base, ["attention"], 0), tmp_path / "a.safetensors")
    merge_into_base([Source(file, 0.5, {"unet.mid_block.*": 0.25})], folder, tmp_path / "one")
    merge_into_base([Source(file)], tmp_path / "one", tmp_path / "two")
    with safe_open(next((tmp_path / "two" / "unet").glob("*.safetensors")), "pt") as found:
        metadata = found.metadata()
    assert metadata["format"] == "pt"
    first, second = json.loads(metadata[RECORD])
    assert first["work"] == "merge" and first["method"] == "concat" and first["into"] == str(folder)
    assert first["of"][0]["file"] == "a.safetensors" and len(first["of"][0]["sha256"]) == 64
    assert first["of"][0]["strength"] == 0.5 and first["of"][0]["blocks"] == {"unet.mid_block.*": 0.25}
    assert second["of"][0]["strength"] == 1.0


@pytest.mark.parametrize("linear", [False, True], ids=["sd1", "sd2"])
def test_a_single_checkpoint(checkpoints: dict[bool, Path], tmp_path: Path, linear: bool) -> None:
    source = checkpoints[linear]
    words = source.parent / "tokenizer"
    base = load_base(source, device="cpu", tokenizer=words)
    state = trained(base, TARGETS, 0)
    file = write(state, tmp_path / "a.safetensors")
    merged = merge_into_base([Source(file, 0.9)], source, tmp_path / "out.safetensors")
    assert merged.layers == len(state.layers)
    found = load_base(tmp_path / "out.safetensors", device="cpu", tokenizer=words)
    torch.testing.assert_close(predict(found), predict_with(base, (state, 0.9)), rtol=1e-4, atol=1e-5)
    old, new = load_file(source), load_file(tmp_path / "out.safetensors")
    assert old.keys() == new.keys()
    assert all(
        torch.equal(old[n], new[n]) for n in old if n.startswith(("first_stage", "alphas")) or "bias" in n
    )
    with safe_open(tmp_path / "out.safetensors", "pt") as opened:
        assert "modelspec.hash_sha256" not in opened.metadata()
        assert opened.metadata()["modelspec.prediction_type"] == "epsilon"
    # and out of it again, from file to file
    lora = extract_from_base(tmp_path / "out.safetensors", source, Keep(rank=2)).lora
    assert _error(lora.state, state, 0.9) < 1e-3


def _error(found: AdapterState, expected: AdapterState, strength: float) -> float:
    """Largest relative distance of a layer's change; the layers must be the same."""
    from scumble.formats.keymap import LayerNames

    names = LayerNames(expected.layers.keys())
    mine = {names.resolve(path): layer for path, layer in found.layers.items()}
    assert mine.keys() == expected.layers.keys()
    errors = []
    for path, layer in expected.layers.items():
        wanted = strength * change_of(path, layer).double()
        errors.append(float((change_of(path, mine[path]).double() - wanted).norm() / wanted.norm()))
    return max(errors)


def test_what_was_merged_is_extracted(folder: Path, tmp_path: Path) -> None:
    base = load_base(folder, device="cpu")
    state = trained(base, TARGETS, 0)
    file = write(state, tmp_path / "a.safetensors")
    merge_into_base([Source(file)], folder, tmp_path / "tuned")
    found = extract_from_base(tmp_path / "tuned", folder, Keep(rank=2))
    assert _error(found.lora.state, state, 1.0) < 1e-3 and found.notes == ()
    said = found.lora.state.metadata
    assert said.base_family == "sd1" and said.base_fingerprint == base.fingerprint()
    again = load_base(folder, device="cpu")
    back = write(found.lora.state, tmp_path / "back.safetensors")
    merge_into_base([Source(back)], folder, tmp_path / "again")
    torch.testing.assert_close(
        predict(load_base(tmp_path / "again", device="cpu")),
        predict_with(again, (state, 1.0)),
        rtol=1e-3,
        atol=1e-4,
    )


def test_what_a_lora_cannot_hold_is_named(folder: Path, tmp_path: Path) -> None:
    base = load_base(folder, device="cpu")
    file = write(trained(base, ["attention"], 0), tmp_path / "a.safetensors")
    merge_into_base([Source(file)], folder, tmp_path / "tuned")
    weights = next((tmp_path / "tuned" / "unet").glob("*.safetensors"))
    tensors = load_file(weights)
    tensors["conv_in.bias"] += 1
    save_file(tensors, weights, {"format": "pt"})
    found = extract_from_base(tmp_path / "tuned", folder, Keep(rank=2))
    assert (
        "1 biases, norms or embeddings differ too" in found.notes[0] and "unet.conv_in.bias" in found.notes[0]
    )


def test_half_precision_stays_and_is_rounded_once(folder: Path, tmp_path: Path) -> None:
    base = load_base(folder, device="cpu")
    state = trained(base, ["attention"], 0)
    weights = next((folder / "unet").glob("*.safetensors"))
    half = tmp_path / "half"
    merge_into_base([Source(write(state, tmp_path / "a.safetensors"), 1e-30)], folder, half)
    tensors = {name: tensor.half() for name, tensor in load_file(weights).items()}
    save_file(tensors, half / "unet" / weights.name, {"format": "pt"})
    merge_into_base([Source(tmp_path / "a.safetensors")], half, tmp_path / "out")
    new = load_file(tmp_path / "out" / "unet" / weights.name)
    for path, layer in state.layers.items():
        name = path.removeprefix("unet.") + ".weight"
        whole = tensors[name].float() + change_of(path, layer).view(tensors[name].shape)
        assert new[name].dtype == torch.float16
        torch.testing.assert_close(new[name], whole.half(), rtol=1e-3, atol=1e-6)


def test_other_ways_to_mix_are_merged_without_a_cut(folder: Path, tmp_path: Path) -> None:
    base = load_base(folder, device="cpu")
    states = [trained(base, ["unet.*.attn1.to_q"], n) for n in (0, 1)]
    files = [write(state, tmp_path / f"{n}.safetensors") for n, state in enumerate(states)]
    settings = MixSettings(method="dare", density=1.0)
    merge_into_base([Source(f) for f in files], folder, tmp_path / "out", settings=settings)
    expected = predict_with(base, *((state, 1.0) for state in states))
    torch.testing.assert_close(
        predict(load_base(tmp_path / "out", device="cpu")), expected, rtol=1e-4, atol=1e-5
    )
    cut = MixSettings(method="svd", rank=1)
    merge_into_base([Source(f) for f in files], folder, tmp_path / "cut", settings=cut)
    found = extract_from_base(tmp_path / "cut", folder, Keep(energy=1 - 1e-6))
    assert {layer.rank for layer in found.lora.state.layers.values()} == {1}


def test_what_can_not_be_merged_is_said_before_anything_is_written(
    folder: Path, checkpoints: dict[bool, Path], tmp_path: Path
) -> None:
    base = load_base(folder, device="cpu")
    state = trained(base, ["attention"], 0)
    file = write(state, tmp_path / "a.safetensors")
    out = tmp_path / "out"
    stranger = {"unet.nowhere": next(iter(state.layers.values()))}
    odd = write(AdapterState({**state.layers, **stranger}), tmp_path / "odd.safetensors")
    norm = {"unet.conv_norm_out": LayerState("full", 1, 1.0, {"diff": torch.ones(32)})}
    whole = write(AdapterState({**state.layers, **norm}), tmp_path / "norm.safetensors", "lycoris")
    cases: list[tuple[type[Exception], str, list[Source], object, Path]] = [
        (UnusedTensors, "unet.nowhere.*Not applied.$", [Source(odd)], folder, out),
        (AdapterError, "changed in its normalisation, which can't be", [Source(whole)], folder, out),
        (WrongBase, "Not applied", [Source(file)], checkpoints[True], tmp_path / "o.safetensors"),
        (AdapterError, "Every strength is 0", [Source(file, 0.0)], folder, out),
        (AdapterError, "infinite or NaN", [Source(file, 1e45)], folder, out),
        (NoLayerMatches, "unet.no", [Source(file, 1.0, {"unet.no.*": 1.0})], folder, out),
        (FormatError, "named like a file", [Source(file)], folder, tmp_path / "o.safetensors"),
        (FormatError, "name .*out.safetensors", [Source(file)], checkpoints[False], out),
        (FormatError, "inside each other", [Source(file)], folder, folder / "merged"),
        (FormatError, "exists", [Source(file)], folder, file.parent),
        (ModelError, "no file or folder", [Source(file)], tmp_path / "no" / "where", out),
        (FormatError, "no adapter", [Source(tmp_path / "missing.safetensors")], folder, out),
    ]
    for kind, said, sources, into, target in cases:
        with pytest.raises(kind, match=said):
            merge_into_base(sources, str(into), target)
        assert sorted(p.name for p in tmp_path.iterdir()) == [
            *("a.safetensors", "norm.safetensors", "odd.safetensors")
        ], said


def test_learned_tokens_are_refused_by_name(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = load_base(folder, device="cpu")
    file = write(trained(base, ["attention"], 0), tmp_path / "a.safetensors")
    from scumble.runs import merge as module

    real = module.ingredient

    def with_tokens(*given: object) -> object:
        found = real(*given)  # type: ignore[arg-type]
        tokens = {"<fox>": TokenState({"text_encoder": torch.ones(1, 4)})}
        return replace(found, file=replace(found.file, state=replace(found.file.state, tokens=tokens)))

    monkeypatch.setattr(module, "ingredient", with_tokens)
    with pytest.raises(AdapterError, match="learned tokens \\(<fox>\\)"):
        merge_into_base([Source(file)], folder, tmp_path / "out")


def test_overwriting_takes_a_word_and_a_base(folder: Path, tmp_path: Path) -> None:
    base = load_base(folder, device="cpu")
    file = write(trained(base, ["attention"], 0), tmp_path / "a.safetensors")
    out = tmp_path / "out"
    merge_into_base([Source(file)], folder, out)
    (out / "left.txt").write_text("from before")
    with pytest.raises(FormatError, match="--overwrite"):
        merge_into_base([Source(file)], folder, out)
    merge_into_base([Source(file)], folder, out, overwrite=True)
    assert not (out / "left.txt").exists() and (out / "model_index.json").is_file()
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("x")
    with pytest.raises(FormatError, match="it is not overwritten"):
        merge_into_base([Source(file)], folder, precious, overwrite=True)
    assert (precious / "thesis.txt").read_text() == "x"


def test_weights_from_before_the_merge_are_not_carried_along(folder: Path, tmp_path: Path) -> None:
    base = load_base(folder, device="cpu")
    file = write(trained(base, ["attention"], 0), tmp_path / "a.safetensors")
    merge_into_base([Source(file)], folder, tmp_path / "base")
    for root in ("unet", "text_encoder", "vae"):
        weights = next((tmp_path / "base" / root).glob("*.safetensors"))
        weights.with_name(f"{weights.stem}.fp16.safetensors").write_bytes(weights.read_bytes())
    variant = next((tmp_path / "base" / "unet").glob("*.fp16.safetensors"))
    (tmp_path / "base" / "whole.safetensors").write_bytes(variant.read_bytes())
    merged = merge_into_base([Source(file)], tmp_path / "base", tmp_path / "out")
    assert (
        "Left out" in merged.notes[0]
        and variant.name in merged.notes[0]
        and "whole.safetensors" in merged.notes[0]
    )
    assert not (tmp_path / "out" / "unet" / variant.name).exists()
    assert (tmp_path / "out" / "vae").is_dir()
    # the variant can be merged instead
    merge_into_base([Source(file)], tmp_path / "base", tmp_path / "fp16", variant="fp16")
    assert [p.name for p in (tmp_path / "fp16" / "unet").glob("*.safetensors")] == [variant.name]


def test_the_embedded_base_and_its_fingerprint() -> None:
    files = open_base("picturebook")
    base = load_base("picturebook", device="cpu")
    assert files.fingerprint == base.fingerprint()
    assert FAMILIES.get("sd1").name == "sd1"
    from scumble.adapters import layers_of
    from scumble.formats.keymap import LayerNames

    names = LayerNames(files.spots.keys())
    for path, layer in layers_of(base.roots).items():
        spelled = names.resolve(path)
        assert spelled is not None, path
        assert torch.equal(files[spelled].float(), layer.weight.float())


def test_a_base_in_8_bits_is_merged_and_stays_in_8_bits(folder: Path, tmp_path: Path) -> None:
    base = load_base(folder, device="cpu")
    state = trained(base, ["unet.*.attn1.to_q"], 0)
    file = write(state, tmp_path / "a.safetensors")
    merge_into_base([Source(file, 1e-30)], folder, tmp_path / "narrow")
    weights = next((tmp_path / "narrow" / "unet").glob("*.safetensors"))
    tensors = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in load_file(weights).items()}
    save_file(tensors, weights, {"format": "pt"})
    merge_into_base([Source(file)], tmp_path / "narrow", tmp_path / "out")
    new = load_file(tmp_path / "out" / "unet" / weights.name)
    for path, layer in state.layers.items():
        name = path.removeprefix("unet.") + ".weight"
        whole = tensors[name].float() + change_of(path, layer)
        assert torch.equal(new[name].float(), whole.to(torch.float8_e4m3fn).float())


# -- single files of transformers ------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["sd3", "flux"])
def transformer_file(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole single file in the folder of the base that it was made of."""
    place, family = tmp_path_factory.mktemp("files"), request.param
    parts = {"sd3": transformers.sd3_parts, "flux": transformers.flux_parts}[family](2)
    base = FAMILIES.get(family).load(parts, dtype=torch.float32, device=torch.device("cpu"))
    base.pipeline().save_pretrained(place / "base")
    tensors = {"sd3": transformers.sd3_tensors, "flux": transformers.flux_tensors}[family](parts)
    return transformers.write(place / "base" / f"{family}.safetensors", tensors)


@torch.no_grad()
def flowing(base: BaseModel) -> Tensor:
    """The denoiser's answer to fixed noise and words, of a base that flows."""
    latents = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(5))
    said = base.encode_prompts(["a fox"])
    return base.denoise(latents, torch.tensor([0.5]), said, Frame.plain(1, 16, 16))


def check_merged(transformer_file: Path, out: Path, targets: list[str], dialect: str) -> None:
    base = load_base(transformer_file, device="cpu")
    state = trained(base, targets, 3)
    file = write(state, out.with_name(f"{dialect}.safetensors"), dialect)
    adapter = Adapter.load(base.roots, state, name="m")
    expected = flowing(base)
    adapter.eject()
    merged = merge_into_base([Source(file)], transformer_file, out)
    assert merged.layers == len(state.layers) and merged.notes == ()
    found = load_base(out, device="cpu", rest=transformer_file.parent)
    assert (expected - flowing(base)).norm() > 0.01 * expected.norm()
    torch.testing.assert_close(flowing(found), expected, rtol=1e-4, atol=1e-4)
    before, after = load_file(transformer_file), load_file(out)
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    files = open_base(transformer_file)
    assert changed == {files.spots[path].name for path in read(file, files.shapes).state.layers}


def test_a_transformer_s_file_with_an_adapter_in_it(transformer_file: Path, tmp_path: Path) -> None:
    """Layers that the file joins, and one whose halves it holds the other way round."""
    targets = [
        "attention+mlp",
        "text_encoder.attention",
        "transformer.norm_out.linear",
        "transformer.proj_out",
    ]
    check_merged(transformer_file, tmp_path / transformer_file.name, targets, "diffusers")


def test_kohya_s_names_fit_a_flux_file(tmp_path: Path) -> None:
    parts = transformers.flux_parts(2)
    base = FAMILIES.get("flux").load(parts, dtype=torch.float32, device=torch.device("cpu"))
    base.pipeline().save_pretrained(tmp_path / "base")
    file = transformers.write(tmp_path / "base" / "flux.safetensors", transformers.flux_tensors(parts))
    check_merged(file, tmp_path / "out.safetensors", ["attention+mlp"], "kohya-flux")


def test_a_transformer_alone_is_merged_into_without_its_rest(transformer_file: Path, tmp_path: Path) -> None:
    base = load_base(transformer_file, device="cpu")
    state = trained(base, ["attention"], 4)
    whole = load_file(transformer_file)
    prefix = "model.diffusion_model."
    alone = {key.removeprefix(prefix): t for key, t in whole.items() if key.startswith(prefix)}
    bare = transformers.write(tmp_path / "bare.safetensors", alone)
    file = write(state, tmp_path / "adapter.safetensors")
    merge_into_base([Source(file)], bare, tmp_path / "bare-merged.safetensors")
    merge_into_base([Source(file)], transformer_file, tmp_path / "whole-merged.safetensors")
    one, other = (
        load_file(tmp_path / "bare-merged.safetensors"),
        load_file(tmp_path / "whole-merged.safetensors"),
    )
    assert all(torch.equal(tensor, other[prefix + name]) for name, tensor in one.items())
    words = trained(base, ["text_encoder.attention"], 5)
    file = write(words, tmp_path / "words.safetensors")
    with pytest.raises((FormatError, UnusedTensors, NoLayerMatches)):
        merge_into_base([Source(file)], bare, tmp_path / "never.safetensors")
    assert not (tmp_path / "never.safetensors").exists()
