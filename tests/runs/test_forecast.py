"""Forecast: every method can be played before its base is read, and what a run takes is told moment by moment."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import scumble
from scumble.runs.config import RunConfig
from scumble.runs.forecast import Forecast, Forecaster
from tests.runs.worlds import write_world

METHODS: dict[str, dict[str, Any]] = {
    "text-to-image": {"text_to_image": {"train_text_encoder": True, "text_encoder_until": 0.5}},
    "dreambooth": {
        "dreambooth": {
            "instance_prompt": "a sks",
            "prior": "images",
            "class_prompt": "a dog",
            "class_count": 2,
        }
    },
    "textual-inversion": {"textual_inversion": {"placeholders": ["<it>"]}},
    "pivotal": {"pivotal": {"placeholders": ["<it>"], "inversion_steps": 2}},
    "slider": {"slider": {"positive": "big", "negative": "small", "neutral": "a fox"}},
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("forecast"), 2)


def config(world: Path, method: str = "text-to-image", **told: Any) -> RunConfig:
    data = {} if method == "slider" else {"data": {"images": str(world / "pictures"), "resolution": 16}}
    return RunConfig(
        **{"base": str(world / "base"), "output": world / "run", "method": method, "device": "cpu"}
        | data
        | told
    )


def sizes(forecast: Forecast, moment: str) -> dict[str, int]:
    (found,) = (each for each in forecast.moments if each.name == moment)
    return {share.name: share.size for share in found.shares}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_played_without_its_base(
    world: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from scumble.models import loading

    monkeypatch.setattr(loading, "load_base", lambda *_, **__: pytest.fail("the base was read"))
    told = {"train": {"batch": 2, "steps": 6}, "preview": {"prompts": ["a fox"], "steps": 2}}
    forecast = Forecaster(config(world, method, **METHODS[method], **told)).forecast()
    names = [moment.name for moment in forecast.moments]
    assert names[0] == "loading" and names[-1] == "proof" and "previews" in names
    assert any(name.startswith("training") for name in names)
    assert ("class pictures" in names) == (method == "dreambooth")
    assert forecast.peak.total == max(moment.total for moment in forecast.moments)
    assert sum(work.times for work in forecast.work if work.name.startswith("training")) == 6
    assert all(work.flops > 0 for work in forecast.work) and forecast.fits


def test_shares_are_what_the_base_and_the_adapter_take(world: Path) -> None:
    base = scumble.load_base(world / "base")
    weights = {
        name: sum(t.numel() * t.element_size() for t in (*m.parameters(), *m.buffers()))
        for name, m in base.modules().items()
    }
    forecast = Forecaster(config(world, train={"ema": 0.9, "batch": 1})).forecast()
    shares = sizes(forecast, "training")
    assert shares["unet"] == weights["unet"]
    assert not {"vae", "text_encoder"} & shares.keys(), "they rest while what they said is cached"
    assert {name: sizes(forecast, "encoding")[name] for name in weights} == weights
    trained = shares["what trains"]
    assert shares["gradients"] == shares["its running mean"] == trained > 0
    assert shares["optimizer"] == pytest.approx(2 * trained, rel=0.01)  # Adam's two means
    halves = sizes(Forecaster(config(world, train={"precision": "bf16"})).forecast(), "training")
    assert halves["unet"] == pytest.approx(weights["unet"] / 2, rel=0.02)
    assert sizes(forecast, "proof").keys() >= weights.keys()
    assert sum(sizes(forecast, "proof")[name] for name in weights) == sum(weights.values()), "never two bases"


def test_two_pictures_at_once_take_twice_the_activations(world: Path) -> None:
    one, two = (
        sizes(Forecaster(config(world, train={"batch": batch})).forecast(), "training")["activations"]
        for batch in (1, 2)
    )
    assert two == pytest.approx(2 * one, rel=0.1)


def test_previews_are_drawn_one_at_a_time(world: Path) -> None:
    def drawn(count: int) -> int:
        preview = {"prompts": ["a fox"] * count, "count": count}
        return sizes(Forecaster(config(world, preview=preview)).forecast(), "previews")["activations"]

    assert drawn(1) == drawn(4)


def test_the_proof_loads_a_base_when_the_trained_one_is_gone(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from scumble.models.family import BaseModel
    from scumble.runs import build

    loaded: list[BaseModel] = []
    left: list[int] = []
    own = build.load_base

    def watched(*given: Any, **told: Any) -> BaseModel:
        left.extend(
            sum(p.numel() for p in base.denoiser.parameters() if not p.requires_grad) for base in loaded
        )
        loaded.append(own(*given, **told))
        return loaded[-1]

    monkeypatch.setattr(build, "load_base", watched)
    told = config(world, train={"steps": 1, "batch": 1}).model_copy(update={"output": tmp_path / "run"})
    result = scumble.train(told, quiet=True)  # type: ignore[attr-defined]
    assert len(loaded) == 2 and left == [0] and result.difference == 0


def test_a_plan_tells_memory_and_time_and_leaves_nothing(world: Path) -> None:
    before = sorted(world.rglob("*"))
    outlook = scumble.plan(  # type: ignore[attr-defined]
        base=str(world / "base"),
        output=world / "run",
        device="cpu",
        data={"images": str(world / "pictures"), "resolution": 16},
        train={"steps": 40, "batch": 1},
        steps=2,
    )
    assert outlook.forecast is not None and outlook.fits and not outlook.ways
    assert outlook.pace is not None and outlook.pace.steps == 2 and outlook.pace.step > 0
    assert outlook.seconds["training"] == pytest.approx(40 * outlook.pace.step)
    assert outlook.facts["parameters"] > 0
    assert sorted(world.rglob("*")) == before


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="no high-water mark of memory here")
def test_predicted_is_measured(tmp_path: Path) -> None:
    script = Path(__file__).parents[2] / "benchmarks" / "plan.py"
    out = tmp_path / "plan.json"
    command = [sys.executable, str(script), "--tiny", "--output", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "predicted" in done.stdout and out.is_file()
