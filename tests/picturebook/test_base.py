"""The embedded base: real classes, small files, any string, loaded by diffusers, and it draws what is asked."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

import scumble.picturebook
from scumble.errors import ModelError
from scumble.picturebook import captions, oracle, scenes
from scumble.rng import Streams


@pytest.fixture(scope="module")
def pipe():  # type: ignore[no-untyped-def]
    from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(scumble.picturebook.path(), torch_dtype=torch.float32)
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_it_is_small_and_in_half_precision() -> None:
    folder = scumble.picturebook.path()
    assert sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) <= 24e6
    files = sorted(folder.rglob("*.safetensors"))
    assert [f.parent.name for f in files] == ["text_encoder", "unet", "vae"]
    for file in files:
        with safe_open(file, "pt") as opened:
            dtypes = {opened.get_slice(name).get_dtype() for name in opened.keys()}  # noqa: SIM118 - not a dict
        assert dtypes <= {"F16", "I64"}, file
    assert not list(folder.rglob("*.bin")) and not list(folder.rglob("*.pt"))


def test_its_parts_are_stable_diffusion_ones(pipe) -> None:  # type: ignore[no-untyped-def]
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

    assert type(pipe.unet) is UNet2DConditionModel and type(pipe.vae) is AutoencoderKL
    assert type(pipe.text_encoder) is CLIPTextModel and isinstance(pipe.tokenizer, CLIPTokenizer)
    assert pipe.vae.config.latent_channels == 4 and pipe.vae.config.scaling_factor == 0.18215
    schedule = pipe.scheduler.config
    assert (schedule.beta_start, schedule.beta_end, schedule.beta_schedule) == (
        0.00085,
        0.012,
        "scaled_linear",
    )
    assert schedule.prediction_type == "epsilon" and schedule.num_train_timesteps == 1000


@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=60))
def test_the_vocabulary_encodes_any_string(pipe, text: str) -> None:  # type: ignore[no-untyped-def]
    ids = pipe.tokenizer(text, padding="max_length", truncation=True).input_ids
    assert len(ids) == 77 and max(ids) < len(pipe.tokenizer) and min(ids) >= 0


def test_captions_are_short_and_come_back(pipe) -> None:  # type: ignore[no-untyped-def]
    for number in range(100):
        words = captions.caption(scenes.random_scene(Streams(3).python("words", number)))
        ids = pipe.tokenizer(words).input_ids
        assert len(ids) <= 40
        assert pipe.tokenizer.decode(ids, skip_special_tokens=True).replace(" ,", ",").strip() == words


def test_latents_have_unit_variance(pipe) -> None:  # type: ignore[no-untyped-def]
    from scumble.picturebook.draw import draw

    drawn = [draw(scenes.random_scene(Streams(4).python("latents", n))) for n in range(48)]
    pixels = oracle.to_tensor(drawn)
    with torch.no_grad():
        latents = pipe.vae.encode(pixels).latent_dist.mean * pipe.vae.config.scaling_factor
    assert (latents.std(dim=(0, 2, 3)) - 1).abs().max() < 0.2
    assert latents.mean(dim=(0, 2, 3)).abs().max() < 0.4


@pytest.mark.slow
def test_it_draws_what_is_asked(pipe) -> None:  # type: ignore[no-untyped-def]
    """A sample of what benchmarks/picturebook_base.py measures; bounds leave room for its size."""
    asked = [scenes.random_scene(Streams(31).python("asked", n), held_out=True) for n in range(40)]
    pictures = []
    for start in range(0, 40, 20):
        prompts = [captions.caption(scene) for scene in asked[start : start + 20]]
        generators = [torch.Generator().manual_seed(start + n) for n in range(20)]
        pictures += pipe(prompts, num_inference_steps=25, generator=generators).images
    judged = oracle.judge(pictures, asked)
    assert judged.subject >= 0.8 and judged.color >= 0.8 and judged.background >= 0.85, judged
    assert judged.style >= 0.95


def test_without_its_weights_it_says_how_to_get_them(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(scumble.picturebook, "__file__", str(tmp_path / "__init__.py"))
    with pytest.raises(ModelError, match=r"embedded base is missing.*scumble picturebook pretrain"):
        scumble.picturebook.path()
