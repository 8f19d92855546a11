"""Whole runs on a tiny base, offline: what is refused before a model is loaded, and what a run leaves."""

from __future__ import annotations

import functools
import json
import re
import socket
from pathlib import Path
from typing import Any

import pytest

import scumble
from scumble.errors import ConfigError, DataError, ModelError, NoLayerMatches, PrecisionError
from scumble.runs.folder import Layout
from scumble.runs.load import load
from tests.runs.worlds import cut_and_resumed, drawn_by_diffusers, short_run, write_world


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny base on disk, and six captioned pictures."""
    return write_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any connection to the outside is an error: a local base and local pictures need none."""
    connect = socket.socket.connect

    def only_here(self: socket.socket, address: Any) -> None:
        if isinstance(address, tuple) and address[0] not in ("127.0.0.1", "localhost"):
            raise AssertionError(f"a connection to {address} was tried")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", only_here)


settings = functools.partial(short_run, steps=4)


def test_a_run_leaves_everything_in_its_folder(world: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    result = scumble.train(
        **settings(world, out, preview={"prompts": ["a colour"], "steps": 2}, trackers=["tensorboard"]),
        train__checkpoint_every=2,
        train__held_out_every=2,
        data__held_out=2,
    )
    assert (result.reason, result.step, result.exit_code, result.folder) == ("complete", 4, 0, out)
    assert result.adapter == out / "pytorch_lora_weights.safetensors" and result.difference == 0
    names = {path.name for path in out.iterdir()}
    assert names == {
        *("pytorch_lora_weights.safetensors", "README.md", "report.html", "run.toml", "events.jsonl"),
        *("checkpoint-000002", "checkpoint-000004", "previews", "tensorboard", "best"),
    }
    resolved = load(out / "run.toml")
    assert (resolved.train.steps, resolved.output) == (4, out)
    card = (out / "README.md").read_text()
    assert "| optimizer steps | 4 |" in card and "held-out loss" in card and "learning_rate = 0.01" in card
    shown = [line for line in card.splitlines() if "](previews/" in line]
    assert len(shown) == 1
    for part in shown[0].split("](")[1:]:
        assert (out / part.split(")")[0]).is_file()
    events = [json.loads(line)["event"] for line in (out / "events.jsonl").read_text().splitlines()]
    assert events[0] == "Started" and events[-1] == "Finished" and events.count("StepDone") == 4


def test_the_file_acts_in_unmodified_diffusers(world: Path, tmp_path: Path) -> None:
    import torch

    scumble.train(**settings(world, tmp_path / "run"))
    bare, taught = (drawn_by_diffusers(world / "base", adapter) for adapter in (None, tmp_path / "run"))
    assert not torch.equal(bare, taught)


@pytest.mark.slow
def test_a_resumed_run_gives_the_file_of_an_uninterrupted_one(world: Path, tmp_path: Path) -> None:
    cut_and_resumed(lambda run: {**settings(world, tmp_path / run), "train__checkpoint_every": 2})


@pytest.mark.slow
def test_a_folder_with_a_run_is_refused_or_overwritten(world: Path, tmp_path: Path) -> None:
    scumble.train(**settings(world, tmp_path / "run"), train__checkpoint_every=2)
    with pytest.raises(ConfigError, match="already holds"):
        scumble.train(**settings(world, tmp_path / "run"))
    scumble.train(
        **settings(world, tmp_path / "run"), train__steps=2, train__checkpoint_every=0, overwrite=True
    )
    assert not list((tmp_path / "run").glob("checkpoint-*")), "the earlier run is gone"


def test_a_smaller_number_type_halves_the_file(world: Path, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    result = scumble.train(**settings(world, tmp_path / "run", save={"dtype": "fp16"}))
    assert result.adapter
    tensors = load_file(result.adapter)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    read = scumble.formats.read(result.adapter).state
    assert read.metadata.base_family == "sd1" and '"steps":4' in read.metadata.settings


@pytest.mark.parametrize(
    ("dialect", "dtype"), [(None, "fp16"), (None, "bf16"), ("attention-processors", "fp32")]
)
def test_the_file_in_other_numbers_or_names_is_proven_before_it_takes_the_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dialect: str | None, dtype: str
) -> None:
    import copy

    import torch

    from scumble import formats
    from scumble.errors import TrainingError
    from scumble.runs.train import first_difference, save_as
    from tests.inference.makers import adapter_file

    file = adapter_file(tmp_path / "pytorch_lora_weights.safetensors")
    before, trained, write = file.read_bytes(), formats.read(file).state, formats.write
    save = {"dtype": dtype} | ({"dialect": dialect} if dialect else {})
    config = load(base="picturebook", data={"images": "x"}, output=str(tmp_path), save=save)

    def wrong(state: Any, *arguments: Any, **how: Any) -> Path:
        """What is written differs by 1 % in one number."""
        state = copy.deepcopy(state)
        next(iter(state.layers.values())).tensors["up"][0, 0] *= 1.01
        return write(state, *arguments, **how)

    monkeypatch.setattr(formats, "write", wrong)
    with pytest.raises(
        TrainingError, match=r"differ by more than their rounding\. .* stays as it was, in fp32"
    ):
        save_as(file, config)
    assert file.read_bytes() == before and [path.name for path in tmp_path.iterdir()] == [file.name]
    monkeypatch.setattr(formats, "write", write)
    assert save_as(file, config) == file and file.read_bytes() != before
    kind = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}[dtype]
    again = formats.read(file, list(trained.layers))
    assert again.dialect == (dialect or "diffusers")
    assert first_difference(trained, again.state, getattr(torch, kind)) is None
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


