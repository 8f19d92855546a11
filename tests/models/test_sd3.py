"""Stable Diffusion 3: its training loss, its files in diffusers' own pipeline, its full shapes, and what it refuses."""

from __future__ import annotations

import inspect
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from diffusers.training_utils import compute_loss_weighting_for_sd3
from torch import Tensor

from scumble.adapters import Adapter, LoraSettings, layers_of
from scumble.adapters.layers import mark_unread
from scumble.adapters.state import AdapterState, LayerState, TokenState
from scumble.adapters.targets import resolve
from scumble.data.record import Batch
from scumble.errors import FormatError, ModelError
from scumble.formats import CODECS, read, write
from scumble.inference.attach import load_adapter, unload_adapters
from scumble.inference.request import Request
from scumble.inference.schedulers import build_scheduler
from scumble.inference.session import Session
from scumble.models import FAMILIES, describe_base, load_base
from scumble.models.family import BaseModel
from scumble.models.loading import load_tokenizers
from scumble.models.prediction import shifted
from scumble.models.sd3 import READ, SD3, SD3Base, tiny_sd3
from scumble.rng import Streams
from scumble.training.objective import DenoisingObjective, ObjectiveSettings
from scumble.training.timesteps import TimestepSettings
from tests.training.world import LatentBatches

STREAMS = Streams(11)
INIT = inspect.signature(StableDiffusion3Pipeline.__init__).parameters.keys()
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")


@pytest.fixture(scope="module")
def base() -> BaseModel:
    return FAMILIES.get("sd3").tiny(0)


@pytest.fixture(scope="module")
def batch(base: BaseModel) -> Batch:
    return LatentBatches(base, samples=4).batch([0, 1, 2, 3])


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny base as a folder. Copy it to spoil it."""
    folder = tmp_path_factory.mktemp("sd3") / "base"
    FAMILIES.get("sd3").tiny(3).pipeline().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "base"))


def without_t5(seed: int = 0) -> SD3Base:
    return SD3Base(tiny_sd3(seed, t5=False), dtype=torch.float32, device=torch.device("cpu"))


# -- training ------------------------------------------------------------------------------------------------


def losses(base: BaseModel, batch: Batch, **settings: Any) -> Tensor:
    with torch.no_grad():
        return DenoisingObjective(base, STREAMS, ObjectiveSettings(**settings))(batch)


@torch.no_grad()
def by_script(
    base: BaseModel, batch: Batch, sigma: Tensor, *, preconditioned: bool, scheme: str = "none"
) -> Tensor:
    """What diffusers' script for SD 3 computes from the same noise, at these levels."""
    noise = STREAMS.normal("noise", batch.positions, batch.latents.shape[1:])
    sigmas = sigma.view(-1, 1, 1, 1)
    noisy = (1.0 - sigmas) * batch.latents + sigmas * noise
    said = batch.conditioning
    assert said is not None
    answer = base.denoiser(noisy, said.tokens, said.pooled, 1000 * sigma).sample
    if preconditioned:
        answer = answer * (-sigmas) + noisy
    target = batch.latents if preconditioned else noise - batch.latents
    weighting = compute_loss_weighting_for_sd3(scheme, sigmas)
    return (weighting * (answer - target) ** 2).reshape(len(batch), -1).mean(1)


