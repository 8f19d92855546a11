"""Every adapter family through a whole run: it trains, saves, is proven, resumes, and acts in a fresh pipeline."""

from __future__ import annotations

from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest

import scumble
from scumble.adapters import FAMILIES
from scumble.errors import ConfigError, ResumeError
from scumble.formats import read
from scumble.runs.folder import RunFolder
from tests.runs.worlds import write_world
from tests.weight import weighed


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny base on disk, and four captioned pictures."""
    return write_world(tmp_path_factory.mktemp("world"), 4)


def settings(world: Path, output: Path, family: str, **train: Any) -> dict[str, Any]:
    return {
        "base": str(world / "base"),
        "data": {"images": str(world / "pictures")},
        "output": output,
        "adapter": {"family": family, "targets": ["attention", "conv"]},
        "train": {"steps": 4, "batch": 2, "optimizer": {"learning_rate": 0.01}, **train},
        "quiet": True,
    }


QUICK = "lokr"
"""The family that stands for all in the quick tests."""
STANDING = ("lora", "dora", "full")
"""Families that stand for the others where time is: products, a norm over the base's weights, whole weights."""


@pytest.mark.parametrize("family", weighed(FAMILIES, QUICK, STANDING))
def test_it_trains_is_proven_and_resumes_to_the_same_file(world: Path, tmp_path: Path, family: str) -> None:
    whole = scumble.train(**settings(world, tmp_path / "whole", family))
    assert (whole.reason, whole.step) == ("complete", 4) and whole.difference is not None
    assert whole.difference <= 1e-5  # a fresh base with the file on disk, against the live model
    found = read(whole.adapter)
    state, card = found.state, (tmp_path / "whole" / "README.md").read_text()
    way = "scumble.load_adapter(" if found.dialect == "lycoris" else "pipeline.load_lora_weights("
    assert way in card
    assert {layer.family for layer in state.layers.values()} == {family}
    half = settings(world, tmp_path / "half", family, checkpoint_every=2)
    scumble.train(**half | {"train": half["train"] | {"steps": 2, "schedule": {"name": "constant"}}})
    resumed = scumble.train(
        tmp_path / "half" / "run.toml", "train.steps=4", resume="latest", accept_changes=True, quiet=True
    )
    assert resumed.step == 4 and read(resumed.adapter).state.equal(state)


def test_another_family_is_no_continuation(world: Path, tmp_path: Path) -> None:
    scumble.train(**settings(world, tmp_path / "run", "lora", steps=2, checkpoint_every=2))
    with pytest.raises(ResumeError, match="family"):
        scumble.train(
            tmp_path / "run" / "run.toml",
            "adapter.family=dora",
            "train.steps=4",
            resume="latest",
            quiet=True,
        )


def test_a_dialect_that_cannot_hold_the_family_is_refused_before_training(
    world: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"save\.dialect.*loha.*lycoris"):
        scumble.train(**settings(world, tmp_path / "run", "loha", steps=2), save__dialect="diffusers")
    assert not (tmp_path / "run" / "checkpoint-000002").exists()
    with pytest.raises(ConfigError, match=r"save\.also.*kohya.*loha"):
        scumble.train(**settings(world, tmp_path / "two", "loha", steps=2), save__also=["peft", "kohya"])
    assert not (tmp_path / "two" / "checkpoint-000002").exists()


def test_a_folder_of_another_dialect_lies_beside_the_file_and_is_published(
    world: Path, tmp_path: Path
) -> None:
    result = scumble.train(**settings(world, tmp_path / "run", "lokr", steps=2), save__also=["peft"])
    assert result.adapter is not None
    folder = tmp_path / "run" / f"{result.adapter.stem}_peft"
    assert read(folder).state.equal(read(result.adapter).state)
    name = (folder / "adapter_config.json").relative_to(tmp_path / "run").as_posix()
    assert any(fnmatch(name, pattern) for pattern in RunFolder(tmp_path / "run").published())
    assert folder in RunFolder(tmp_path / "run").results()
