"""Runs over a base held in few bits: they train, prove themselves, resume, and their files act on any base."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest

import scumble
from scumble.errors import ConfigError, ModelError, ResumeError
from scumble.inference.session import Session
from tests.runs.worlds import short_run, write_world


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"))


settings = functools.partial(short_run, steps=3)


def test_a_run_over_a_quantised_base(world: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    result = scumble.train(
        **settings(world, out),
        train__quantization="nf4",
        train__checkpoint_every=2,
        train__gradient_checkpointing=True,
    )
    assert result.adapter is not None and result.reason == "complete"
    assert result.difference == 0, "the proof's fresh base is held as the one that trained"
    state = scumble.formats.read(result.adapter).state
    assert json.loads(state.metadata.settings)["train"]["quantization"] == "nf4"
    assert 'quantization = "nf4"' in (out / "README.md").read_text()
    with Session(str(world / "base"), [result.adapter], quantization="nf4") as session:
        assert session.residents[0].match.kinship == "exact"
        assert session._settings("x", (), None)["quantization"] == "nf4"
    with Session(str(world / "base"), [result.adapter]) as session:
        assert session.residents[0].match.kinship == "exact", "the same base, held otherwise"
    changed = settings(world, out)
    with pytest.raises(ResumeError, match="quantization"):
        scumble.train(**changed, train__checkpoint_every=2, resume="latest")


def test_eight_bit_means_resume_exactly(world: Path, tmp_path: Path) -> None:
    def told(run: str) -> dict[str, Any]:
        return {
            **settings(world, tmp_path / run, adapter={"rank": 64}),
            "train__quantization": "int8",
            "train__optimizer__name": "adamw8bit",
            "train__checkpoint_every": 2,
        }

    whole = scumble.train(**told("whole"))
    scumble.train(**told("cut"))
    (tmp_path / "cut" / "pytorch_lora_weights.safetensors").unlink()
    import shutil

    for later in (tmp_path / "cut").glob("checkpoint-000003"):
        shutil.rmtree(later)
    again = scumble.train(**told("cut"), resume="latest")
    assert whole.adapter and again.adapter and again.step == 3
    assert _tensors(whole.adapter) == _tensors(again.adapter)


def _tensors(path: Path) -> dict[str, bytes]:
    from safetensors.numpy import load_file

    return {name: tensor.tobytes() for name, tensor in load_file(path).items()}


def test_a_pipeline_of_a_quantised_base_takes_adapters(world: Path, tmp_path: Path) -> None:
    result = scumble.train(**settings(world, tmp_path / "run"))
    pipeline = scumble.load_base(str(world / "base"), device="cpu", quantization="int8").pipeline()
    report = scumble.load_adapter(pipeline, result.adapter)
    assert any("held in int8" in note for note in report.notes), "whether it is the same base can't be told"
    scumble.unload_adapters(pipeline)


def test_unknown_words_and_settings_without_effect_are_refused(world: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="int4"):
        scumble.train(**settings(world, tmp_path / "run"), train__quantization="int4")
    base = scumble.load_base(str(world / "base"), device="cpu")
    with pytest.raises(ModelError, match=r"quantization.*loaded already"):
        Session(base, quantization="int8")
