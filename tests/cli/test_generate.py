"""`scumble generate`: pictures, sheets and messages from the command line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import typer
from PIL import Image
from typer.testing import CliRunner, Result

import scumble
from scumble.cli.generate import generate, parse_size, parse_use, slug
from scumble.errors import ConfigError, ModelError, ScumbleError
from scumble.inference.png import read_record, read_settings
from scumble.inference.request import AdapterUse
from scumble.models.tiny import save
from tests.inference.makers import adapter_file


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base, and an adapter that names it."""
    folder = tmp_path_factory.mktemp("world")
    save("sd1", folder / "base")
    adapter_file(folder / "fox.safetensors", base_name=str(folder / "base"))
    return folder


def run(*arguments: object) -> Result:
    words = [str(item) for item in (*arguments, "--steps", 2, "--device", "cpu")]
    app = typer.Typer()
    app.command()(generate)
    result = CliRunner().invoke(app, words)
    if isinstance(result.exception, ScumbleError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result


def test_pictures_go_to_a_folder_with_their_settings(world: Path, tmp_path: Path) -> None:
    result = run(
        "A small, red fox!", "-a", f"{world / 'fox.safetensors'}:0.5", "-n", 2, "--seed", 7, "-o", tmp_path
    )
    files = [Path(line) for line in result.stdout.splitlines()]
    assert files == [tmp_path / "a-small-red-fox-7.png", tmp_path / "a-small-red-fox-8.png"]
    request = read_settings(files[1])
    assert (request.prompt, request.seed, request.steps) == ("A small, red fox!", 8, 2)
    assert request.adapters == (AdapterUse(path=world / "fox.safetensors", strength=0.5),)
    assert read_record(files[0])["drawn"]["base"] == str(world / "base")
    assert "applied 32/32 unet layers, 0 unused tensors" in result.stderr
    again = run("A small, red fox!", "--base", world / "base", "--seed", 7, "-o", tmp_path)
    assert again.stdout.strip() == str(tmp_path / "a-small-red-fox-7-2.png")


def test_one_file_is_written_as_named(world: Path, tmp_path: Path) -> None:
    run(
        "x",
        "--base",
        world / "base",
        "--size",
        "24x16",
        "--negative",
        "y",
        "-o",
        tmp_path / "new" / "one.png",
    )
    assert Image.open(tmp_path / "new" / "one.png").size == (24, 16)
    result = run("x", "--base", world / "base", "-n", 2, "-o", tmp_path / "two.png")
    assert [Path(line).name for line in result.stdout.splitlines()] == ["two-0.png", "two-1.png"]


def test_compare_draws_base_beside_adapter(world: Path, tmp_path: Path) -> None:
    adapter = world / "fox.safetensors"
    run("a fox", "-a", adapter, "-n", 2, "--compare", "-o", tmp_path / "sheet.png")
    run("a fox", "-a", adapter, "-n", 2, "-o", tmp_path / "with.png")
    run("a fox", "--base", world / "base", "-n", 2, "-o", tmp_path / "bare.png")
    sheet = numpy.asarray(Image.open(tmp_path / "sheet.png"))
    for name in ("with-0", "with-1", "bare-0", "bare-1"):
        picture = numpy.asarray(Image.open(tmp_path / f"{name}.png"))
        large = picture.repeat(12, 0).repeat(12, 1)
        found = [
            (row, column)
            for row, column in zip(*numpy.where((sheet[:, :, :] == large[0, 0]).all(-1)), strict=True)
            if sheet[row : row + 192, column : column + 192].shape == large.shape
            and (sheet[row : row + 192, column : column + 192] == large).all()
        ]
        assert len(found) == 1, name
    assert read_settings(tmp_path / "sheet.png").count == 2


def test_mistakes_are_named(world: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--compare needs something"):
        run("x", "--base", world / "base", "--compare")
    with pytest.raises(ModelError, match="Name a base with --base"):
        run("x", "-o", tmp_path)
    with pytest.raises(ModelError, match="Nearest: 16 or 24"):
        run("x", "--base", world / "base", "--size", "20", "-o", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_notes_are_shown(world: Path, tmp_path: Path) -> None:
    result = run("word " * 90, "--base", world / "base", "-o", tmp_path / "x.png")
    assert "note: The prompt has" in result.stderr


@pytest.mark.parametrize(
    ("text", "path", "strength"),
    [
        ("a.safetensors", "a.safetensors", 1.0),
        ("a.safetensors:0.8", "a.safetensors", 0.8),
        ("runs/fox:-1", "runs/fox", -1.0),
        ("owner/name:2", "owner/name", 2.0),
        (r"C:\foxes\a.safetensors", r"C:\foxes\a.safetensors", 1.0),
        (r"C:\foxes\a.safetensors:0.5", r"C:\foxes\a.safetensors", 0.5),
    ],
)
def test_parse_use(text: str, path: str, strength: float) -> None:
    assert parse_use(text) == AdapterUse(path=Path(path), strength=strength)


def test_parse_use_of_a_file_with_a_colon_in_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a:0.5").touch()
    assert parse_use("a:0.5") == AdapterUse(path=Path("a:0.5"))
    with pytest.raises(ConfigError, match="'half' is not a strength"):
        parse_use("a.safetensors:half")


def test_parse_size() -> None:
    assert parse_size("512x768") == (512, 768)
    assert parse_size("64") == (64, 64)
    for text in ("big", "512x", "512x768x3", "-5x5", "5.5x5"):
        with pytest.raises(ConfigError, match="is not a size"):
            parse_size(text)


def test_slug() -> None:
    assert slug("A small, red fox!") == "a-small-red-fox"
    assert slug("../../etc/passwd") == "etc-passwd"
    assert slug("...") == "picture"
    assert len(slug("word " * 50)) <= 40


def test_help_needs_no_torch() -> None:
    code = "import sys, scumble.cli.generate; print({'torch', 'diffusers', 'PIL'} & set(sys.modules))"
    source = str(Path(scumble.__file__).parents[1])
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONPATH": source}
    )
    assert out.stdout.strip() == "set()"
