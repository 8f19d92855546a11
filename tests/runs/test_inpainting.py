"""Runs on an inpainting base, whole: holes in training, previews, class pictures, and files that its pipeline loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import scumble
from scumble.inference.request import Request
from scumble.inference.session import Session
from tests.runs.worlds import cut_and_resumed, write_world
from tests.weight import weighed

PIPELINES = {"sd1": "StableDiffusionInpaintPipeline", "sdxl": "StableDiffusionXLInpaintPipeline"}
"""The family whose adapters a base takes -> the pipeline that paints with it."""


@pytest.fixture(scope="module", params=list(PIPELINES))
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def world(family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny inpainting base on disk, and four captioned pictures with masks."""
    folder = write_world(tmp_path_factory.mktemp("world"), 4, family=f"{family}-inpainting")
    (folder / "masks").mkdir()
    for number in range(4):
        mask = Image.new("L", (16, 16))
        mask.paste(255, (4, 0, 12, 8 + number))
        mask.save(folder / "masks" / f"{number}.png")
    return folder


def settings(world: Path, output: Path, **more: Any) -> dict[str, Any]:
    return {
        "base": str(world / "base"),
        "data": {"images": str(world / "pictures"), "held_out": 1},
        "output": output,
        "train": {"steps": 2, "batch": 1, "held_out_every": 2, "optimizer": {"learning_rate": 0.02}},
        "quiet": True,
        **more,
    }


def test_it_trains_and_its_pipeline_loads_the_file(family: str, world: Path, tmp_path: Path) -> None:
    import diffusers

    told = settings(world, tmp_path / "run", preview={"prompts": ["a colour"], "steps": 1})
    result = scumble.train(**told)
    assert result.reason == "complete" and result.difference == 0 and result.adapter is not None
    assert scumble.formats.read(result.adapter).state.metadata.base_family == family
    rows = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    assert any(row["event"] == "HeldOut" for row in rows)
    assert len(list((tmp_path / "run" / "previews").glob("*.png"))) == 2, "with and without: all is painted"

    image, mask = Image.open(world / "pictures" / "0.png"), Image.open(world / "masks" / "0.png")
    without = {"safety_checker": None} if family == "sd1" else {}
    pipeline: Any = getattr(diffusers, PIPELINES[family]).from_pretrained(world / "base", **without)
    pipeline.set_progress_bar_config(disable=True)

    pipeline.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)

    def draw() -> torch.Tensor:
        noise, size = torch.Generator().manual_seed(0), {"width": 16, "height": 16}
        asked = {"image": image, "mask_image": mask, "num_inference_steps": 2, "generator": noise, **size}
        asked["guidance_scale"] = 7.5
        return torch.as_tensor(pipeline("a colour", output_type="np", **asked).images[0])

    before = draw()
    pipeline.load_lora_weights(str(tmp_path / "run"))
    theirs = draw()
    assert not torch.equal(before, theirs)
    files = {"image": world / "pictures" / "0.png", "mask": world / "masks" / "0.png"}
    with Session(world / "base", [result.adapter], device="cpu") as session:
        (drawn,) = session.generate(Request(prompt="a colour", steps=2, **files))
    ours = torch.as_tensor(np.array(drawn.image)) / 255
    assert (ours - theirs).square().mean() < 1e-5, "PSNR above 50 dB"


@pytest.mark.parametrize("family", weighed(PIPELINES, None, ("sd1",)), indirect=True)
def test_a_resumed_run_sees_the_holes_of_an_uninterrupted_one(world: Path, tmp_path: Path) -> None:
    train = {"steps": 4, "batch": 1, "checkpoint_every": 2, "optimizer": {"learning_rate": 0.02}}
    cut_and_resumed(lambda run: settings(world, tmp_path / run, train=train))


def test_dreambooth_with_masks_draws_its_class_pictures_on_it(world: Path, tmp_path: Path) -> None:
    """Class pictures have no mask: they are woven with the subject's, each with a hole."""
    data = {"images": str(world / "pictures"), "masks": str(world / "masks")}
    options = {
        "instance_prompt": "a photo of sks dog",
        "class_prompt": "a dog",
        "class_count": 2,
        "class_steps": 1,
    }
    told = settings(
        world, tmp_path / "run", method="dreambooth", data=data, dreambooth={"prior": "images", **options}
    )
    told["train"] = {**told["train"], "held_out_every": 0}
    result = scumble.train(**told)
    assert result.reason == "complete" and result.difference == 0
    assert len(list((tmp_path / "run").rglob("class-*/*.png"))) == 2
