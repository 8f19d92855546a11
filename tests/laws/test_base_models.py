"""The laws of every base family in the registry: it computes what diffusers' own pipeline computes."""

from __future__ import annotations

import functools
import inspect
import math
import re
import socket
from dataclasses import replace
from typing import Any, NoReturn

import pytest
import torch

from scumble.adapters import Adapter, LoraSettings, layers_of
from scumble.models import FAMILIES
from scumble.models.family import BaseModel, Conditioning, Frame
from scumble.models.prediction import prediction_from

ALONE = {"num_images_per_prompt": 1, "do_classifier_free_guidance": True}
PROMPTS = ["a small red fox, in a snowy field", "", "東京 🦊", "the fox and " * 40]


@pytest.fixture(params=list(FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def base(family: str, monkeypatch: pytest.MonkeyPatch) -> BaseModel:
    """A tiny base on a machine without a network."""

    def refuse(*_: Any, **__: Any) -> NoReturn:
        raise AssertionError("the network was asked")

    for name in ("socket", "create_connection", "getaddrinfo"):
        monkeypatch.setattr(socket, name, refuse)
    return FAMILIES.get(family).tiny(seed=1)


def quiet(base: BaseModel) -> Any:
    pipeline: Any = base.pipeline()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def pictures(count: int, side: int) -> torch.Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_it_is_frozen_and_in_eval_mode(base: BaseModel) -> None:
    pipeline = quiet(base)
    for root in (*base.roots.values(), pipeline.vae):
        assert not any(parameter.requires_grad for parameter in root.parameters())
        assert not any(module.training for module in root.modules())


def test_the_pipeline_is_over_these_very_modules(base: BaseModel) -> None:
    pipeline = quiet(base)
    assert all(getattr(pipeline, name) is root for name, root in base.roots.items())
    assert next(iter(base.roots.values())) is base.denoiser
    said = prediction_from(pipeline.scheduler.config)
    assert base.prediction.name == said.name and base.prediction.shift == said.shift
    if hasattr(pipeline.scheduler, "alphas_cumprod"):
        assert base.prediction.name == pipeline.scheduler.config.prediction_type
        torch.testing.assert_close(base.prediction.alphas_cumprod, pipeline.scheduler.alphas_cumprod)  # type: ignore[attr-defined]


def test_encode_prompts_is_the_pipelines(base: BaseModel) -> None:
    ours = base.encode_prompts(PROMPTS)
    rows, whole = len(PROMPTS), quiet(base).encode_prompt
    # some pipelines want to be told that no encoder has a prompt of its own
    own = dict.fromkeys(inspect.signature(whole).parameters.keys() & {"prompt_2", "prompt_3"})
    ask = functools.partial(whole, **own)
    if "negative_prompt" not in inspect.signature(whole).parameters:  # a denoiser that is told its guidance
        tokens, pooled_alone, *_ = ask(PROMPTS, device="cpu", num_images_per_prompt=1)
        assert torch.equal(ours.tokens, tokens) and not ours.tokens.requires_grad
        assert ours.pooled is not None and torch.equal(ours.pooled, pooled_alone)
        return
    theirs, negative, *pooled = ask(PROMPTS, device="cpu", negative_prompt=[""] * rows, **ALONE)
    assert torch.equal(ours.tokens, theirs) and not ours.tokens.requires_grad
    _, unconditional, *pooled_unconditional = ask(PROMPTS, device="cpu", **ALONE)
    for mine, plain, and_pooled in (
        (base.encode_prompts([""] * rows), negative, pooled),
        (base.unconditional(rows), unconditional, pooled_unconditional),
    ):
        assert torch.equal(mine.tokens, plain)
        if mine.pooled is not None:
            assert torch.equal(mine.pooled, and_pooled[1])
    assert (ours.pooled is None) == (not pooled)
    assert ours.pooled is None or torch.equal(ours.pooled, pooled[0])


def test_token_counts_are_those_before_truncation(base: BaseModel) -> None:
    counts, limit = base.token_counts(PROMPTS)
    parts = quiet(base).components
    tokenizers = [part for name, part in parts.items() if name.startswith("tokenizer") and part is not None]
    found = {
        tokenizer.model_max_length: [len(tokenizer(p).input_ids) for p in PROMPTS] for tokenizer in tokenizers
    }
    assert found[limit] == counts and counts[1] <= 2 and counts[3] > 77


def test_gradients_reach_a_trainable_text_encoder_and_only_then(base: BaseModel) -> None:
    for name in list(base.roots)[1:]:
        with Adapter.inject({name: base.roots[name]}, "all-linear", LoraSettings(rank=2)) as adapter:
            assert any(parameter.requires_grad for parameter in base.roots[name].parameters())
            said = base.encode_prompts(PROMPTS)
            sum(t.square().mean() for t in (said.tokens, said.pooled) if t is not None).backward()  # type: ignore[union-attr]
            assert all(p.grad is not None and p.grad.isfinite().all() for p in adapter.parameters())
            with torch.no_grad():
                assert not base.encode_prompts(PROMPTS).tokens.requires_grad
        assert not base.encode_prompts(PROMPTS).tokens.requires_grad


def test_encode_images_is_the_pipelines_vae(base: BaseModel) -> None:
    vae, pixels = quiet(base).vae, pictures(3, base.resolution)
    with torch.no_grad():
        posterior = vae.encode(pixels).latent_dist
        drawn = posterior.sample(generator=torch.Generator().manual_seed(7))
    scale, shift = vae.config.scaling_factor, vae.config.shift_factor or 0
    drawn = (drawn - shift) * scale
    assert torch.equal(base.encode_images(pixels, None), (posterior.mode() - shift) * scale)
    assert torch.equal(base.encode_images(pixels, torch.Generator().manual_seed(7)), drawn)
    assert drawn.shape == (3, base.latent_channels, *[base.resolution // base.latent_factor] * 2)


def test_decode_latents_is_the_pipelines_vae(base: BaseModel) -> None:
    pipeline, latents = quiet(base), base.encode_images(pictures(2, base.resolution), None)
    with torch.no_grad():
        config = pipeline.vae.config
        theirs = pipeline.vae.decode(latents / config.scaling_factor + (config.shift_factor or 0)).sample
    ours = base.decode_latents(latents)
    assert torch.equal(ours, theirs.clamp(-1, 1)) and ours.shape == (2, 3, base.resolution, base.resolution)
    assert ours.dtype == torch.float32 and ours.abs().max() <= 1


@pytest.mark.parametrize("scale", [1, 2])
def test_denoise_in_a_scheduler_loop_draws_the_pipelines_picture(base: BaseModel, scale: int) -> None:
    steps, guidance, side = 4, 5.0, base.resolution + (scale - 1) * base.size_multiple
    pipeline = quiet(base)
    shape = (1, base.latent_channels, side // base.latent_factor, side // base.latent_factor)
    start = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    theirs = pipeline(
        **base.asked(["a fox"], None, guidance), num_inference_steps=steps, latents=base.packed(start), height=side,
        width=side, output_type="pt", **base.drawn_into(None, None, 1, (side, side)),
    ).images  # fmt: skip
    scheduler = pipeline.scheduler
    if scheduler.config.get("use_dynamic_shifting"):  # the pipeline chose the levels by the picture's size
        scheduler._step_index = None
    else:
        scheduler.set_timesteps(steps)
    latents = start * getattr(scheduler, "init_noise_sigma", 1)
    scaled = getattr(scheduler, "scale_model_input", lambda x, _: x)
    # a flow's t is the scheduler's sigma
    units = scheduler.config.num_train_timesteps if base.prediction.straight else 1
    both = Conditioning.cat([base.unconditional(1), base.encode_prompts(["a fox"])])
    with torch.no_grad():
        for t in scheduler.timesteps:
            if base.guided:
                alone = replace(base.encode_prompts(["a fox"]), guidance=torch.tensor([guidance]))
                out = base.denoise(latents, t[None] / units, alone, Frame.plain(1, side, side))
                latents = scheduler.step(out, t, latents).prev_sample
                continue
            pair = scaled(torch.cat([latents] * 2), t)
            without, told = base.denoise(pair, t.expand(2) / units, both, Frame.plain(2, side, side)).chunk(2)
            latents = scheduler.step(without + guidance * (told - without), t, latents).prev_sample
    ours = base.decode_latents(latents) / 2 + 0.5
    error = (ours - theirs).square().mean().item()
    assert error == 0 or -10 * math.log10(error) >= 50
    assert theirs.std() > 0.01


@pytest.mark.parametrize("autocast", [False, True])
def test_denoise_takes_and_gives_fp32_in_any_dtype(family: str, base: BaseModel, autocast: bool) -> None:
    half = FAMILIES.get(family).tiny(seed=1)
    if not autocast:
        for root in half.roots.values():
            root.to(torch.bfloat16)
        half.dtype = torch.bfloat16
    latents = torch.randn(2, base.latent_channels, 8, 8, generator=torch.Generator().manual_seed(0))
    t, words, frame = (
        base.prediction.from_uniform(torch.tensor([0.2, 0.8])),
        base.encode_prompts(["a", "b"]),
        Frame.plain(2, 16, 16),
    )
    with torch.no_grad():
        exact = base.denoise(latents, t, words, frame)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            rough = half.denoise(latents, t, words, frame)
    assert exact.dtype == rough.dtype == torch.float32 and rough.shape == latents.shape
    assert 0 < (rough - exact).abs().max() < 0.1


def test_gradients_flow_to_adapters_with_and_without_checkpointing(base: BaseModel) -> None:
    latents = torch.randn(1, base.latent_channels, 8, 8, generator=torch.Generator().manual_seed(0))
    t, frame = base.prediction.from_uniform(torch.tensor([0.4])), Frame.plain(1, 16, 16)
    grads = []
    with Adapter.inject(base.roots, "all-linear", LoraSettings(rank=2)) as adapter:
        for checkpointing in (False, True, False):
            base.train_memory(checkpointing=checkpointing)
            for parameter in adapter.parameters():
                parameter.grad = None
            base.denoise(latents, t, base.encode_prompts(["a fox"]), frame).square().mean().backward()
            grads.append([p.grad.clone() for p in adapter.parameters() if p.grad is not None])
            assert len(grads[-1]) == len(list(adapter.parameters()))
    for other in grads[1:]:
        for mine, same in zip(grads[0], other, strict=True):
            torch.testing.assert_close(mine, same)
    assert not any(module.training for root in base.roots.values() for module in root.modules())


def test_fingerprint_is_of_the_base_alone(family: str, base: BaseModel) -> None:
    build = FAMILIES.get(family).tiny
    mark = base.fingerprint()
    assert mark == build(seed=1).fingerprint() != build(seed=2).fingerprint()
    fresh = build(seed=1)
    with Adapter.inject(fresh.roots, "all-linear", LoraSettings(rank=2)):
        assert fresh.fingerprint() == mark
    halved = build(seed=1)
    halved.denoiser.to(torch.float16)
    assert halved.fingerprint() == mark
    changed = build(seed=1)
    with torch.no_grad():
        next(iter(changed.denoiser.parameters())).view(-1)[0] += 0.5
    assert changed.fingerprint() != mark


def test_tiny_leaves_the_global_random_state_alone(family: str) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    FAMILIES.get(family).tiny(seed=5)
    assert torch.equal(torch.get_rng_state(), before)


def test_layers_carry_the_names_of_the_full_size_family(base: BaseModel) -> None:
    names = layers_of(base.roots)
    attended = next(name for name in names if name.endswith(".to_q"))
    block, _, attention = attended.rpartition(".to_q")[0].rpartition(".")
    assert re.match(r"(unet\.down_blocks\.\d\.attentions\.0|transformer)\.transformer_blocks\.0$", block)
    second = {"attn1": ["attn2.to_q"], "attn": ["attn.add_q_proj", "attn.to_add_out"]}[attention]
    for layer in (
        *second,
        *(f"{attention}.{n}" for n in ("to_k", "to_v", "to_out.0")),
        "ff.net.0.proj",
        "ff.net.2",
    ):
        assert f"{block}.{layer}" in names
    for root in list(base.roots)[1:]:
        queries = ("self_attn.q_proj", "SelfAttention.q")
        assert any(name.startswith(f"{root}.") and name.endswith(queries) for name in names)


def test_sides_are_what_the_pipeline_takes(base: BaseModel) -> None:
    assert base.resolution % base.size_multiple == 0 and base.size_multiple % base.latent_factor == 0
    assert base.latent_factor == base.pipeline().vae_scale_factor  # type: ignore[attr-defined]
