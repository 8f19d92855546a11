"""Stable Diffusion XL: what it has beyond the laws: two text encoders, a pooled embedding, the picture's geometry."""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional

from scumble.adapters import FAMILIES as ADAPTERS
from scumble.adapters import Adapter, AdapterState, LayerState, LoraSettings, TokenState, layers_of
from scumble.adapters.state import Metadata
from scumble.adapters.targets import resolve
from scumble.adapters.tokens import TokenRows
from scumble.data.loader import Loader
from scumble.data.settings import DataSettings
from scumble.data.sources import open_dataset
from scumble.errors import FormatError, ModelError, NoLayerMatches
from scumble.formats import read, write
from scumble.inference.attach import load_adapter, unload_adapters
from scumble.inference.request import Request
from scumble.inference.session import Session
from scumble.models import FAMILIES, Frame, describe_base, load_base
from scumble.models.checkpoint_names import layer_marks
from scumble.models.family import BaseModel, Components
from scumble.models.loading import load_tokenizers
from scumble.models.sdxl import SDXL, SDXLBase
from scumble.models.tiny import save, tiny_tokenizer
from scumble.runs.base_files import open_base
from scumble.runs.merge import Source, merge_into_base
from scumble.training.objective import ObjectiveSettings, denoising_loss
from tests.models import original

pytestmark = pytest.mark.usefixtures("no_network")

ROOT = Path(__file__).parents[2]


def tiny(seed: int = 0) -> SDXLBase:
    base = FAMILIES.get("sdxl").tiny(seed)
    assert isinstance(base, SDXLBase)
    return base


