"""Offload in whole runs: the bytes of a run without it, and refusals before anything is loaded. Copies on the host
stand for the device's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import scumble
from scumble.errors import ConfigError, ModelError
from scumble.inference.request import Request
from scumble.inference.session import Session
from scumble.models import loading, offload
from scumble.runs import build
from tests.models.test_offload import Recorder
from tests.runs.worlds import small_run, write_world


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"), count=4)


@pytest.fixture
def recorders(monkeypatch: pytest.MonkeyPatch) -> list[Recorder]:
    """One for each base that is loaded with its blocks on the host."""
    made: list[Recorder] = []

    def recorder(device: object) -> Recorder:
        made.append(Recorder())
        return made[-1]

    monkeypatch.setattr(offload, "CudaMover", recorder)
    for module in (loading, build):
        monkeypatch.setattr(module, "refuse_offload", lambda *_: None)
    return made


def told(world: Path, name: str, **train: Any) -> dict[str, Any]:
    steps = {"steps": 3, "batch": 2, "checkpoint_every": 2, "preview_every": 2}
    return small_run(world, name) | {"train": steps | train}


@pytest.mark.parametrize("others", [{}, {"gradient_checkpointing": True, "precision": "bf16"}])
def test_a_run_gives_the_bytes_of_one_whose_base_is_whole_on_the_device(
    world: Path, recorders: list[Recorder], others: dict[str, Any], tmp_path: Path
) -> None:
    names = [f"{name}-{len(others)}" for name in ("whole", "offloaded")]
    whole = scumble.train(**told(world, names[0], **others))
    assert not recorders
    found = scumble.train(**told(world, names[1], **others, offload="blocks"))
    assert found.adapter and whole.adapter
    ours, theirs = (scumble.formats.read(run.adapter).state for run in (found, whole))
    assert {path: layer for path, layer in ours.layers.items()}.keys() == theirs.layers.keys()
    for path, layer in ours.layers.items():
        assert all(
            (layer.tensors[name] == tensor).all() for name, tensor in theirs.layers[path].tensors.items()
        )
    assert [recorder.most for recorder in recorders] == [2, 2], (
        "the base that trains, and the fresh one of the proof"
    )
    for picture in ("000002-01.png", "base-01.png"):
        assert (found.folder / "previews" / picture).stat().st_size
        import numpy
        from PIL import Image

        one, other = (numpy.asarray(Image.open(run.folder / "previews" / picture)) for run in (found, whole))
        assert (one == other).all()


def test_pictures_are_those_of_a_base_that_is_whole_on_the_device(
    world: Path, recorders: list[Recorder]
) -> None:
    request = Request(prompt="a red fox", steps=2, count=3)
    with Session(world / "base", device="cpu") as session:
        plain = session.generate(request)
    with Session(world / "base", device="cpu", offload="blocks") as session:
        drawn = session.generate(request)
        assert [one.image.tobytes() for one in drawn] == [one.image.tobytes() for one in plain]
        with pytest.raises(ModelError, match="offload"):
            Session(session.base, offload="blocks")
    assert [recorder.most for recorder in recorders] == [2]


@pytest.mark.usefixtures("no_model")
def test_without_a_gpu_it_is_refused_before_anything_is_loaded(world: Path) -> None:
    with pytest.raises(ModelError, match=r"the computation is on cpu.*Leave it out"):
        scumble.train(**told(world, "refused", offload="blocks"))
    with pytest.raises(ModelError, match="the computation is on cpu"):
        Session(world / "base", device="cpu", offload="blocks")
    for engine in ("compile", "graph"):
        with pytest.raises(ConfigError, match="offload for memory"):
            scumble.train(**told(world, "refused", offload="blocks", engine=engine))
