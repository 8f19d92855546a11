from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from scumble.cli.data import app
from scumble.data.buckets import choose, shapes
from scumble.errors import DataError, ModelError
from tests.data.fakes import folder, noise


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["check", *map(str, arguments)], env={"COLUMNS": "200"})


@pytest.fixture
def good(tmp_path: Path) -> Path:
    root = tmp_path / "good"
    root.mkdir()
    for index in range(4):
        noise(64, 96, index).save(root / f"{index}.png")
        (root / f"{index}.txt").write_text(f"a red fox, number {index}")
    return root


def test_a_dataset_without_errors_exits_with_zero(good: Path, tmp_path: Path) -> None:
    result = run(good, "--resolution", 64, "--sheet", tmp_path / "sheet.png")
    assert result.exit_code == 0, result.output
    for words in (
        "4 pictures with text files",
        "64x64",
        "1.00x",
        "33.3%",
        "0.png: a red fox, number 0",
        "cropped",
    ):
        assert words in result.output
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width > 400
    wide = run(good, "--resolution", 64, "--buckets", "--all")
    height, width = choose((64, 96), shapes(64, 8))
    assert wide.exit_code == 0 and f"{width}x{height}" in wide.output and "lost: top, right" in wide.output


def test_errors_are_listed_and_exit_with_one(good: Path) -> None:
    (good / "1.png").write_bytes(b"no picture")
    (good / "3.txt").unlink()
    result = run(good, "--resolution", 64)
    assert result.exit_code == 1
    for words in ("unreadable", "1.png", "no caption", "3.png", "2 pictures can be trained on"):
        assert words in result.output


def test_warnings_of_one_kind_are_counted_unless_all_are_asked_for(tmp_path: Path) -> None:
    for index in range(9):
        noise(64, 96, index).save(tmp_path / f"{index}.png")
    few, every = (
        run(tmp_path, "--caption", "x", "--resolution", 64),
        run(tmp_path, "--caption", "x", "--resolution", 64, "--all"),
    )
    assert "4 more of 'cropped': --all lists them" in few.output and "8.png" not in few.output
    assert "more of" not in every.output and "8.png" in every.output


def test_no_captions_is_an_error_for_people(good: Path) -> None:
    for path in good.glob("*.txt"):
        path.unlink()
    result = run(good, "--resolution", 64)
    assert isinstance(result.exception, DataError) and "found 4 images, 0 captions" in str(result.exception)
    assert run(good, "--resolution", 64, "--caption", "a fox").exit_code == 0


def test_a_base_sets_the_resolution_and_counts_tokens(good: Path, tmp_path: Path) -> None:
    from scumble.models import FAMILIES

    base = FAMILIES.get("sd1").tiny()
    base.pipeline().save_pretrained(str(tmp_path / "base"))
    (good / "2.txt").write_text("fox " * 80)
    result = run(good, "--base", tmp_path / "base")
    assert result.exit_code == 0, result.output
    assert f"{base.resolution}x{base.resolution}" in result.output
    counts, limit = base.token_counts(["a red fox, number 0", ("fox " * 80).strip()])
    assert f"({counts[0]} of {limit} tokens)" in result.output
    assert f"has {counts[1]} tokens" in " ".join(result.output.split())


def test_a_base_that_is_not_there_is_named(good: Path) -> None:
    result = run(good, "--base", "./nowhere")
    assert isinstance(result.exception, ModelError) and "nowhere" in str(result.exception)


def test_checking_without_a_base_imports_no_torch(tmp_path: Path) -> None:
    root = folder(tmp_path / "data")
    code = (
        "import sys; from typer.testing import CliRunner; from scumble.cli.data import app; "
        f"result = CliRunner().invoke(app, ['check', {str(root)!r}, '--resolution', '32']); "
        "assert result.exit_code == 0, result.output; assert 'torch' not in sys.modules"
    )
    paths = os.pathsep.join(path for path in sys.path if path)
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": paths})