@pytest.fixture(scope="module")
def base() -> SDXLBase:
    """Left by every test as it was."""
    return tiny(1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy base as a diffusers folder. Don't write into it."""
    return save("sdxl", tmp_path_factory.mktemp("xl") / "base", seed=3)


def word(vectors: int = 2) -> dict[str, TokenState]:
    rng = torch.Generator().manual_seed(5)
    rows = {"text_encoder": 32, "text_encoder_2": 48}
    return {
        "<fox>": TokenState({root: torch.randn(vectors, size, generator=rng) for root, size in rows.items()})
    }


# -- what it is told ----------------------------------------------------------------------------------------------


def test_the_pooled_embedding_stays_at_the_end_of_the_text(base: SDXLBase, tmp_path: Path) -> None:
    prompts = ["a <fox> there", "no new word"]
    encoder = base.text_encoders["text_encoder_2"]
    bare = base.encode_prompts(prompts).pooled
    assert bare is not None and encoder.text_model.eos_token_id == 2, "as published configs have it"
    path = write(AdapterState({}, word()), tmp_path / "fox.safetensors")
    pipeline: Any = base.pipeline()
    with TokenRows("words", base.roots, base.vocabularies, word()).attach():
        ids, _ = base.readings["text_encoder_2"].ids(prompts)
        end = (ids == base.readings["text_encoder_2"].tokenizer.eos_token_id).int().argmax(1)
        assert ids[0].argmax() != end[0], "a new word's id is the largest"
        with torch.no_grad():
            said = base.encode_prompts(prompts)
            hidden = encoder.text_model(ids).last_hidden_state[torch.arange(2), end]
            assert torch.equal(said.pooled, encoder.text_projection(hidden))  # type: ignore[arg-type]
        assert torch.equal(said.pooled[1], bare[1]) and not torch.equal(said.pooled[0], bare[0])  # type: ignore[index]
    assert encoder.text_model.eos_token_id == 2
    # in somebody's pipeline too, from a file
    load_adapter(pipeline, path, quiet=True)
    tokens, _, pooled, _ = pipeline.encode_prompt(prompts, device="cpu", do_classifier_free_guidance=False)
    assert torch.equal(pooled, said.pooled) and torch.equal(tokens, said.tokens)
    unload_adapters(pipeline)
    assert torch.equal(base.encode_prompts(prompts).pooled, bare)  # type: ignore[arg-type]


def test_words_are_written_as_clip_l_and_clip_g(base: SDXLBase, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    state = AdapterState({}, word())
    path = write(state, tmp_path / "fox.safetensors", "embedding")
    tensors = load_file(path)
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        "clip_l": (2, 32),
        "clip_g": (2, 48),
    }
    assert read(path, layers_of(base.roots)).state.tokens.keys() == {"<fox>"}


def test_the_unet_is_told_the_geometry_as_the_pipeline_tells_it(base: SDXLBase) -> None:
    pipeline: Any = base.pipeline()
    frame = Frame(*(torch.tensor(pair) for pair in ([[1023, 768]], [[3, 17]], [[16, 24]])))
    said = base.encode_prompts(["a fox"])
    told = base.told_besides(said, frame)
    ids = pipeline._get_add_time_ids((1023, 768), (3, 17), (16, 24), torch.float32, 24)
    assert torch.equal(told["time_ids"], ids) and torch.equal(told["text_embeds"], said.pooled)  # type: ignore[arg-type]
    latents, t = torch.randn(1, 4, 8, 8), torch.tensor([500])
    with torch.no_grad():
        here = base.denoise(latents, t, said, frame)
        for other in (replace(frame, **{name: getattr(frame, name) + 1}) for name in vars(frame)):
            assert not torch.equal(base.denoise(latents, t, said, other), here)


def test_a_rounded_base_is_told_the_geometry_unrounded() -> None:
    base = tiny()
    base.unet.to(torch.bfloat16)
    base.dtype = torch.bfloat16
    told = base.told_besides(base.encode_prompts(["a"]), Frame.plain(1, 1023, 1021))
    assert told["time_ids"].tolist() == [[1023, 1021, 0, 0, 1023, 1021]]


def pictures(place: Path, sizes: list[tuple[int, int]]) -> Path:
    """Noise of these (width, height), captioned by its number; every pixel's red tells its column."""
    place.mkdir()
    for number, (width, height) in enumerate(sizes):
        pixels = np.zeros((height, width, 3), np.uint8)
        pixels[..., 0] = np.linspace(0, 255, width).astype(np.uint8)[None]
        pixels[..., 1] = np.linspace(0, 255, height).astype(np.uint8)[:, None]
        Image.fromarray(pixels).save(place / f"{number}.png")
        (place / f"{number}.txt").write_text(f"picture {number}")
    return place


@pytest.mark.parametrize("buckets", [False, True])
def test_geometry_and_pooled_text_reach_the_loss_from_the_files(
    base: SDXLBase, tmp_path: Path, buckets: bool
) -> None:
    """Original size, crop and target through resize, crop, flip and bucket: against diffusers' script's own way."""
    sizes = [(40, 20), (24, 48), (32, 32)]
    place = pictures(tmp_path / "pictures", sizes)
    settings = DataSettings(
        images=str(place), resolution=16, center_crop=False, random_flip=True, buckets=buckets
    )
    loader = Loader(open_dataset(settings, seed=0), base, settings, batch_size=1, seed=2)
    loader.prepare()
    corners, flips = set(), set()
    for batch in islice(loader.start(0), 24):
        number = int(batch.captions[0].split()[1])
        width, height = sizes[number]
        (top, left), (high, wide) = batch.frame.corner[0].tolist(), batch.frame.target[0].tolist()
        assert batch.frame.original[0].tolist() == [height, width]
        assert (high, wide) == (16, 16) or buckets
        assert batch.latents.shape[2:] == (high // 2, wide // 2)
        # the script: resize, then mirror, then cut the corner that is told
        scale = max(high / height, wide / width)
        resized = max(wide, round(width * scale)), max(high, round(height * scale))
        with Image.open(place / batch.keys[0]) as picture:
            plain = picture.convert("RGB").resize(resized, Image.Resampling.LANCZOS)
        cuts = []
        for image in (plain, plain.transpose(Image.Transpose.FLIP_LEFT_RIGHT)):
            image = image.crop((left, top, left + wide, top + high))
            pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1
            cuts.append(base.encode_images(pixels[None], None))
        found = [bool(torch.allclose(batch.latents, cut, atol=1e-4)) for cut in cuts]
        assert sum(found) == 1, (number, top, left)
        flips.add(found[1])
        corners.add((number, top, left))
        assert batch.conditioning is not None and batch.conditioning.pooled is not None
        alone = base.encode_prompts(batch.captions)
        assert torch.equal(batch.conditioning.pooled, alone.pooled)  # type: ignore[arg-type]
    assert flips == {False, True} and (len(corners) > 4 or buckets)
    again = Loader(
        open_dataset(settings, seed=0), base, settings, batch_size=1, seed=2, cache=loader.cache
    ).batch(0)
    assert again.conditioning is not None and again.conditioning.pooled is not None


@pytest.mark.parametrize("gamma", [None, 5.0])
def test_the_loss_is_that_of_diffusers_script(base: SDXLBase, gamma: float | None) -> None:
    from diffusers import DDPMScheduler
    from diffusers.training_utils import compute_snr

    from tests.training.world import LatentBatches

    frame = Frame(
        original=torch.tensor([[40, 20], [1023, 999]]),
        corner=torch.tensor([[0, 5], [7, 0]]),
        target=torch.tensor([[16, 16], [16, 16]]),
    )
    batch = replace(LatentBatches(base, samples=4).batch([0, 1]), frame=frame)
    rng = torch.Generator().manual_seed(0)
    noise = torch.randn(batch.latents.shape, generator=rng)
    t = torch.tensor([17, 801])
    with torch.no_grad():
        ours = denoising_loss(base, batch, noise, t, ObjectiveSettings(snr_gamma=gamma))
        schedule = DDPMScheduler.from_config(base.scheduler.config)
        embeds, _, pooled, _ = base.pipeline().encode_prompt(
            list(batch.captions), device="cpu", do_classifier_free_guidance=False
        )
        sizes = zip(frame.original.tolist(), frame.corner.tolist(), frame.target.tolist(), strict=True)
        ids = torch.tensor([[*original, *corner, *target] for original, corner, target in sizes])
        answer = base.unet(
            schedule.add_noise(batch.latents, noise, t),
            t,
            embeds,
            added_cond_kwargs={"text_embeds": pooled, "time_ids": ids},
        ).sample
    theirs = functional.mse_loss(answer, noise, reduction="none").mean((1, 2, 3))
    if gamma is not None:
        snr = compute_snr(schedule, t)
        theirs = theirs * torch.stack([snr, gamma * torch.ones_like(snr)], dim=1).min(dim=1)[0] / snr
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("negative", ["", "dull"])
@pytest.mark.parametrize("zeros", [True, False])
def test_a_session_draws_what_the_pipeline_draws(negative: str, zeros: bool) -> None:
    """Without a negative prompt guidance starts from zeros, where the base says so; with one, from what it says."""
    from diffusers import DPMSolverMultistepScheduler

    base = tiny()
    base.zeros_for_empty = zeros
    request = Request(prompt="a fox", negative=negative, steps=2, guidance=6.0, seed=3, width=24, height=16)
    with Session(base) as session:
        ours = session.generate(request)[0].image
    pipeline: Any = base.pipeline()
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    asked = {"num_inference_steps": 2, "guidance_scale": 6.0, "width": 24, "height": 16}
    theirs = pipeline(
        "a fox",
        negative_prompt=negative or None,
        generator=torch.Generator().manual_seed(3),
        output_type="np",
        **asked,
    ).images[0]
    difference = np.asarray(ours).astype(float) - theirs * 255
    assert np.abs(difference).max() <= 0.51
    unconditional = base.unconditional(2)
    assert unconditional.pooled is not None and unconditional.pooled.shape == (2, 24)
    assert bool((unconditional.tokens == 0).all()) == zeros == bool((unconditional.pooled == 0).all())


# -- what trains ----------------------------------------------------------------------------------------------------


def test_a_layer_that_nothing_reads_is_not_a_target(base: SDXLBase, tmp_path: Path) -> None:
    found = resolve(base.roots, ["text_encoder.attention", "text_encoder_2.attention"])
    assert found.counts == {"text_encoder.attention": 4, "text_encoder_2.attention": 8}
    with pytest.raises(NoLayerMatches):
        resolve(base.roots, "text_encoder.encoder.layers.1.*")
    # other tools put something there; it is read, applied and gone again
    path = "text_encoder.encoder.layers.1.self_attn.q_proj"
    tensors = {"down": torch.ones(1, 32), "up": torch.ones(32, 1)}
    file = write(AdapterState({path: LayerState("lora", 1, 1.0, tensors)}), tmp_path / "other.safetensors")
    with Adapter.load(base.roots, read(file, layers_of(base.roots)).state) as adapter:
        assert list(adapter.deltas) == [path]


@pytest.mark.parametrize("dialect", ["diffusers", "kohya", "peft"])
def test_every_dialect_carries_the_whole_family(base: SDXLBase, dialect: str, tmp_path: Path) -> None:
    targets = ("attention", "text_encoder.attention+mlp", "text_encoder_2.all-linear")
    with Adapter.inject(base.roots, targets, LoraSettings(rank=2)) as adapter:
        with torch.no_grad():
            for number, parameter in enumerate(adapter.parameters()):
                parameter.normal_(generator=torch.Generator().manual_seed(number))
        state = adapter.state(Metadata(base_family="sdxl"))
    path = write(state, tmp_path / "x.safetensors", dialect)
    found = read(path, layers_of(base.roots))
    assert not found.unused and found.state.layers.keys() == state.layers.keys()
    for name, layer in state.layers.items():
        other = found.state.layers[name]
        torch.testing.assert_close(
            other.scale * other.tensors["up"] @ other.tensors["down"],
            layer.scale * layer.tensors["up"] @ layer.tensors["down"],
        )
    if dialect == "kohya":
        from safetensors.torch import load_file

        names = {name.partition(".")[0] for name in load_file(path)}
        assert "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q" in names
        assert any(name.startswith("lora_te1_") for name in names)
        assert any(name.startswith("lora_te2_") for name in names)


@pytest.fixture(scope="module")
def others() -> tuple[BaseModel, ...]:
    return tuple(FAMILIES.get(name).tiny(0) for name in ("sd1", "sd2"))


@pytest.mark.parametrize("family", list(ADAPTERS))
def test_wrong_pairs_are_refused_before_a_weight_is_touched(
    base: SDXLBase, others: tuple[BaseModel, ...], family: str, tmp_path: Path
) -> None:
    settings = ADAPTERS.get(family).settings()
    for source, target in [pair for far in others for pair in ((far, base), (base, far))]:
        with Adapter.inject(source.roots, "attention", settings) as adapter:
            with torch.no_grad():
                for parameter in adapter.parameters():
                    parameter.add_(0.1)
            state = adapter.state(
                Metadata(base_name="somewhere", base_family=source.family, prediction_type="epsilon")
            )
        path = write(state, tmp_path / f"{source.family}.safetensors")
        modules = {name: id(m) for root in target.roots.values() for name, m in root.named_modules()}
        with pytest.raises(FormatError) as caught:
            load_adapter(target.pipeline(), path, quiet=True)
        assert "\n" not in str(caught.value)
        with pytest.raises(FormatError):
            Session(target, [path])
        assert modules == {name: id(m) for root in target.roots.values() for name, m in root.named_modules()}


# -- loading --------------------------------------------------------------------------------------------------------


def test_a_folder_comes_back(folder: Path) -> None:
    base, made = load_base(folder, device="cpu"), tiny(3)
    assert isinstance(base, SDXLBase) and base.fingerprint() == made.fingerprint() and base.notes == ()
    prompts = ["a fox", "", "the fox and " * 40]
    ours, theirs = base.encode_prompts(prompts), made.encode_prompts(prompts)
    assert torch.equal(ours.tokens, theirs.tokens) and torch.equal(ours.pooled, theirs.pooled)  # type: ignore[arg-type]
    facts = describe_base(folder)
    assert (facts.family, facts.title, facts.prediction) == ("sdxl", "Stable Diffusion XL", "epsilon")
    assert (facts.resolution, facts.cross_attention_dim, facts.problems) == (16, 80, ())
    assert len(load_tokenizers(folder)) == 2
    assert len(base.truncated(prompts)) == 1, "what both lose is told once"


def test_zeros_for_an_empty_prompt_are_the_bases_own_word(folder: Path, tmp_path: Path) -> None:
    import shutil

    assert load_base(folder, device="cpu").zeros_for_empty  # type: ignore[attr-defined]
    other = Path(shutil.copytree(folder, tmp_path / "base"))
    index = json.loads((other / "model_index.json").read_text())
    index["force_zeros_for_empty_prompt"] = False
    (other / "model_index.json").write_text(json.dumps(index))
    base = load_base(other, device="cpu")
    assert torch.equal(base.unconditional(1).tokens, base.encode_prompts([""]).tokens)


@pytest.mark.parametrize(
    ("unet", "second", "said"),
    [
        ({"projection_class_embeddings_input_dim": 5 * 8 + 24}, {}, "is the refiner of Stable Diffusion XL"),
        ({"projection_class_embeddings_input_dim": 6 * 8 + 32}, {}, "embedding has 24 numbers and its UNet takes 32"),
        ({}, {"hidden_size": 64}, r"text encoders give 32 \+ 64 numbers a token and .* takes 80"),
        ({}, {"_class": "CLIPTextModel"}, "text encoder 2 of .* is a CLIPTextModel"),
    ],
)  # fmt: skip
def test_parts_that_do_not_belong_together_are_refused(
    folder: Path, tmp_path: Path, unet: dict[str, int], second: dict[str, Any], said: str
) -> None:
    import shutil

    other = Path(shutil.copytree(folder, tmp_path / "base"))
    for part, changes in (("unet", unet), ("text_encoder_2", second)):
        path = other / part / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    if "_class" in second:
        index = json.loads((other / "model_index.json").read_text())
        index["text_encoder_2"] = ["transformers", second["_class"]]
        (other / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=said):
        load_base(other, device="cpu")


def test_without_its_second_text_encoder_it_is_not_complete(folder: Path, tmp_path: Path) -> None:
    import shutil

    other = Path(shutil.copytree(folder, tmp_path / "base"))
    index = json.loads((other / "model_index.json").read_text())
    del index["text_encoder_2"], index["tokenizer_2"]
    (other / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match="Missing: the text_encoder_2 folder; the tokenizer_2 folder"):
        load_base(other, device="cpu")


@pytest.mark.parametrize("overflows", [True, False])
def test_a_vae_that_overflows_in_fp16_computes_in_fp32(overflows: bool) -> None:
    """Built for a GPU in fp16, on the meta device."""
    made = tiny()
    made.vae.register_to_config(force_upcast=overflows)
    parts = Components(
        "xl",
        {"unet": made.unet, "vae": made.vae, **made.text_encoders},
        {name: made.readings[root].tokenizer for root, name in made.encoders.items()},
        made.scheduler,
    )
    base = SDXL.load(parts, dtype=torch.float16, device=torch.device("meta"))
    assert isinstance(base, SDXLBase) and base.vae.dtype == torch.float16
    assert base.latents.widened == overflows == any("computes in fp32" in note for note in base.notes)
    base._say_if_widened()
    assert len(base.notes) == overflows


# -- single files ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A single-file checkpoint beside a tokenizer folder."""
    place = tmp_path_factory.mktemp("single")
    tiny_tokenizer().save_pretrained(place / "tokenizer")
    return original.write_xl(place / "xl.safetensors", {"modelspec.prediction_type": "epsilon"})


def test_every_weight_of_a_single_file_arrives(checkpoint: Path) -> None:
    facts, base = describe_base(checkpoint), load_base(checkpoint, device="cpu")
    assert (facts.family, facts.resolution, facts.problems) == ("sdxl", 128 * 4, ())
    assert isinstance(base, SDXLBase) and base.latents.scale == 0.13025 and base.zeros_for_empty
    made = original.parts_xl()
    for name, module in (("unet", base.unet), ("vae", base.vae), *base.text_encoders.items()):
        state, expected = module.state_dict(), made[name].state_dict()
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[key], tensor) for key, tensor in expected.items()), name
    ids = [words.ids(["a fox"])[0][0, -1].item() for words in base.readings.values()]
    assert ids == [519, 0], "OpenCLIP fills up with token 0"
    config = base.scheduler.config
    assert type(base.scheduler).__name__ == "EulerDiscreteScheduler" and config.timestep_spacing == "leading"
    latents, t, frame = torch.randn(1, 4, 8, 8), torch.tensor([500]), Frame.plain(1, 32, 32)
    said = base.encode_prompts(["a fox"])
    with torch.no_grad():
        expected_answer = made["unet"](
            latents, t, said.tokens, added_cond_kwargs=base.told_besides(said, frame)
        ).sample
        assert torch.equal(base.denoise(latents, t, said, frame), expected_answer)