def test_the_loss_is_the_papers(base: BaseModel, batch: Batch) -> None:
    """|v(z_t, t) - (e - x0)|^2 on z_t = (1 - t) x0 + t e (Esser et al. 2024, eq. 1 to 8), at t that the shift moved."""
    u = STREAMS.uniform("timestep", batch.positions)
    t = 3 * u / (1 + 2 * u)
    expected = by_script(base, batch, t, preconditioned=False)
    torch.testing.assert_close(losses(base, batch), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("scheme", ["sigma_sqrt", "cosmap", "none"])
@pytest.mark.parametrize("preconditioned", [False, True])
def test_the_loss_is_that_of_the_script(
    base: BaseModel, batch: Batch, scheme: str, preconditioned: bool
) -> None:
    settings = {
        "weighting": scheme.replace("_", "-"),
        "measured": "clean" if preconditioned else "prediction",
    }
    sigma = DenoisingObjective(base, STREAMS).timesteps(batch.positions, batch.latents.shape)
    expected = by_script(base, batch, sigma, preconditioned=preconditioned, scheme=scheme)
    torch.testing.assert_close(losses(base, batch, **settings), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("distribution", "shift", "total"),
    [("logit-normal", None, 3.0), ("mode", 1.0, 1.0), ("uniform", 6.0, 6.0), ("uniform", "resolution", 1.5)],
)
def test_levels_are_shifted_as_asked(base: BaseModel, distribution: str, shift: Any, total: float) -> None:
    plain = ObjectiveSettings(timesteps=TimestepSettings(distribution=distribution, shift=1.0))
    moved = ObjectiveSettings(timesteps=TimestepSettings(distribution=distribution, shift=shift))
    shape = (5, 16, 4, 4)  # half the side of the base's own
    found, before = (
        DenoisingObjective(base, STREAMS, one).timesteps(tuple(range(5)), shape) for one in (moved, plain)
    )
    torch.testing.assert_close(found, shifted(before, total))


def test_checkpointed_and_plain_gradients_agree_in_half_precision() -> None:
    base = FAMILIES.get("sd3").tiny(0)
    batch = LatentBatches(base, samples=2).batch([0, 1])
    found = []
    with Adapter.inject(base.roots, "attention+mlp", LoraSettings(rank=2)) as adapter:
        for checkpointing in (False, True):
            base.train_memory(checkpointing=checkpointing)
            for parameter in adapter.parameters():
                parameter.grad = None
            with torch.autocast("cpu", torch.bfloat16):
                DenoisingObjective(base, STREAMS)(batch).sum().backward()
            found.append([p.grad.clone() for p in adapter.parameters() if p.grad is not None])
    assert len(found[0]) == len(list(adapter.parameters()))
    for mine, same in zip(*found, strict=True):
        torch.testing.assert_close(mine, same)


# -- what presets mean, and full shapes ----------------------------------------------------------------------

FULL: dict[str, tuple[dict[str, Any], int, int]] = {
    "3 medium": (
        {
            "num_layers": 24,
            "num_attention_heads": 24,
            "caption_projection_dim": 1536,
            "pos_embed_max_size": 192,
        },
        190,
        284,
    ),
    "3.5 medium": (
        {
            "num_layers": 24,
            "num_attention_heads": 24,
            "caption_projection_dim": 1536,
            "pos_embed_max_size": 384,
            "qk_norm": "rms_norm",
            "dual_attention_layers": tuple(range(13)),
        },
        242,
        336,
    ),
    "3.5 large": (
        {
            "num_layers": 38,
            "num_attention_heads": 38,
            "caption_projection_dim": 2432,
            "pos_embed_max_size": 192,
            "qk_norm": "rms_norm",
        },
        302,
        452,
    ),
}
"""Release -> (its published config where it differs from diffusers' defaults, layers that `attention` and
`attention+mlp` mean)."""


def transformer(release: str) -> dict[str, torch.nn.Module]:
    with torch.device("meta"):
        model: Any = SD3Transformer2DModel(**FULL[release][0])
    mark_unread(model.transformer_blocks[-1].attn.add_q_proj)
    return {"transformer": model}


def expected_layers(release: str) -> dict[str, tuple[int, int]]:
    """The layers of `attention+mlp`, written out: path -> (out, in)."""
    config = FULL[release][0]
    width, last = 64 * config["num_attention_heads"], config["num_layers"] - 1
    layers: dict[str, tuple[int, int]] = {}
    for block in range(last + 1):
        here = f"transformer.transformer_blocks.{block}"
        names = [name for name in ATTENTION if block < last or name not in ("add_q_proj", "to_add_out")]
        layers |= {f"{here}.attn.{name}": (width, width) for name in names}
        if block in config.get("dual_attention_layers", ()):
            layers |= {f"{here}.attn2.{name}": (width, width) for name in ATTENTION[:4]}
        for part in ("ff", "ff_context") if block < last else ("ff",):
            layers[f"{here}.{part}.net.0.proj"] = (4 * width, width)
            layers[f"{here}.{part}.net.2"] = (width, 4 * width)
    return layers


@pytest.mark.parametrize("release", FULL)
def test_presets_on_the_full_shapes(release: str) -> None:
    roots, (_, attention, both) = transformer(release), FULL[release]
    found = resolve(roots, "attention+mlp").layers
    assert {path: tuple(layer.weight.shape) for path, layer in found.items()} == expected_layers(release)
    assert len(found) == both
    narrow = resolve(roots, "attention").layers
    assert len(narrow) == attention and set(narrow) == {path for path in found if ".attn" in path}


@pytest.mark.parametrize(
    ("release", "size"), [("3 medium", 4_700_000), ("3.5 medium", 5_990_000), ("3.5 large", 11_800_000)]
)
def test_file_sizes_at_rank_4(release: str, size: int, tmp_path: Path) -> None:
    """`attention` in fp16: SD 3 medium 4.7 MB, 3.5 medium 6 MB, 3.5 large 11.8 MB."""
    layers = {
        path: LayerState("lora", 4, 4.0, {"down": torch.ones(4, width), "up": torch.ones(width, 4)})
        for path, (width, _) in expected_layers(release).items()
        if ".attn" in path
    }
    path = write(AdapterState(layers), tmp_path / "full.safetensors", dtype=torch.float16)
    numbers = sum(t.numel() for one in layers.values() for t in one.tensors.values())
    assert 2 * numbers < path.stat().st_size < size * 1.01
    assert path.stat().st_size > size * 0.97
    assert len(read(path, layers_of(transformer(release))).state.layers) == len(layers)


def test_what_is_read_by_nothing_is_not_trained(base: BaseModel) -> None:
    last = "transformer.transformer_blocks.2.attn.add_q_proj"
    assert last in layers_of(base.roots)
    assert last not in resolve(base.roots, ("attention", "all-linear")).layers


# -- files in diffusers' pipeline ----------------------------------------------------------------------------


def quiet(pipeline: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def drawn(pipeline: Any) -> Tensor:
    start = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(3))
    pictures: Tensor = quiet(pipeline)(
        "a fox", num_inference_steps=2, latents=start, height=16, width=16, output_type="pt"
    ).images
    return pictures


def trained(base: BaseModel) -> AdapterState:
    """A random adapter of all that diffusers' pipeline reads."""
    targets = ("attention+mlp", "text_encoder.attention", "text_encoder_2.attention+mlp")
    with Adapter.inject(base.roots, targets, LoraSettings(rank=4, alpha=2.0)) as adapter:
        with torch.no_grad():
            for number, parameter in enumerate(adapter.parameters()):
                parameter.copy_(
                    torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)) / 8
                )
        return adapter.state()


