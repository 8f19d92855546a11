"""`scumble evaluate`: options become arguments, the numbers are shown, the page is named."""

from __future__ import annotations

from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from scumble.cli.evaluate import evaluate
from scumble.errors import ScumbleError
from scumble.models.tiny import save
from tests.inference.makers import adapter_file


def run(*arguments: object) -> Result:
    app = typer.Typer()
    app.command()(evaluate)
    result = CliRunner().invoke(app, [str(item) for item in arguments])
    if isinstance(result.exception, ScumbleError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result


def test_the_page_is_named_and_the_numbers_are_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scumble.evaluation.evaluate._cached", lambda name: False)
    save("sd1", tmp_path / "base")
    file = adapter_file(tmp_path / "fox.safetensors", base_name=str(tmp_path / "base"))
    few = ("--pictures", 2, "--seeds", 1, "--unrelated", 1, "--steps", 1, "--device", "cpu")
    few = (*few, "--dtypes", "vae=bf16")
    result = run(file, "--subject", "red fox", "--class", "", "--output", tmp_path / "out", *few)
    assert result.stdout.strip() == str(tmp_path / "out" / "evaluation.html")
    assert (tmp_path / "out" / "evaluation.html").is_file() and (
        tmp_path / "out" / "evaluation.json"
    ).is_file()
    assert "broke: drift" in result.stderr and "subject: red fox; 0 training pictures" in result.stderr
    assert "note: Nobody can say" in result.stderr
