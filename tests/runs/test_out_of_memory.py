"""Too little memory in whole runs: while loading, encoding and training; and what rests meanwhile."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import scumble
from scumble.errors import OutOfMemory
from scumble.models.latent_base import LatentBase
from scumble.models.unet import UNetBase
from scumble.runs import build
from scumble.training import loop
from tests.runs.worlds import small_run, write_world


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"), count=4)


def told(world: Path, name: str, **others: Any) -> dict[str, Any]:
    steps = {"steps": 4, "batch": 2, "checkpoint_every": 0, "preview_every": 2}
    return small_run(world, name) | {"train": steps} | others


def greedy(*_: Any, **__: Any) -> Any:
    return torch.empty(1 << 55, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("where", "name", "expected"),
    [
        (
            (LatentBase, "encode_images"),
            "pictures",
            r"while 0\.png was encoded at 16x16 pixels\. 33.*train.precision",
        ),
        ((UNetBase, "encode_prompts"), "captions", r"while the caption 'colour number 0' was encoded\. 33"),
        ((build, "load_base"), "loading", r"base was loaded\. 33.*train.quantization"),
    ],
)
def test_before_the_first_step_it_is_told_what_was_done(
    world: Path, monkeypatch: pytest.MonkeyPatch, where: tuple[Any, str], name: str, expected: str
) -> None:
    if name != "loading":
        monkeypatch.setattr(build, "check_prediction", lambda base: None)  # it reads a prompt of its own
    monkeypatch.setattr(*where, greedy)
    with pytest.raises(OutOfMemory, match=f"(?s)Out of memory {'while .*' * (name == 'loading')}{expected}"):
        scumble.train(**told(world, f"run-{name}"))


def test_while_it_trains_only_what_trains_is_there_and_previews_find_the_rest(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bases: list[Any] = []
    loaded = build.load_base
    monkeypatch.setattr(
        build, "load_base", lambda *given, **named: bases.append(loaded(*given, **named)) or bases[-1]
    )
    gradients, away = loop._gradients, list[tuple[bool, bool]]()

    def looking(*given: Any) -> Any:
        base = bases[0]
        parts = {"vae": base.vae, "text_encoder": base.text_encoder}
        there = [sum(p.untyped_storage().nbytes() for p in part.parameters()) for part in parts.values()]
        away.append((there[0] < 2000, there[1] < 2000))
        return gradients(*given)

    monkeypatch.setattr(loop, "_gradients", looking)
    resting = scumble.train(**told(world, "resting"))
    assert away == [(True, True)] * 4, "before the first preview and after it"
    with monkeypatch.context() as patched:
        patched.setattr(LatentBase, "rest", lambda base, **_: ())
        staying = scumble.train(**told(world, "staying"))
    assert resting.adapter and staying.adapter
    pictures = [(run.folder / "previews/000002-01.png").read_bytes()[-500:] for run in (resting, staying)]
    assert pictures[0] == pictures[1]
    ours, theirs = (scumble.formats.read(run.adapter).state for run in (resting, staying))
    for path, layer in ours.layers.items():
        assert all(
            (layer.tensors[name] == tensor).all() for name, tensor in theirs.layers[path].tensors.items()
        )
    away.clear()
    bases.clear()
    words = {"text_to_image": {"train_text_encoder": True}}
    scumble.train(**told(world, "words"), **words)
    assert away == [(True, False)] * 4, "a text encoder that trains stays"


def test_a_run_that_was_stopped_by_it_goes_on(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = scumble.train(**told(world, "whole"))
    denoise = UNetBase.denoise

    def tight(base: Any, latents: Any, *others: Any) -> Any:
        if torch.is_grad_enabled():
            steps.append(1)
            if len(steps) == 3:
                greedy()
        return denoise(base, latents, *others)

    steps: list[int] = []
    with (
        monkeypatch.context() as patched,
        pytest.raises(OutOfMemory, match=r"of step 3.*All up to step 2 is kept"),
    ):
        patched.setattr(UNetBase, "denoise", tight)
        scumble.train(**told(world, "broken"))
    done = scumble.train(world / "broken/run.toml", resume="latest", quiet=True)
    assert done.adapter and whole.adapter and done.step == 4
    ours, theirs = (scumble.formats.read(run.adapter).state for run in (done, whole))
    for path, layer in ours.layers.items():
        assert all(
            (layer.tensors[name] == tensor).all() for name, tensor in theirs.layers[path].tensors.items()
        )