def test_diffusers_draws_ours_and_we_draw_diffusers(tmp_path: Path) -> None:
    from diffusers.utils.state_dict_utils import convert_state_dict_to_diffusers
    from peft.utils import get_peft_model_state_dict

    state = trained(FAMILIES.get("sd3").tiny(0))
    path = write(state, tmp_path / "ours")
    plain = FAMILIES.get("sd3").tiny(0)
    before = drawn(plain.pipeline())
    with Adapter.load(plain.roots, state, name="ours"):
        ours = drawn(plain.pipeline())
    theirs: Any = FAMILIES.get("sd3").tiny(0).pipeline()
    theirs.load_lora_weights(path.parent)
    torch.testing.assert_close(drawn(theirs), ours, atol=1e-5, rtol=1e-4)
    assert (ours - before).abs().max() > 1e-2
    # and back: what diffusers saves of it
    parts = {name: getattr(theirs, name) for name in ("transformer", "text_encoder", "text_encoder_2")}
    tensors = {
        n: convert_state_dict_to_diffusers(get_peft_model_state_dict(m, adapter_name="default_0"))
        for n, m in parts.items()
    }
    StableDiffusion3Pipeline.save_lora_weights(
        tmp_path / "theirs",
        transformer_lora_layers=tensors["transformer"],
        text_encoder_lora_layers=tensors["text_encoder"],
        text_encoder_2_lora_layers=tensors["text_encoder_2"],
        transformer_lora_adapter_metadata=parts["transformer"].peft_config["default_0"].to_dict(),
        text_encoder_lora_adapter_metadata=parts["text_encoder"].peft_config["default_0"].to_dict(),
        text_encoder_2_lora_adapter_metadata=parts["text_encoder_2"].peft_config["default_0"].to_dict(),
    )
    mine: Any = FAMILIES.get("sd3").tiny(0).pipeline()
    attached = load_adapter(mine, tmp_path / "theirs", quiet=True)
    assert attached.report.endswith("0 unused tensors")
    torch.testing.assert_close(drawn(mine), ours, atol=1e-5, rtol=1e-4)
    unload_adapters(mine)
    assert torch.equal(drawn(mine), before)


def test_every_dialect_holds_it_or_says_that_it_does_not(base: BaseModel, tmp_path: Path) -> None:
    state = trained(FAMILIES.get("sd3").tiny(0))
    able = []
    for name in CODECS:
        codec = CODECS.get(name)()
        if codec.obstacle(state) is not None:
            with pytest.raises(FormatError):
                codec.encode(state)
            continue
        able.append(name)
        assert read(write(state, tmp_path / name, name), layers_of(base.roots)).state.equal(state)
    assert "diffusers" in able


