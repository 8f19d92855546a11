"""Inpainting bases: told by their channels, shown what the pipeline shows, and open to the other bases' adapters."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from scumble.adapters import FAMILIES as ADAPTERS
from scumble.adapters import Adapter
from scumble.adapters.state import Metadata
from scumble.errors import ModelError
from scumble.formats import write
from scumble.inference.session import Session
from scumble.models import FAMILIES, describe_base, load_base, tiny
from scumble.models.family import BaseModel, Conditioning, Frame
from scumble.models.inpainting import InpaintingBase
from tests.inference.makers import fill
from tests.models import original

FAMILY = pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])


@pytest.fixture(scope="module", params=["sd1", "sdxl"])
def base(request: pytest.FixtureRequest) -> BaseModel:
    return FAMILIES.get(f"{request.param}-inpainting").tiny(1)


def pictures(count: int = 2, side: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    """Random pixels in [-1, 1], and a hole that is another one in each."""
    pixels = torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1
    holes = torch.zeros(count, 1, side, side)
    for row in range(count):
        holes[row, :, 2 : 7 + 2 * row, 4:9] = 1
    return pixels, holes


@FAMILY
def test_the_channels_tell_it_from_its_text_to_image_neighbour(family: str, tmp_path: Path) -> None:
    folder = tiny.save(f"{family}-inpainting", tmp_path / "base", seed=3)
    facts = describe_base(folder)
    assert (facts.family, facts.adapters, facts.problems) == (f"{family}-inpainting", family, ())
    assert facts.latent_channels == 4 and facts.title.endswith("inpainting")
    loaded, built = load_base(folder, device="cpu"), FAMILIES.get(f"{family}-inpainting").tiny(3)
    assert isinstance(loaded, InpaintingBase) and loaded.family == family
    assert loaded.fingerprint() == built.fingerprint() and loaded.shown_channels == 5
    assert describe_base(tiny.save(family, tmp_path / "plain")).family == family


def test_a_pipeline_of_its_own_is_saved_and_told_by_its_parts(tmp_path: Path) -> None:
    """As the published SDXL one is: its index names another pipeline than that of SDXL, and its VAE widens in fp16."""
    folder = tiny.save("sdxl-inpainting", tmp_path / "base", seed=3)
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionXLInpaintPipeline"
    assert index["requires_aesthetics_score"] is False and index["force_zeros_for_empty_prompt"] is True
    loaded = load_base(folder, device="cpu")
    assert type(loaded.pipeline()).__name__ == index["_class_name"]
    assert not loaded.unconditional(1).tokens.any(), "guidance starts from zeros"


@FAMILY
@pytest.mark.parametrize(
    ("part", "values", "said"),
    [
        ("vae", {"latent_channels": 8}, "its VAE has 8 latent channels and its UNet takes 4"),
        ("unet", {"in_channels": 8}, "is an InstructPix2Pix model on Stable Diffusion"),
        ("text_encoder", {"hidden_size": 96}, "numbers a token and its UNet's cross-attention takes"),
        ("scheduler", {"prediction_type": "sample"}, "prediction_type"),
    ],
)
def test_what_is_no_inpainting_base_is_refused(
    family: str, part: str, values: dict[str, Any], said: str, tmp_path: Path
) -> None:
    folder = tiny.save(f"{family}-inpainting", tmp_path / "base")
    path = folder / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    with pytest.raises(ModelError, match=said) as caught:
        load_base(folder, device="cpu")
    assert "\n" not in str(caught.value)


@FAMILY
def test_a_single_file_of_nine_channels_loads(family: str, tmp_path: Path) -> None:
    stated = {"modelspec.prediction_type": "epsilon"}
    rows = 520
    tiny.tiny_tokenizer("!" if family == "sd2" else "<|endoftext|>").save_pretrained(tmp_path / "tokenizer")
    path = tmp_path / "inpainting.safetensors"
    if family == "sdxl":
        original.write_xl(path, stated, channels=9)
        unet = original.parts_xl(rows, channels=9)["unet"]
    else:
        original.write(path, family == "sd2", stated, channels=9)
        unet = original.parts(family == "sd2", rows, channels=9)[0]
    facts, loaded = describe_base(path), load_base(path, device="cpu")
    assert (facts.family, facts.adapters, facts.problems) == (f"{family}-inpainting", family, ())
    assert isinstance(loaded, InpaintingBase) and loaded.family == family
    here = loaded.unet.state_dict()
    assert here["conv_in.weight"].shape[1] == 9
    assert all(torch.equal(tensor, here[name]) for name, tensor in unet.state_dict().items())
    silent = original.write_xl(path, channels=9) if family == "sdxl" else None
    assert silent is None or load_base(silent, device="cpu").prediction.name in ("epsilon", "v_prediction")


def test_what_is_shown_is_what_the_pipeline_shows(base: BaseModel) -> None:
    """But for the pipeline's sampling from the VAE's posterior, whose mean is taken."""
    pixels, holes = pictures()
    pipeline: Any = base.pipeline()
    mask, latents = pipeline.prepare_mask_latents(
        holes, pixels * (holes < 0.5), 2, 16, 16, torch.float32, "cpu", None, False
    )
    with torch.no_grad():
        mean = (
            pipeline.vae.encode(pixels * (holes < 0.5)).latent_dist.mode()
            * pipeline.vae.config.scaling_factor
        )
    shown = base.show(pixels, holes)
    assert shown.shape == (2, base.shown_channels, 8, 8) and latents.shape == mean.shape
    assert torch.equal(shown[:, :1], mask) and torch.equal(shown[:, 1:], mean)
    other = pixels.clone()
    other[holes.expand_as(pixels) == 1] = 0.77
    assert torch.equal(base.show(other, holes), shown), "what is in the hole is not seen"


def test_the_denoiser_sees_noise_hole_and_picture_in_this_order(base: BaseModel) -> None:
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(4))
    t, said = torch.tensor([10, 700]), base.encode_prompts(["a", "b"])
    shown, frame = base.show(*pictures()), Frame.plain(2, 16, 16)
    assert isinstance(base, InpaintingBase)
    with torch.no_grad():
        ours = base.denoise(latents, t, replace(said, shown=shown), frame)
        theirs = base.denoiser(
            torch.cat([latents, shown], 1),
            t,
            encoder_hidden_states=said.tokens,
            added_cond_kwargs=base.told_besides(said, frame),
        ).sample
        blank = base.denoise(latents, t, said, frame)
        grey = base.show(torch.zeros(2, 3, 16, 16), torch.ones(2, 1, 16, 16))
        all_hole = base.denoise(latents, t, replace(said, shown=grey), frame)
    assert torch.equal(ours, theirs)
    torch.testing.assert_close(blank, all_hole)
    assert not torch.allclose(ours, blank)


def test_what_is_shown_goes_with_its_rows() -> None:
    one = Conditioning(torch.ones(2, 3, 4), shown=torch.zeros(2, 5, 8, 8))
    both = Conditioning.cat([one, one.map(lambda t: t + 1)])
    assert both.shown is not None and both[2:].shown is not None
    assert both.shown.shape == (4, 5, 8, 8) and (both[2:].shown == 1).all()
    assert one.to(dtype=torch.bfloat16).shown.dtype == torch.bfloat16  # type: ignore[union-attr]


@FAMILY
@pytest.mark.parametrize("kind", ADAPTERS.names())
def test_an_adapter_of_the_text_to_image_base_fits(family: str, kind: str, tmp_path: Path) -> None:
    """Every adapter family, by its file, on every linear layer."""
    plain, filling = FAMILIES.get(family).tiny(0), FAMILIES.get(f"{family}-inpainting").tiny(0)
    with Adapter.inject(plain.roots, "all-linear", ADAPTERS.get(kind).settings(rank=2)) as adapter:
        state = fill(adapter, seed=0, size=0.1).state(
            Metadata(base_name=plain.name, base_family=plain.family)
        )
    path = write(state, tmp_path / "a.safetensors")
    latents, frame = torch.ones(1, 4, 8, 8), Frame.plain(1, 16, 16)
    with torch.no_grad(), Session(filling, [path]) as session:
        (resident,) = session.residents
        assert len(resident.adapter) == len(state.layers)
        bare = filling.denoise(latents, torch.tensor([500]), filling.encode_prompts(["a"]), frame)
        resident.adapter.strength = 1.0
        acting = filling.denoise(latents, torch.tensor([500]), filling.encode_prompts(["a"]), frame)
    assert acting.isfinite().all() and not torch.equal(bare, acting)


def test_a_text_to_image_base_is_shown_nothing() -> None:
    base = FAMILIES.get("sd1").tiny()
    with pytest.raises(ModelError, match="tiny-sd1 draws from text alone"):
        base.show(*pictures())
    assert base.shown_channels == 0 and base.drawn_into(None, None, 1, (16, 16)) == {}


def test_a_whole_picture_is_the_pipelines_with_a_white_mask(base: BaseModel) -> None:
    """The law of drawing, in other words: given the same latents of nothing, the loop draws the pipeline's picture."""
    into = base.drawn_into(None, None, 1, (24, 16))
    assert into["mask_image"].getextrema() == (255, 255) and into["image"].size == (24, 16)
    nothing = base.show(torch.zeros(1, 3, 16, 24), torch.ones(1, 1, 16, 24))
    assert torch.equal(into["masked_image_latents"], nothing[:, 1:])
    assert math.isclose(float(nothing[:, :1].mean()), 1.0)
