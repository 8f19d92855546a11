"""`scumble train`: flags and overrides mean settings, --plan writes nothing, a run can be continued."""

from __future__ import annotations

from pathlib import Path

import pytest

from scumble.cli.main import main
from scumble.cli.train import FLAGS, configure
from scumble.errors import ConfigError
from tests.runs.worlds import write_world

NONE = {flag: None for flag in FLAGS}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"), 4, caption="a colour")


def run(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    out, err = capsys.readouterr()
    return int(stop.value.code or 0), out, err


def test_every_flag_is_an_option_of_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(["train", "--help"], capsys)
    assert code == 0
    for flag in FLAGS:
        assert f"--{flag.replace('_', '-')}" in out


def test_flags_win_over_the_file_and_overrides_over_flags(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text(
        'base = "b"\noutput = "o"\n[data]\nimages = "i"\n[train]\nsteps = 1\nbatch = 1\nseed = 1\n'
    )
    config = configure(
        [str(file), "train.seed=3"], {**NONE, "batch": 2, "seed": 2, "prompt": ["x", "y"]}, None
    )
    assert (config.train.steps, config.train.batch, config.train.seed) == (1, 2, 3)
    assert config.preview.prompts == ("x", "y")


def test_only_one_file_can_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"2 settings files are named: a\.toml, b\.toml"):
        configure(["a.toml", "b.toml"], NONE, None)


def test_a_wrong_flag_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(
        ["train", "--base", "b", "--images", "i", "--output", "o", "--rank", "0", "--steps", "0"], capsys
    )
    assert code == 2
    assert "--rank: adapter.rank = 0: must be greater than or equal to 1." in err
    assert "--steps: train.steps = 0" in err


def test_plan_says_what_would_be_trained_and_writes_nothing(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [
        "--base",
        str(world / "base"),
        "--images",
        str(world / "pictures"),
        "--output",
        str(tmp_path / "run"),
    ]
    code, out, err = run(
        ["train", *flags, "--epochs", "3", "--batch", "2", "--targets", "attention+mlp", "--plan"], capsys
    )
    assert code == 0, err
    said = {line[:31].strip(): line[31:].strip() for line in out.splitlines()}
    said = {" ".join(name.split()): value for name, value in said.items()}
    text = " ".join(out.split())
    for wanted in (
        "steps 6",
        "epochs 3",
        "pictures 4",
        "batches an epoch 2",
        "attention+mlp 40",
        "layers 40",
        "trains unet",
    ):
        assert wanted in text, (wanted, text)
    assert "4 pictures can be trained on" in err
    assert not (tmp_path / "run").exists()


def test_a_run_is_continued_from_its_own_settings(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    flags = ["--base", str(world / "base"), "--images", str(world / "pictures"), "--output", str(out)]
    code, text, err = run(
        ["train", *flags, "--steps", "2", "--batch", "2", "--checkpoint-every", "2"], capsys
    )
    assert code == 0, err
    assert f"Adapter: {out / 'pytorch_lora_weights.safetensors'}" in text
    code, _, err = run(["train", "--output", str(out), "--resume", "latest", "train.steps=4"], capsys)
    assert code == 0, err
    assert "Going on from checkpoint-000002" in err
    code, _, err = run(
        ["train", "--resume", str(out), "train.steps=4", "train.optimizer.learning_rate=0.5"], capsys
    )
    assert code != 0 and "learning_rate" in err
