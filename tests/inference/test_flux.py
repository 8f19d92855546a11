"""Drawing with Flux.1: packed latents, a guidance that is told, and a negative prompt all the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from scumble.adapters import Adapter, LoraSettings
from scumble.formats import write
from scumble.inference.request import AdapterUse, Request
from scumble.inference.session import Session
from scumble.models import FAMILIES
from scumble.models.family import BaseModel

FOX = Request(prompt="a fox", steps=3, seed=5, scheduler="FlowMatchEulerDiscreteScheduler")


@pytest.fixture(scope="module")
def base() -> BaseModel:
    return FAMILIES.get("flux").tiny(1)


def levels(image: Image.Image) -> np.ndarray:
    return np.asarray(image, dtype=np.float32)


def test_a_picture_is_the_pipelines(base: BaseModel) -> None:
    (drawing,) = Session(base).generate(FOX)
    assert drawing.request.guidance == 3.5, "nobody said one: it is the base's own"
    pipeline = base.pipeline()
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(  # type: ignore[operator]
        "a fox",
        num_inference_steps=3,
        guidance_scale=3.5,
        width=16,
        height=16,
        generator=torch.Generator().manual_seed(5),
    ).images[0]
    error = np.square(levels(drawing.image) - levels(theirs)).mean()
    assert drawing.image.size == (16, 16) and (error == 0 or 10 * np.log10(255**2 / error) >= 50)


def test_sizes_guidance_negatives_and_adapters_reach_the_picture(base: BaseModel, tmp_path: Path) -> None:
    with Adapter.inject(base.roots, "attention+mlp", LoraSettings(rank=2)) as adapter:
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter.add_(0.1)
        path = write(adapter.state(), tmp_path / "fox.safetensors", "diffusers")
    with Session(base) as session:

        def draw(**how: object) -> Image.Image:
            return session.generate(FOX.model_copy(update=how))[0].image

        plain = draw()
        assert draw(width=24, height=16).size == (24, 16)
        for how in ({"guidance": 8.0}, {"negative": "rain"}, {"adapters": (AdapterUse(path=path),)}):
            assert np.abs(levels(draw(**how)) - levels(plain)).max() > 0, how
        off = draw(adapters=(AdapterUse(path=path, strength=0.0),))
        assert np.array_equal(levels(off), levels(plain))
        assert np.array_equal(levels(draw(count=1)), levels(plain))