def test_a_refiner_in_a_single_file_is_refused_by_name(checkpoint: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = {}
    for name, tensor in load_file(checkpoint).items():
        if name.startswith("conditioner.embedders.0."):
            continue
        name = name.replace("conditioner.embedders.1.", "conditioner.embedders.0.")
        if name == "model.diffusion_model.label_emb.0.0.weight":
            tensor = tensor[:, : 5 * 256 + 32].contiguous()
        tensors[name] = tensor
    save_file(tensors, tmp_path / "refiner.safetensors")
    with pytest.raises(ModelError, match="is the refiner of Stable Diffusion XL"):
        load_base(tmp_path / "refiner.safetensors", device="cpu")


def test_a_part_that_a_single_file_lacks_is_named(tmp_path: Path) -> None:
    stated = {"modelspec.prediction_type": "epsilon"}
    path = original.write_xl(tmp_path / "part.safetensors", stated, "conditioner.embedders.0.")
    with pytest.raises(ModelError, match=r"the text encoder \(conditioner.embedders.0"):
        load_base(path, device="cpu")


def test_layers_of_a_single_file_are_found_and_merged_into(checkpoint: Path, tmp_path: Path) -> None:
    files, made = open_base(checkpoint), original.parts_xl()
    layers = {
        path: layer
        for path, layer in layers_of(made).items()
        if not path.startswith("vae.") and "position" not in path
    }
    classic = {
        path if ".text_model." in path else path.replace("text_encoder.", "text_encoder.text_model."): layer
        for path, layer in layers.items()
    }
    assert set(files) == set(classic)
    for path, layer in classic.items():
        assert torch.equal(files[path].reshape(layer.weight.shape), layer.weight), path  # type: ignore[arg-type]
    marks = layer_marks({"x": (1,), **{k: tuple(v) for k, v in _shapes(checkpoint).items()}}, "xl")
    assert marks["text_encoder_2.text_projection.weight"].turned
    base = load_base(checkpoint, device="cpu")
    targets = ("attention", "text_encoder.attention", "text_encoder_2.all-linear")
    with Adapter.inject(base.roots, targets, LoraSettings(rank=2)) as adapter:
        with torch.no_grad():
            for number, parameter in enumerate(adapter.parameters()):
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(number))
        said = base.encode_prompts(["a fox"])
        path = write(adapter.state(Metadata(base_family="sdxl")), tmp_path / "lora.safetensors")
    out = tmp_path / "merged.safetensors"
    assert merge_into_base([Source(path)], checkpoint, out).layers == len(read(path).state.layers)
    merged = load_base(out, device="cpu", tokenizer=checkpoint.parent / "tokenizer").encode_prompts(["a fox"])
    torch.testing.assert_close(merged.tokens, said.tokens, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(merged.pooled, said.pooled, rtol=1e-4, atol=1e-4)


def _shapes(path: Path) -> dict[str, tuple[int, ...]]:
    from scumble.models.configs import read_header

    return read_header(path).shapes


# -- at full size ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def benchmark() -> Any:
    """benchmarks/sdxl_step.py, which knows the published configs."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        spec = importlib.util.spec_from_file_location("sdxl_step", ROOT / "benchmarks/sdxl_step.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))
    return module


def test_at_full_size_attention_means_what_it_does_in_diffusers(benchmark: Any, tmp_path: Path) -> None:
    """The published shapes without numbers: layers, parameters and the file of rank 4."""
    base = benchmark.build(benchmark.PUBLISHED, weights=False)
    assert base.resolution == 1024 and base.size_multiple == 32 and base.latent_factor == 8
    assert sum(p.numel() for p in base.unet.parameters()) == 2_567_463_684
    found = resolve(base.roots, ["attention", "text_encoder.attention", "text_encoder_2.attention"])
    assert list(found.counts.values()) == [560, 11 * 4, 32 * 4]
    denoiser = {path: layer for path, layer in found.layers.items() if path.startswith("unet.")}
    # diffusers' script targets these ends of its own module names
    ends = ("to_k", "to_q", "to_v", "to_out.0")
    theirs = {f"unet.{name}" for name, _ in base.unet.named_modules() if name.endswith(ends)}
    assert set(denoiser) == theirs
    layers = {
        path: LayerState(
            "lora",
            4,
            4.0,
            {"down": torch.zeros(4, layer.in_features), "up": torch.zeros(layer.out_features, 4)},  # type: ignore[arg-type]
        )
        for path, layer in denoiser.items()
    }
    state = AdapterState(layers, metadata=Metadata(base_family="sdxl"))
    count = sum(tensor.numel() for layer in layers.values() for tensor in layer.tensors.values())
    assert count == 5_806_080
    size = write(state, tmp_path / "x.safetensors").stat().st_size
    assert 4 * count < size < 4 * count + 300_000, f"{size} bytes"


def test_the_benchmark_runs(benchmark: Any, tmp_path: Path) -> None:
    found = benchmark.main(["--tiny", "--latents", "8", "--output", str(tmp_path / "x.json")])
    assert json.loads((tmp_path / "x.json").read_text())["training step"]["layers"] == 136
    assert found["training step"]["gradient norm"] > 0 and found["drawing step"]["notes"] == []
