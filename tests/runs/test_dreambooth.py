"""DreamBooth as whole runs: the example, class pictures, and what is refused before a model is loaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import scumble
from scumble.errors import ConfigError, DataError
from scumble.runs.load import load
from tests.runs.worlds import write_world

EXAMPLE = Path(__file__).parents[2] / "examples" / "dreambooth.toml"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny base on disk, and three pictures without captions."""
    return write_world(tmp_path_factory.mktemp("world"), 3, caption=None)


def settings(world: Path, output: Path, **options: Any) -> dict[str, Any]:
    return {
        "base": str(world / "base"),
        "method": "dreambooth",
        "data": {"images": str(world / "pictures")},
        "output": output,
        "train": {"steps": 2, "batch": 2, "optimizer": {"learning_rate": 0.01}},
        "dreambooth": {"instance_prompt": "a photo of sks dog", **options},
        "quiet": True,
    }


def test_a_run_draws_its_class_pictures_and_trains_both(world: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    options = {"prior": "images", "class_prompt": "a dog", "class_count": 2, "class_steps": 1}
    result = scumble.train(**settings(world, out, **options), train__held_out_every=2, data__held_out=1)
    assert result.reason == "complete" and result.difference == 0
    (folder,) = (out / ".cache").iterdir()
    drawn = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert len(drawn) == 2
    rows = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
    (started,) = (row for row in rows if row["event"] == "Started")
    assert started["facts"]["class pictures"] == 2 and started["facts"]["prior"] == "images"
    assert "a photo of sks dog" in (out / "README.md").read_text()
    scumble.train(**settings(world, out, **options), overwrite=True)
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == drawn, "found again"


def test_the_text_encoder_is_in_the_same_file(world: Path, tmp_path: Path) -> None:
    from safetensors import safe_open

    options = {"train_text_encoder": True, "text_encoder_until": 0.5, "text_encoder_rank": 2}
    result = scumble.train(**settings(world, tmp_path / "run", **options))
    assert result.adapter is not None
    with safe_open(result.adapter, framework="pt") as file:
        roots = {name.split(".")[0] for name in file.keys()}  # noqa: SIM118
    assert roots == {"unet", "text_encoder"}


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "a prompt over 77 tokens": (
        {"instance_prompt": "a photo of sks dog " + "x " * 80},
        r"dreambooth\.instance_prompt: has \d+ tokens and the base reads 77\. This would be cut off: 'x x",
    ),
    "no way to draw": (
        {"prior": "images", "class_images": "dogs", "class_count": 9},
        r"dogs: holds 3 pictures, class_count asks for 9",
    ),
    "no caption of its own": (
        {"prior": "images", "class_images": "dogs"},
        r"dogs: found 3 images, 0 captions in .*Or set class_prompt",
    ),
    "the subject as its class": (
        {"prior": "images", "class_images": "pictures", "class_prompt": "a dog"},
        r"pictures: is data\.images too",
    ),
    "a class file that is no picture": (
        {"prior": "images", "class_images": "broken", "class_prompt": "a dog", "class_count": 3},
        r"broken/a\.png: is no picture",
    ),
    "an empty class folder": (
        {"prior": "images", "class_images": "empty"},
        r"empty: holds 0 pictures, class_count asks for 1",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_bad_input_is_refused_before_a_model_is_loaded(
    case: str, world: Path, tmp_path: Path, no_model: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(world)
    (world / "empty").mkdir(exist_ok=True)
    (world / "broken").mkdir(exist_ok=True)
    (world / "broken" / "a.png").write_text("no picture")
    shutil.copytree(world / "pictures", world / "dogs", dirs_exist_ok=True)
    options, said = WRONG[case]
    with pytest.raises(DataError, match=said):
        scumble.train(**settings(world, tmp_path / "run", **options))
    assert not (tmp_path / "run").exists()


def test_an_empty_folder_is_refused(world: Path, tmp_path: Path, no_model: None) -> None:
    (tmp_path / "none").mkdir()
    told = settings(world, tmp_path / "run")
    with pytest.raises(DataError, match=r"No pictures in .*none"):
        scumble.train(**{**told, "data": {"images": str(tmp_path / "none")}})


def test_a_prompt_without_identifier_is_told_and_trained(
    world: Path, tmp_path: Path, no_model: None, capsys: pytest.CaptureFixture[str]
) -> None:
    told = settings(world, tmp_path / "run", instance_prompt="a dog", class_prompt="a dog")
    with pytest.raises(AssertionError, match="the model was loaded"):
        scumble.train(**{**told, "quiet": False})
    assert (
        "warning: dreambooth.instance_prompt: 'a dog' has no word that class_prompt"
        in capsys.readouterr().err
    )


def test_an_option_of_another_method_is_named(world: Path, tmp_path: Path) -> None:
    told = settings(world, tmp_path / "run")
    del told["quiet"]
    with pytest.raises(ConfigError, match=r'\[dreambooth\].*method is "text-to-image".*no effect'):
        load(None, ["method=text-to-image"], **told)
    with pytest.raises(ConfigError, match=r'\[text_to_image\].*method is "dreambooth".*no effect'):
        load(None, ["text_to_image.train_text_encoder=true"], **told)
    with pytest.raises(ConfigError, match=r'\[dreambooth\] has no setting "placeholders"'):
        load(None, ["dreambooth.placeholders=x"], **told)


@pytest.mark.slow
def test_the_example_runs_as_its_comment_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from scumble.picturebook.dataset import write_dataset

    monkeypatch.chdir(tmp_path)
    write_dataset("kettrix", tmp_path / "pictures")
    result = scumble.train(EXAMPLE, "train.steps=2", "preview.steps=1", "preview.count=1", quiet=True)
    assert result.reason == "complete" and result.folder == Path("runs/kettrix")
