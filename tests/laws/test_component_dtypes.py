"""The laws of a dtype for each component: on every base family, whatever mix is asked for is kept, draws and trains."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from scumble.adapters import Adapter, LoraSettings
from scumble.adapters.algebra import merge
from scumble.inference.request import AdapterUse, Request
from scumble.inference.session import Session
from scumble.models import FAMILIES, load_base
from scumble.models.family import BaseModel, Frame
from scumble.models.tiny import save
from scumble.training.objective import ObjectiveSettings, denoising_loss
from tests.inference.makers import adapter_file, fill
from tests.training.world import LatentBatches

BF16, FP32 = torch.bfloat16, torch.float32
THOROUGH = (pytest.mark.slow, pytest.mark.thorough)
MIXES = ("texts", "vae", "denoiser", "one text")
QUICK = (("sd1", "texts"), ("sdxl", "one text"), ("sd3", "one text"), ("flux", "denoiser"))
"""What stands for every family with every mix in the quick tests."""
CASES = [
    pytest.param(family, mix, marks=() if (family, mix) in QUICK else THOROUGH, id=f"{family}-{mix}")
    for family in FAMILIES
    for mix in MIXES
]


class Folders(dict[str, Path]):
    """Family -> a tiny base of it on disk, written when it is asked for."""

    def __init__(self, place: Path) -> None:
        super().__init__()
        self.place = place

    def __missing__(self, family: str) -> Path:
        self[family] = save(family, self.place / family)
        return self[family]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return Folders(tmp_path_factory.mktemp("bases"))


def names_in(folder: Path) -> tuple[str, list[str]]:
    """(the denoiser, the text encoders), by name, of a base in diffusers' layout."""
    parts = [part.name for part in folder.iterdir() if part.is_dir()]
    denoiser = next(part for part in parts if part in ("unet", "transformer"))
    return denoiser, sorted(part for part in parts if part.startswith("text_encoder"))


def mixed(folder: Path, mix: str) -> tuple[BaseModel, dict[str, torch.dtype]]:
    """A base whose components differ, and what each should be in."""
    denoiser, texts = names_in(folder)
    common, own = {
        "texts": (FP32, dict.fromkeys(texts, "bf16")),
        "vae": (BF16, {"vae": "float32"}),
        "denoiser": (FP32, {denoiser: BF16}),
        "one text": (BF16, {texts[-1]: "fp32", "vae": FP32}),
    }[mix]
    named = {"bf16": BF16, "fp32": FP32, "float32": FP32}
    wanted = dict.fromkeys([denoiser, "vae", *texts], common)
    wanted |= {name: named.get(value, value) for name, value in own.items()}  # type: ignore[call-overload]
    return load_base(folder, dtype=common, dtypes=own, device="cpu"), wanted


def kept(base: BaseModel, name: str) -> set[torch.dtype]:
    module = base.modules().get(name, getattr(base, "t5", None))  # T5 waits until it is asked for
    assert module is not None
    return {parameter.dtype for parameter in module.parameters()}


@pytest.mark.parametrize(("family", "mix"), CASES)
def test_every_component_has_the_dtype_that_was_asked_for(folders: Folders, family: str, mix: str) -> None:
    base, wanted = mixed(folders[family], mix)
    assert {name: kept(base, name) for name in wanted} == {name: {dtype} for name, dtype in wanted.items()}
    assert {name: base.dtype_of(name) for name in wanted} == wanted
    assert base.dtype == wanted[next(iter(base.roots))]
    assert base.fingerprint() == load_base(folders[family], device="cpu").fingerprint()


def drawn(base: BaseModel, **more: Any) -> torch.Tensor:
    kind = "FlowMatchEulerDiscreteScheduler" if base.prediction.straight else "DDIMScheduler"
    with Session(base) as session:
        asked = Request(prompt="a fox", steps=3, scheduler=kind, guidance=3.0, width=16, height=16, **more)
        image = session.generate(asked)[0].image
    return torch.from_numpy(np.array(image)).double() / 255


def psnr(one: torch.Tensor, other: torch.Tensor) -> float:
    error = (one - other).square().mean().item()
    return math.inf if error == 0 else -10 * math.log10(error)


@pytest.mark.parametrize(("family", "mix"), CASES)
def test_it_draws_the_picture_of_fp32_also_with_an_adapter(
    folders: Folders, family: str, mix: str, tmp_path: Path
) -> None:
    file = adapter_file(tmp_path / "lora.safetensors", family=family)
    exact, (base, _) = load_base(folders[family], device="cpu"), mixed(folders[family], mix)
    for uses in ((), (AdapterUse(path=file, strength=0.5),)):
        assert psnr(drawn(base, adapters=uses), drawn(exact, adapters=uses)) > 30
    pipeline: Any = base.pipeline()
    pipeline.set_progress_bar_config(disable=True)
    whole = pipeline(  # with the pipeline's own decoding
        **base.asked(["a fox"], None, 3.0), **base.drawn_into(None, None, 1, (16, 16)), num_inference_steps=2,
        height=16, width=16, output_type="pt", generator=[torch.Generator().manual_seed(0)],
    ).images  # fmt: skip
    assert whole.dtype == base.dtype_of("vae") and whole.isfinite().all()


@pytest.mark.parametrize(("family", "mix"), [case for case in CASES if case.values[1] != "one text"])
def test_the_pipeline_hands_the_denoiser_what_encode_prompts_says(
    folders: Folders, family: str, mix: str
) -> None:
    base, _ = mixed(folders[family], mix)
    pipeline: Any = base.pipeline()
    told = {"prompt_2": None, "prompt_3": None, "device": "cpu", "num_images_per_prompt": 1}
    told["do_classifier_free_guidance"] = True
    taken = pipeline.encode_prompt.__wrapped__.__code__.co_varnames
    theirs = pipeline.encode_prompt(
        ["a fox"], **{name: value for name, value in told.items() if name in taken}
    )
    ours = base.encode_prompts(["a fox"])
    assert theirs[0].dtype == base.dtype and torch.equal(theirs[0], ours.tokens.to(base.dtype))
    assert all(part is None or part.dtype == base.dtype for part in theirs)