def test_words_come_with_their_adapter_and_a_plain_pipeline_says_how_to_spell_them(tmp_path: Path) -> None:
    base = FAMILIES.get("sd3").tiny(0)
    rows = {"text_encoder": torch.full((2, 24), 0.2), "text_encoder_2": torch.full((2, 32), 0.1)}
    state = replace(trained(base), tokens={"<fox>": TokenState(rows)})
    path = write(state, tmp_path / "words.safetensors", "diffusers")
    parts = base.pipeline().components
    plain = quiet(StableDiffusion3Pipeline(**{k: v for k, v in parts.items() if k in INIT}))
    with torch.no_grad():
        told = Session(base, [path])
        request = Request(prompt="a <fox>", steps=2, scheduler="FlowMatchEulerDiscreteScheduler")
        (ours,) = told.generate(request)
        told.close()
    attached = load_adapter(plain, path, quiet=True)
    assert any("write '<fox> <fox>_1' where you mean '<fox>'" in note for note in attached.notes)
    # the CLIPs read the tokens, T5 the word as it is written
    theirs = plain(
        "a <fox> <fox>_1",
        prompt_3="a <fox>",
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(0),
    ).images[0]
    assert np.abs(np.asarray(ours.image).astype(int) - np.asarray(theirs)).max() <= 1
    unload_adapters(plain)


@pytest.mark.parametrize("other", [family for family in FAMILIES if family != "sd3"])
def test_adapters_of_other_families_are_refused_in_one_line(
    base: BaseModel, other: str, tmp_path: Path
) -> None:
    stranger = FAMILIES.get(other).tiny(0)
    for one, another in ((base, stranger), (stranger, base)):
        with Adapter.inject(one.roots, "attention", LoraSettings(rank=2)) as adapter:
            with torch.no_grad():
                for parameter in adapter.parameters():
                    parameter.fill_(0.1)
            path = write(adapter.state(), tmp_path / one.family)
        with pytest.raises(FormatError, match=r"[Nn]ot applied") as caught:
            load_adapter(another.pipeline(), path, quiet=True)
        assert "\n" not in str(caught.value)
        if another is base:  # 3.5 medium's second attention is no cross-attention
            assert "Model: cross-attention" not in str(caught.value)


# -- drawing -------------------------------------------------------------------------------------------------


def error_in_db(one: Tensor, other: Tensor) -> float:
    return -10 * math.log10(max((one - other).square().mean().item(), 1e-12))


def test_a_session_draws_what_the_pipeline_draws(base: BaseModel) -> None:
    request = Request(prompt="a fox", steps=3, scheduler="FlowMatchEulerDiscreteScheduler", guidance=5.0)
    (drawing,) = Session(base).generate(request)
    theirs = quiet(base.pipeline())(
        "a fox", num_inference_steps=3, guidance_scale=5.0, generator=torch.Generator().manual_seed(0)
    ).images[0]
    assert drawing.settings["scheduler"] == "FlowMatchEulerDiscreteScheduler"
    ours, same = (torch.tensor(np.asarray(p)).float() / 255 for p in (drawing.image, theirs))
    assert error_in_db(ours, same) >= 50


def test_dpm_solver_comes_to_the_same_picture(base: BaseModel) -> None:
    """Two samplers of one differential equation meet where steps are small."""
    pipeline: Any = quiet(base.pipeline())
    own, found = pipeline.scheduler, {}
    solver = build_scheduler("DPMSolverMultistepScheduler", own)
    assert solver.config.flow_shift == 3.0 and solver.config.algorithm_type == "dpmsolver++"
    for name, scheduler, steps in (("exact", own, 40), ("dpm", solver, 14), ("rough", own, 5)):
        pipeline.scheduler = scheduler
        start = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(3))
        found[name] = pipeline(
            "a fox", num_inference_steps=steps, guidance_scale=1.0, latents=start, output_type="pt"
        ).images
    assert error_in_db(found["dpm"], found["exact"]) > max(30, error_in_db(found["rough"], found["exact"]))


@pytest.mark.parametrize("name", ["DDIMScheduler", "EulerAncestralDiscreteScheduler"])
def test_samplers_without_flow_are_refused(base: BaseModel, name: str) -> None:
    with pytest.raises(
        ModelError, match=r"no use_flow_sigmas.*Made for it: .*FlowMatchEulerDiscreteScheduler"
    ):
        build_scheduler(name, base.pipeline().scheduler)