def test_an_interrupted_run_has_a_card_too(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import signal

    from scumble.training.events import StepDone
    from scumble.training.sinks.jsonl import JsonLinesSink

    handle = JsonLinesSink.handle

    def interrupting(sink: JsonLinesSink, event: Any) -> None:
        handle(sink, event)
        if isinstance(event, StepDone) and event.step == 2:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(JsonLinesSink, "handle", interrupting)
    result = scumble.train(**settings(world, tmp_path / "run"))
    assert (result.reason, result.exit_code) == ("interrupted", 130) and result.adapter is not None
    card = result.card.read_text()
    assert f"interrupted after {result.step} of 4 steps" in card
    inside = result.adapter.parent.relative_to(result.folder).as_posix()
    assert f'subfolder="{inside}", weight_name="{result.adapter.name}"' in card
    assert "None" not in card


@pytest.mark.slow
def test_a_text_encoder_trains_when_it_is_a_target(world: Path, tmp_path: Path) -> None:
    result = scumble.train(
        **settings(world, tmp_path / "run", adapter={"targets": ["attention", "text_encoder.attention"]})
    )
    assert result.adapter
    roots = {path.partition(".")[0] for path in scumble.formats.read(result.adapter).state.layers}
    assert roots == {"unet", "text_encoder"}


@pytest.mark.slow
def test_another_layout_has_other_names(world: Path, tmp_path: Path) -> None:
    layout = Layout(checkpoint="checkpoint-{step}", tensorboard="logs", strict=False)
    scumble.train(
        **settings(world, tmp_path / "run", trackers=["tensorboard"]),
        train__checkpoint_every=2,
        layout=layout,
    )
    assert (tmp_path / "run" / "checkpoint-2").is_dir()
    assert list((tmp_path / "run" / "logs").rglob("events.out.tfevents.*"))


def test_everything_wrong_with_the_data_is_told_before_the_model_is_loaded(
    world: Path, tmp_path: Path, no_model: None
) -> None:
    folder = tmp_path / "bad"
    folder.mkdir()
    (folder / "torn.png").write_bytes((world / "pictures" / "0.png").read_bytes()[:40])
    (folder / "torn.txt").write_text("a")
    (folder / "text.jpg").write_text("no picture")
    (folder / "text.txt").write_text("b")
    with pytest.raises(DataError) as raised:
        scumble.train(**settings(world, tmp_path / "run"), data__images=str(folder))
    assert "torn.png" in str(raised.value) and "text.jpg" in str(raised.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"train__precision": "fp16", "device": "cpu"}, PrecisionError, "bf16"),
        ({"base": "no/such/folder/at/all"}, ModelError, "no file or folder"),
        ({"data__images": "no-such-folder!"}, DataError, "no folder"),
        ({"train__stpes": 3}, ConfigError, 'Did you mean "steps"'),
        ({"trackers": ["wandb"]}, ConfigError, "pip install wandb"),
    ],
)
def test_what_can_be_known_is_refused_before_the_model_is_loaded(
    world: Path,
    tmp_path: Path,
    no_model: None,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    with pytest.raises(error, match=message):
        scumble.train(**{**settings(world, tmp_path / "run"), **changes})
    assert not (tmp_path / "run").exists(), "nothing was written"


def masked(world: Path, folder: Path, size: tuple[int, int]) -> dict[str, Any]:
    """Settings of the data: the world's pictures with masks of this size."""
    from PIL import Image

    for number in range(6):
        (folder / "masks").mkdir(parents=True, exist_ok=True)
        Image.new("L", size, 255).save(folder / "masks" / f"{number}.png")
    return {"images": str(world / "pictures"), "masks": str(folder / "masks")}


def test_a_mask_of_another_size_is_refused_before_the_model_is_loaded(
    world: Path, tmp_path: Path, no_model: None
) -> None:
    data = masked(world, tmp_path, (16, 12))
    with pytest.raises(
        DataError, match=r"mask of 0\.png: it is 16x12 pixels and the picture 16x16"
    ) as raised:
        scumble.train(**{**settings(world, tmp_path / "run"), "data": data})
    assert "5.png" in str(raised.value), "every one is told at once"
    (tmp_path / "masks" / "3.png").unlink()
    with pytest.raises(DataError, match=r"3\.png: has no mask"):
        scumble.train(**{**settings(world, tmp_path / "run"), "data": data})
    assert not (tmp_path / "run").exists()


def test_an_empty_folder_is_refused_before_the_model_is_loaded(
    world: Path, tmp_path: Path, no_model: None
) -> None:
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match=r"No pictures in .*none"):
        scumble.train(**settings(world, tmp_path / "run"), data__images=str(tmp_path / "none"))