@pytest.mark.parametrize("precision", [None, BF16])
@pytest.mark.parametrize(("family", "mix"), CASES)
def test_a_step_trains_with_a_loss_close_to_fp32s(
    folders: Folders, family: str, mix: str, precision: torch.dtype | None
) -> None:
    losses = []
    for base in (load_base(folders[family], device="cpu"), mixed(folders[family], mix)[0]):
        batch = replace(LatentBatches(base).batch([0, 1]), conditioning=None)  # the text encoders train too
        noise = torch.randn(batch.latents.shape, generator=torch.Generator().manual_seed(1))
        t = base.prediction.from_uniform(torch.tensor([0.3, 0.7]))
        with Adapter.inject(base.roots, "attention", LoraSettings(rank=2)) as adapter:
            fill(adapter, 5, 0.05)
            exact = precision is None or not losses
            with torch.autocast("cpu", precision or BF16, enabled=not exact):
                loss = denoising_loss(base, batch, noise, t, ObjectiveSettings())
            loss.sum().backward()  # type: ignore[no-untyped-call]
            for name, parameter in adapter.named_parameters():
                assert parameter.dtype == FP32 and parameter.grad is not None, name
                assert parameter.grad.dtype == FP32 and parameter.grad.isfinite().all(), name
            losses.append(loss.detach())
    torch.testing.assert_close(losses[1], losses[0], rtol=0.02, atol=0)


@pytest.mark.parametrize(
    "family", ["sd1", *(pytest.param(f, marks=THOROUGH) for f in FAMILIES if f != "sd1")]
)
def test_a_component_in_fp32_computes_in_it_within_a_step_in_bf16(folders: Folders, family: str) -> None:
    denoiser, texts = names_in(folders[family])
    exact = load_base(folders[family], device="cpu")
    wide = load_base(
        folders[family], dtype=BF16, dtypes=dict.fromkeys([denoiser, *texts], "fp32"), device="cpu"
    )
    latents = torch.randn(2, exact.latent_channels, 4, 4, generator=torch.Generator().manual_seed(0))
    t, frame = exact.prediction.from_uniform(torch.tensor([0.2, 0.8])), Frame.plain(2, 8, 8)
    answers = []
    with torch.no_grad():
        for base, on in ((exact, False), (wide, True), (exact, True)):
            with torch.autocast("cpu", BF16, enabled=on):
                said = base.encode_prompts(["a fox", "a hen"])
                answers.append(base.denoise(latents, t, replace(said, shown=_shown(base, latents)), frame))
    assert torch.equal(answers[0], answers[1])  # autocast stops at the component
    assert not torch.equal(answers[0], answers[2])  # and reaches those that were asked for nothing


def _shown(base: BaseModel, latents: torch.Tensor) -> torch.Tensor | None:
    """What bases that fill holes are shown: not by their VAE, which stays in bf16."""
    return torch.ones(len(latents), base.shown_channels, 4, 4) if base.shown_channels else None


@pytest.mark.parametrize(("family", "mix"), CASES)
def test_adapters_merge_into_every_dtype_and_leave_no_trace(folders: Folders, family: str, mix: str) -> None:
    base, wanted = mixed(folders[family], mix)
    before = {name: [p.clone() for p in root.parameters()] for name, root in base.roots.items()}
    latents = torch.randn(1, base.latent_channels, 4, 4, generator=torch.Generator().manual_seed(0))
    t, frame = base.prediction.from_uniform(torch.tensor([0.5])), Frame.plain(1, 8, 8)

    def answer() -> torch.Tensor:
        with torch.no_grad():
            return base.denoise(latents, t, base.encode_prompts(["a fox"]), frame)

    bare = answer()
    adapter = fill(Adapter.inject(base.roots, "attention", LoraSettings(rank=2)), 3)
    beside = answer()
    merged = merge([adapter], base.roots)
    moved = (beside - bare).abs().max().item()
    assert (answer() - beside).abs().max().item() < 0.2 * moved  # rounded to the component's dtype
    assert all(kept(base, name) == {wanted[name]} for name in before)
    merged.undo()
    adapter.eject()
    assert torch.equal(answer(), bare)
    assert all(
        all(map(torch.equal, parameters, base.roots[name].parameters()))
        for name, parameters in before.items()
    )


@pytest.mark.parametrize(
    "family",
    ["sdxl-inpainting", *(pytest.param(f"sd{n}-inpainting", marks=THOROUGH) for n in (1, 2))],
)
def test_painting_into_a_picture_leaves_the_vae_as_it_was(
    folders: Folders, family: str, tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(tmp_path / "image.png")
    mask = Image.new("L", (16, 16))
    mask.paste(255, (4, 4, 12, 12))
    mask.save(tmp_path / "mask.png")
    into = {"image": tmp_path / "image.png", "mask": tmp_path / "mask.png"}
    exact, (base, _) = load_base(folders[family], device="cpu"), mixed(folders[family], "vae")
    before: Any = base.modules()["vae"].state_dict()
    before = {name: tensor.clone() for name, tensor in before.items()}
    assert psnr(drawn(base, **into), drawn(exact, **into)) > 35
    after = base.modules()["vae"].state_dict()
    # pipelines of SDXL convert a VAE back and forth: one in fp32 must not come back rounded
    assert all(tensor.dtype == FP32 and torch.equal(tensor, before[name]) for name, tensor in after.items())
