"""Painting into a picture: what StableDiffusionInpaintPipeline paints, and what is refused before it."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from PIL import Image
from typer.testing import CliRunner

from scumble.cli.generate import generate
from scumble.errors import ConfigError, DataError, ModelError
from scumble.inference.canvas import canvas_of
from scumble.inference.png import read_record, read_settings
from scumble.inference.request import Request
from scumble.inference.session import Session
from scumble.models.tiny import save
from tests.inference.makers import tiny


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """A picture of 24x16 pixels, a mask with a white middle, and what can't be used."""
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (16, 24, 3), dtype=np.uint8)).save(tmp_path / "image.png")
    mask = Image.new("L", (24, 16))
    mask.paste(255, (6, 4, 18, 12))
    mask.save(tmp_path / "mask.png")
    mask.resize((16, 16)).save(tmp_path / "small.png")
    Image.new("L", (24, 16)).save(tmp_path / "black.png")
    (tmp_path / "text.png").write_text("no picture")
    return {path.stem: path for path in tmp_path.iterdir()}


def request(files: dict[str, Path], **more: Any) -> Request:
    told = {"prompt": "a fox", "steps": 3, "image": files["image"], "mask": files["mask"]}
    return Request(**{**told, **more})


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image, dtype=np.float64) / 255


def psnr(one: Image.Image, other: Image.Image) -> float:
    error = float(((pixels(one) - pixels(other)) ** 2).mean())
    return math.inf if error == 0 else -10 * math.log10(error)


@pytest.mark.parametrize("family", ["sd1-inpainting", "sd2-inpainting", "sdxl-inpainting"])
@pytest.mark.parametrize("size", [None, (16, 32)])
def test_it_is_the_pipelines_picture(
    family: str, size: tuple[int, int] | None, files: dict[str, Path]
) -> None:
    base = tiny(family)
    pipeline: Any = base.pipeline()
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    width, height = size or (24, 16)
    theirs = pipeline(
        "a fox",
        image=Image.open(files["image"]),
        mask_image=Image.open(files["mask"]),
        num_inference_steps=3,
        guidance_scale=7.5,
        width=width,
        height=height,
        generator=torch.Generator().manual_seed(5),
    ).images[0]
    sides = {} if size is None else {"width": width, "height": height}
    with Session(base) as session:
        (ours,) = session.generate(request(files, seed=5, **sides))
        kept = session.generate(request(files, seed=5, mask=files["mask"], prompt="a dog", **sides))[0]
    assert ours.image.size == theirs.size == (width, height)
    assert psnr(ours.image, theirs) >= 50
    assert pixels(theirs).std() > 0.01 and psnr(ours.image, kept.image) < 50


BOTH = pytest.mark.parametrize("family", ["sd1-inpainting", "sdxl-inpainting"])


@BOTH
def test_a_picture_does_not_depend_on_its_batch(family: str, files: dict[str, Path]) -> None:
    with Session(tiny(family), batch_size=2) as session:
        together = session.generate(request(files, seed=3, count=2))
        alone = session.generate(request(files, seed=4))[0]
    assert psnr(together[1].image, alone.image) >= 50
    assert psnr(together[0].image, alone.image) < 50


@BOTH
def test_without_a_picture_all_of_it_is_painted(family: str) -> None:
    """Previews and class pictures of an inpainting base are asked for by a prompt alone."""
    base = tiny(family)
    pipeline: Any = base.pipeline()
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    theirs = pipeline(
        "a fox",
        num_inference_steps=3,
        generator=torch.Generator().manual_seed(0),
        **base.drawn_into(None, None, 1, (16, 16)),
    ).images[0]
    with Session(base) as session:
        (ours,) = session.generate(Request(prompt="a fox", steps=3))
    assert ours.image.size == (16, 16) and psnr(ours.image, theirs) >= 50


def test_a_step_that_the_pipeline_leaves_out_is_not_the_only_one(files: dict[str, Path]) -> None:
    """SDXL's begins with the picture under almost nothing but noise, after the first step."""
    told: list[tuple[int, int]] = []
    with Session(tiny("sdxl-inpainting")) as session:
        with pytest.raises(
            ModelError, match=r"steps = 1 is too few for tiny-sdxl-inpainting .* Take 2 or more"
        ):
            session.generate(request(files, steps=1))
        session.generate(request(files, steps=2), lambda *done: told.append(done))
        assert session.generate(Request(prompt="a fox", steps=1))
    assert told[-1] == (2, 2)


WRONG: dict[str, tuple[dict[str, str | None], type[Exception], str]] = {
    "no mask": ({"mask": None}, ConfigError, r"image = .*image\.png is given without mask: a grey picture"),
    "no image": ({"image": None}, ConfigError, r"is given without image: the picture to paint into"),
    "two sizes": (
        {"mask": "small"},
        DataError,
        r"small\.png is 16x16 pixels and .*image\.png 24x16\. Make both",
    ),
    "a black mask": ({"mask": "black"}, DataError, r"black\.png is nowhere white"),
    "no picture": ({"image": "text"}, DataError, r"text\.png can't be read as a picture"),
    "no file": ({"image": "gone"}, DataError, r"There is no picture '.*gone"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_can_not_be_painted_into_is_refused(case: str, files: dict[str, Path]) -> None:
    changes, error, said = WRONG[case]
    gone = files["image"].with_name("gone.png")
    told = {name: None if which is None else files.get(which, gone) for name, which in changes.items()}
    with pytest.raises(error, match=said):
        canvas_of(request(files, **told))


def test_a_text_to_image_base_does_not_paint_into_pictures(files: dict[str, Path]) -> None:
    with Session(tiny()) as session, pytest.raises(ModelError, match="tiny-sd1 draws from text alone"):
        session.generate(request(files))
    odd = Image.new("RGB", (20, 20))
    odd.save(files["image"])
    odd.convert("L").point(lambda _: 255).save(files["mask"])
    with Session(tiny("sd1-inpainting")) as session, pytest.raises(ModelError, match="Nearest: 16 or 24"):
        session.generate(request(files))


def run(*arguments: object) -> Any:
    import typer

    app = typer.Typer()
    app.command()(generate)
    return CliRunner().invoke(app, [str(item) for item in arguments])


def test_the_command_paints_and_says_into_what(
    files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save("sd1-inpainting", tmp_path / "base")
    told = ["a fox", "--base", tmp_path / "base", "--image", files["image"], "--steps", 2, "--device", "cpu"]
    done = run(*told, "--mask", files["mask"], "--out", tmp_path / "out.png")
    assert done.exit_code == 0, done.output
    drawn, said = Image.open(tmp_path / "out.png"), read_settings(tmp_path / "out.png")
    assert drawn.size == (24, 16) and (said.image, said.mask) == (files["image"], files["mask"])
    into = read_record(tmp_path / "out.png")["drawn"]["painted into"]
    assert into[str(files["mask"])] == hashlib.sha256(files["mask"].read_bytes()).hexdigest()

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a base was loaded")

    monkeypatch.setattr("scumble.inference.session.load_base", refuse)
    done = run(*told)
    assert isinstance(done.exception, ConfigError) and "without mask" in str(done.exception)