# -- bases on disk -------------------------------------------------------------------------------------------


def index(folder: Path, **values: Any) -> None:
    path = folder / "model_index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def config(folder: Path, part: str, **values: Any) -> None:
    path = next(
        folder / part / name
        for name in ("config.json", "scheduler_config.json")
        if (folder / part / name).is_file()
    )
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_a_folder_gives_back_what_was_saved(saved: Path) -> None:
    tiny, loaded, facts = FAMILIES.get("sd3").tiny(3), load_base(saved, device="cpu"), describe_base(saved)
    assert (facts.family, facts.prediction, facts.resolution) == ("sd3", "flow", 16)
    assert (facts.size_multiple, facts.latent_factor, facts.latent_channels) == (4, 2, 16)
    assert loaded.prediction.shift == 3.0 and loaded.notes == ()
    said, same = (one.encode_prompts(["a fox"]) for one in (loaded, tiny))
    assert torch.equal(said.tokens, same.tokens) and torch.equal(said.pooled, same.pooled)  # type: ignore[arg-type]
    assert loaded.fingerprint() == tiny.fingerprint()
    assert len(load_tokenizers(saved)) == 2  # T5 learns no words, and reads more than the CLIPs


def test_a_base_without_t5_says_so_and_puts_zeros_there(folder: Path) -> None:
    index(folder, text_encoder_3=[None, None], tokenizer_3=[None, None])
    loaded = load_base(folder, device="cpu")
    assert "no T5" in loaded.notes[0]
    whole, said = (one.encode_prompts(["a fox"]).tokens for one in (FAMILIES.get("sd3").tiny(3), loaded))
    assert torch.equal(whole[:, :-READ], said[:, :-READ]) and not said[:, -READ:].any()
    theirs = loaded.pipeline().encode_prompt("a fox", None, None, device="cpu")[0]
    assert torch.equal(said, theirs)
    assert drawn(loaded.pipeline()).isfinite().all()


def refusal(folder: Path) -> str:
    with pytest.raises(ModelError) as caught:
        load_base(folder, device="cpu")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_missing_t5_is_named_with_the_way_out(folder: Path) -> None:
    shutil.rmtree(folder / "text_encoder_3")
    said = refusal(folder)
    assert "text_encoder_3/config.json" in said and "[null, null]" in said


def test_half_a_t5_is_named(folder: Path) -> None:
    index(folder, tokenizer_3=[None, None])
    assert "has text_encoder_3 (T5) and no tokenizer_3" in refusal(folder)


@pytest.mark.parametrize(
    ("part", "values", "said"),
    [
        ("text_encoder_3", {"d_model": 48}, "its T5 gives 48 numbers a token and its transformer takes 64"),
        ("text_encoder", {"projection_dim": 20}, "pooled embeddings have 20 + 40 numbers"),
        ("text_encoder_2", {"hidden_size": 96}, "its CLIPs give 24 + 96 numbers a token"),
        ("vae", {"latent_channels": 4}, "its VAE has 4 latent channels and its transformer takes 16"),
    ],
)
def test_parts_of_other_widths_are_refused(
    folder: Path, part: str, values: dict[str, Any], said: str
) -> None:
    config(folder, part, **values)
    found = refusal(folder)
    assert "don't belong together" in found and said in found


def test_another_prediction_can_not_be_asked_for(saved: Path) -> None:
    with pytest.raises(ModelError, match=r"predicts flow.*prediction = 'epsilon'"):
        load_base(saved, device="cpu", prediction="epsilon")


def test_a_strange_tokenizer_is_refused() -> None:
    parts = tiny_sd3(0)
    words = parts.tokenizers["tokenizer_2"]
    words.add_tokens([f"<{n}>" for n in range(9)])
    with pytest.raises(ModelError, match="tokenizer_2 of tiny-sd3 has 529 tokens and its text encoder 520"):
        SD3.load(replace(parts), dtype=torch.float32, device=torch.device("cpu"))


def test_half_precision_answers_like_full(base: BaseModel, batch: Batch) -> None:
    half = SD3.load(tiny_sd3(0), dtype=torch.bfloat16, device=torch.device("cpu"))
    assert half.encode_prompts(["a fox"]).tokens.dtype == torch.bfloat16
    assert (losses(half, batch) - losses(base, batch)).abs().max() < 0.1
    assert without_t5().encode_prompts(["a"]).tokens.shape == (1, 77 + READ, 64)
