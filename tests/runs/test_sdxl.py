"""Whole runs on Stable Diffusion XL: every method, both text encoders, a kept cache, and what becomes of the result."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

import scumble
from scumble.formats import read
from scumble.inference.request import AdapterUse, Request
from scumble.inference.session import Session
from tests.runs.worlds import write_world
from tests.weight import weighed

WORD = {"placeholders": "<fox>", "vectors": 2}
METHODS: dict[str, dict[str, Any]] = {
    "text-to-image": {"train_text_encoder": True},
    "dreambooth": {
        "instance_prompt": "a sks colour",
        "class_prompt": "a colour",
        "prior": "images",
        "class_count": 2,
        "class_steps": 2,
        "train_text_encoder": True,
    },
    "textual-inversion": WORD,
    "pivotal": {**WORD, "inversion_steps": 2, "train_text_encoder": True},
    "slider": {
        "positive": "a big fox",
        "negative": "a small fox",
        "neutral": "a fox",
        "paths": 2,
        "path_steps": 2,
    },
}
QUICK = "text-to-image"
"""The method that stands for all in the quick tests."""
STANDING = ("textual-inversion", "pivotal")
"""Methods that stand for the others where time is: their words have rows in both text encoders."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny SDXL on disk, and four captioned pictures of four shapes."""
    return write_world(tmp_path_factory.mktemp("world"), 4, family="sdxl", size=(20, 18), wider=6)


@pytest.mark.parametrize("method", weighed(METHODS, QUICK, STANDING))
def test_it_trains_is_proven_resumes_and_draws(world: Path, tmp_path: Path, method: str) -> None:
    section, pictures = method.replace("-", "_"), method != "slider"
    lora = method != "textual-inversion"
    settings: dict[str, Any] = {
        "base": str(world / "base"),
        "method": method,
        section: METHODS[method],
        "train": {"steps": 4, "batch": 2, "checkpoint_every": 2, "optimizer": {"learning_rate": 0.01}},
        "quiet": True,
        **({"data": {"images": str(world / "pictures"), "resolution": 16}} if pictures else {}),
        **({"save": {"also": ["kohya"]}} if method == QUICK else {}),
    }
    whole = scumble.train(**settings, output=tmp_path / "whole")
    assert whole.reason == "complete" and whole.difference is not None and whole.difference <= 1e-5
    found = read(whole.adapter)
    roots = {path.partition(".")[0] for path in found.state.layers}
    both = {"text_encoder", "text_encoder_2"}
    if lora:
        assert roots == ({"unet"} if method == "slider" else {"unet", *both})
    for token in found.state.tokens.values():
        assert token.vectors.keys() == both
    assert bool(found.state.tokens) == ("placeholders" in METHODS[method])
    if method == QUICK:
        also = read(
            whole.adapter.with_name("pytorch_lora_weights_kohya.safetensors"), list(found.state.layers)
        )
        assert also.dialect == "kohya" and also.state.layers.keys() == found.state.layers.keys()
    # as if it had been killed after the second step, and resumed
    whole.adapter.unlink()
    shutil.rmtree(whole.folder / "checkpoint-000004")
    again = scumble.train(whole.folder / "run.toml", resume="latest", quiet=True)
    assert again.adapter == whole.adapter and read(again.adapter).state.equal(found.state)
    request = Request(prompt="a <fox> colour", steps=2, width=16, height=16, seed=1)
    with Session(str(world / "base"), device="cpu") as session:
        bare = session.generate(request)[0].image.tobytes()
        use = request.model_copy(update={"adapters": (AdapterUse(path=whole.adapter),)})
        assert session.generate(use)[0].image.tobytes() != bare
        assert session.generate(request)[0].image.tobytes() == bare


@pytest.mark.slow
def test_it_is_evaluated(world: Path, tmp_path: Path) -> None:
    from scumble.evaluation.evaluate import evaluate
    from scumble.evaluation.result import EvaluationSettings
    from tests.evaluation.test_evaluate import BrightEye

    run = scumble.train(
        base=str(world / "base"),
        data={"images": str(world / "pictures"), "resolution": 16},
        output=tmp_path / "run",
        train={"steps": 2, "batch": 2, "optimizer": {"learning_rate": 0.01}},
        quiet=True,
    )
    few = EvaluationSettings(pictures=2, seeds=1, unrelated=1, steps=1, resamples=100)
    found = evaluate(run.folder, settings=few, subject="a colour", device="cpu", eye=BrightEye())
    assert found.page.is_file() and len(found.judged) == 1
