"""Flux.1: what it shares with no other family: packing, a guidance that is told, the loss of diffusers' script."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from scumble.adapters import Adapter, LoraSettings, layers_of, resolve
from scumble.data.record import Batch
from scumble.errors import ConfigError, ModelError
from scumble.models import describe_base, load_base
from scumble.models.family import Frame
from scumble.models.flux import Flux, FluxBase, pack, places, tiny_flux, unpack
from scumble.models.tiny import save
from scumble.rng import Streams
from scumble.training.objective import DenoisingObjective, ObjectiveSettings, denoising_loss


@pytest.fixture
def base() -> FluxBase:
    made = Flux.tiny(1)
    assert isinstance(made, FluxBase)
    return made


def schnell() -> FluxBase:
    return FluxBase(tiny_flux(1, guided=False), dtype=torch.float32, device=torch.device("cpu"))


def latents(count: int = 2, height: int = 8, width: int = 6, seed: int = 0) -> Tensor:
    return torch.randn(count, 16, height, width, generator=torch.Generator().manual_seed(seed))


def test_packing_is_the_pipelines_and_has_an_inverse() -> None:
    from diffusers import FluxPipeline

    x = latents()
    assert torch.equal(pack(x), FluxPipeline._pack_latents(x, 2, 16, 8, 6))
    assert torch.equal(unpack(pack(x), 8, 6), x)
    assert torch.equal(places(8, 6), FluxPipeline._prepare_latent_image_ids(2, 4, 3, "cpu", torch.float32))
    with pytest.raises(ModelError, match="2x2, and these are 7x6"):
        pack(latents(height=7))


def test_dev_is_told_a_guidance_and_schnell_is_not(base: FluxBase) -> None:
    x, t, frame = latents(), torch.tensor([0.3, 0.7]), Frame.plain(2, 16, 12)
    for one, guided in ((base, True), (schnell(), False)):
        assert one.guided is guided and one.usual_guidance == (3.5 if guided else 0.0)
        said = one.encode_prompts(["a fox", "a house"])
        with torch.no_grad():
            plain = one.denoise(x, t, said, frame)
            same = one.denoise(x, t, replace(said, guidance=torch.ones(2)), frame)
            other = one.denoise(x, t, replace(said, guidance=torch.tensor([1.0, 4.0])), frame)
        assert torch.equal(plain, same) and torch.equal(plain[0], other[0])
        assert torch.equal(plain[1], other[1]) is not guided


def test_schnell_draws_the_pipelines_picture() -> None:
    one = schnell()
    pipeline: Any = one.pipeline()
    pipeline.set_progress_bar_config(disable=True)
    start = latents(1, 8, 8)
    theirs = pipeline(
        **one.asked(["a fox"], None, one.usual_guidance), num_inference_steps=4, latents=pack(start), height=16,
        width=16, output_type="pt",
    ).images  # fmt: skip
    sigmas, x = pipeline.scheduler.sigmas, start
    with torch.no_grad():
        for now, then in itertools.pairwise(sigmas):
            said = one.encode_prompts(["a fox"])
            x = x + (then - now) * one.denoise(x, now[None], said, Frame.plain(1, 16, 16))
    error = (one.decode_latents(x) / 2 + 0.5 - theirs).square().mean().item()
    assert error == 0 or -10 * math.log10(error) >= 50


def test_a_negative_prompt_is_guided_away_from(base: FluxBase) -> None:
    assert base.asked(["a"], None, 3.0) == {"prompt": ["a"], "guidance_scale": 3.0}
    assert base.asked(["a"], ["b"], 3.0)["true_cfg_scale"] == 3.0
    assert "negative_prompt" not in base.asked(["a"], ["b"], 1.0)


def batch(base: FluxBase, seed: int = 0) -> Batch:
    return Batch(
        latents=latents(seed=seed),
        conditioning=None,
        captions=("a fox", "the house"),
        frame=Frame.plain(2, 16, 12),
        weight=torch.ones(2),
        keys=("a", "b"),
        positions=(0, 1),
    )


@pytest.mark.parametrize("guidance", [None, 1.0, 3.5])
def test_the_loss_is_the_papers_and_that_of_diffusers_script(base: FluxBase, guidance: float | None) -> None:
    """In the script's order: sigmas from the scheduler's table, packed, told, unpacked, the mean over each sample."""
    pipeline: Any = base.pipeline()
    scheduler = pipeline.scheduler
    model_input, noise = latents(), latents(seed=1)
    indices = torch.tensor([200, 771])
    timesteps = scheduler.timesteps[indices]
    sigmas = scheduler.sigmas[indices].view(-1, 1, 1, 1)
    noisy = (1.0 - sigmas) * model_input + sigmas * noise
    tokens, pooled, text = pipeline.encode_prompt(["a fox", "the house"])
    with torch.no_grad():
        answer = base.transformer(
            hidden_states=pipeline._pack_latents(noisy, 2, 16, 8, 6),
            timestep=timesteps / 1000,
            guidance=torch.tensor([1.0 if guidance is None else guidance]).expand(2),
            pooled_projections=pooled,
            encoder_hidden_states=tokens,
            txt_ids=text,
            img_ids=pipeline._prepare_latent_image_ids(2, 4, 3, "cpu", torch.float32),
            return_dict=False,
        )[0]
        answer = pipeline._unpack_latents(answer, 8 * 2, 6 * 2, 2)
        theirs = (answer - (noise - model_input)).square().flatten(1).mean(1)
        ours = denoising_loss(
            base, batch(base), noise, timesteps / 1000, ObjectiveSettings(guidance=guidance)
        )
        x0 = noisy - sigmas * answer  # the paper's z_t = (1 - t) x0 + t n, its v = n - x0
        clean = ((x0 - model_input) / sigmas).square().flatten(1).mean(1)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours, clean, rtol=1e-4, atol=1e-4)


def test_a_guidance_for_a_base_that_is_told_none_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"objective.guidance = 2 .*Flux.1 dev; tiny-flux is told none"):
        DenoisingObjective(schnell(), Streams(0), ObjectiveSettings(guidance=2.0))


def test_the_shift_by_resolution_is_the_pipelines(base: FluxBase) -> None:
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    for tokens in (16, 256, 1024, 4096):
        assert base.prediction.shift_at(tokens, 64) == pytest.approx(math.exp(calculate_shift(tokens)))


# -- files: folder, refusals ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save("flux", tmp_path_factory.mktemp("base") / "flux", seed=1)


def test_a_saved_folder_is_loaded_as_it_was(folder: Path, base: FluxBase) -> None:
    facts = describe_base(folder)
    assert (facts.family, facts.title, facts.prediction, facts.problems) == ("flux", "Flux.1", "flow", ())
    assert (facts.resolution, facts.size_multiple, facts.latent_channels) == (16, 4, 16)
    loaded = load_base(folder, device="cpu")
    assert loaded.fingerprint() == base.fingerprint() and loaded.notes == ()
    ours, theirs = (one.encode_prompts(["a small fox, 東京"]) for one in (loaded, base))
    assert torch.equal(ours.tokens, theirs.tokens) and ours.pooled is not None and theirs.pooled is not None
    assert torch.equal(ours.pooled, theirs.pooled)


def spoiled(folder: Path, to: Path, part: str, **entries: Any) -> Path:
    """A copy of a base without weights, with other entries in the config of one part."""
    for file in folder.rglob("*.json"):
        copy = to / file.relative_to(folder)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(file.read_text())
    name = "scheduler_config.json" if part == "scheduler" else "config.json"
    config = json.loads((to / part / name).read_text())
    (to / part / name).write_text(json.dumps(config | entries))
    return to


@pytest.mark.parametrize(
    ("part", "entries", "message"),
    [
        ("text_encoder_2", {"d_model": 48}, "its T5 gives 48 numbers a token and its transformer takes 32"),
        (
            "text_encoder",
            {"hidden_size": 48},
            "its CLIP gives 48 numbers a prompt and its transformer takes 24",
        ),
        (
            "vae",
            {"latent_channels": 4},
            "4 latent channels, 16 for each square of 2x2, and its transformer takes 64",
        ),
        ("transformer", {"in_channels": 384}, "an inpainting model .Flux.1 Fill"),
        ("transformer", {"in_channels": 128}, "a depth or canny control model"),
        (
            "scheduler",
            {"_class_name": "DDIMScheduler", "prediction_type": "epsilon", "beta_start": 1e-4},
            "says that it predicts epsilon; Flux.1 is trained by flow matching",
        ),
    ],
)
def test_parts_that_dont_belong_together_are_one_sentence(
    folder: Path, tmp_path: Path, part: str, entries: dict[str, Any], message: str
) -> None:
    facts = describe_base(spoiled(folder, tmp_path / "base", part, **entries))
    found = [problem for problem in facts.problems if message.replace(".Flux", "(Flux") in problem]
    assert len(found) == 1, facts.problems


def test_a_missing_t5_is_named(folder: Path, tmp_path: Path) -> None:
    base = spoiled(folder, tmp_path / "base", "vae")
    index = json.loads((base / "model_index.json").read_text())
    del index["text_encoder_2"]
    (base / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"Missing: the text_encoder_2 folder \(T5\)"):
        load_base(base)


# -- the shape of the real one -------------------------------------------------------------------------------


def test_flux_dev_at_full_size_on_the_meta_device() -> None:
    """Layers by preset, shapes, and the bytes of a file, against diffusers' own modules."""
    from diffusers import FluxTransformer2DModel

    with torch.device("meta"):
        transformer = FluxTransformer2DModel(guidance_embeds=True)
    roots: dict[str, nn.Module] = {"transformer": transformer}
    assert sum(p.numel() for p in transformer.parameters()) == 11_901_408_320
    assert len(layers_of(roots)) == 504
    counts = {preset: len(resolve(roots, preset).layers) for preset in ("attention", "mlp", "attention+mlp")}
    assert counts == {"attention": 19 * 8 + 38 * 3, "mlp": 19 * 4 + 38 * 2, "attention+mlp": 19 * 12 + 38 * 5}
    shapes = {name: tuple(layer.weight.shape) for name, layer in resolve(roots, "attention").layers.items()}
    assert set(shapes.values()) == {(3072, 3072)}
    # r (in + out) numbers a layer
    sizes = {rank: sum(rank * sum(shape) for shape in shapes.values()) for rank in (4, 16)}
    assert sizes == {4: 6_537_216, 16: 26_148_864}
    mlp = resolve(roots, "mlp").layers
    assert {tuple(layer.weight.shape) for layer in mlp.values()} == {
        (12288, 3072),
        (3072, 12288),
        (3072, 15360),
    }
    with Adapter.inject(roots, "attention", LoraSettings(rank=4)) as adapter:
        assert adapter.parameter_count == 6_537_216