def test_what_is_cut_off_a_long_caption_is_shown(
    world: Path, tmp_path: Path, no_model: None, capsys: pytest.CaptureFixture[str]
) -> None:
    said = {**settings(world, tmp_path / "run"), "quiet": False}
    with pytest.raises(AssertionError, match="the model was loaded"):
        scumble.train(**said, data__caption="the fox " * 30 + "unread")
    err = capsys.readouterr().err
    assert "0.png: its caption has" in err and "the base reads the first 77" in err
    assert re.search(r"This is cut off: '[^']*the fox unread'\.", err.replace("\n", " "))


def test_an_option_of_another_method_is_named(world: Path, tmp_path: Path, no_model: None) -> None:
    for options, said in (
        (
            {"dreambooth": {"instance_prompt": "a fox"}},
            r'\[dreambooth\] are the settings of method = "dreambooth"',
        ),
        ({"text_to_image": {"prior": "images"}}, r'\[text_to_image\] has no setting "prior"'),
    ):
        with pytest.raises(ConfigError, match=said):
            scumble.train(**settings(world, tmp_path / "run", **options))
    assert not (tmp_path / "run").exists()


def test_targets_that_match_nothing_are_refused_before_the_first_step(world: Path, tmp_path: Path) -> None:
    with pytest.raises(NoLayerMatches, match="attn9"):
        scumble.train(**settings(world, tmp_path / "run"), adapter__targets="*.attn9.to_q")
    assert not (tmp_path / "run").exists()


def test_a_prediction_that_was_asked_for_is_the_one_that_is_trained(world: Path, tmp_path: Path) -> None:
    result = scumble.train(**settings(world, tmp_path / "run"), prediction="v_prediction")
    assert result.adapter
    assert scumble.formats.read(result.adapter).state.metadata.prediction_type == "v_prediction"


def test_a_failed_upload_does_not_fail_the_run(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    from tests.runs.hub_server import TOKEN, running

    with running() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        server.failures = {"/commit/": 500}
        run = settings(world, tmp_path / "run", hub={"push": True, "id": "painter/fox"}, hub_token=TOKEN)
        result = scumble.train(**run)
        assert result.exit_code == 0 and result.url is None
        assert result.push_error and "scumble push" in result.push_error
        order = [path for _, path in server.requests]
        asked = [order.index(path) for path in ("/api/whoami-v2", "/api/repos/create", "/api/validate-yaml")]
        assert asked == sorted(asked) and asked[-1] < order.index("/api/models/painter/fox/preupload/main")
        server.failures = {}
        result = scumble.train(**{**run, "output": tmp_path / "other"})
        assert result.url == f"{server.endpoint}/painter/fox"
        assert "pytorch_lora_weights.safetensors" in server.repos["painter/fox"]
    for file in (tmp_path / "other").rglob("*"):
        assert not file.is_file() or TOKEN.encode() not in file.read_bytes(), f"the token is in {file}"


def test_epochs_become_steps(world: Path, tmp_path: Path) -> None:
    from scumble.runs.build import steps_of_epochs

    values = settings(world, tmp_path / "run")
    values.pop("quiet")
    assert steps_of_epochs(load(**values), 3) == 9
    assert steps_of_epochs(load(**values, data__held_out=2), 3) == 6
    assert steps_of_epochs(load(**values, train__accumulate=2), 3) == 6
