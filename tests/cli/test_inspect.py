"""`scumble inspect`: what people see of a file, and the exit code when it does not fit a base."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

from scumble.adapters.state import AdapterState, LayerState, Metadata, TokenState
from scumble.cli.inspect import inspect
from scumble.errors import FormatError, WrongBase
from scumble.formats import write
from scumble.formats.container import load, save
from tests.formats.adapters_of import SHAPES, adapter

app = typer.Typer()
app.command()(inspect)


def run(*arguments: str | Path) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


def test_it_says_what_the_file_holds(tmp_path: Path) -> None:
    write(
        adapter(
            alpha=2.0, metadata=Metadata(base_name="[picture]book", settings="x" * 500, extra={"k": "v"})
        ),
        tmp_path,
    )
    code, text = run(tmp_path)
    assert code == 0
    for said in (
        "diffusers",
        "SD 1.x (cross-attention 768)",
        "8 unet",
        "[picture]book",
        "float32",
        "unet.mid_block",
    ):
        assert said in text
    assert "xxx..." in text and "x" * 300 not in text
    assert "norm of the change" in text and "\u2588" in text  # a bar for every block


def test_a_file_that_is_not_known_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"")
    with pytest.raises(FormatError, match="empty"):
        run(tmp_path)


def test_against_a_base(tmp_path: Path) -> None:
    pytest.importorskip("scumble.models.loading")
    from scumble.adapters import layers_of
    from scumble.models import tiny
    from scumble.models.loading import load_base

    folder = tiny.save("sd1", tmp_path / "base")
    roots = load_base(str(folder), dtype=torch.float32, device=torch.device("cpu")).roots
    layers = {
        path: LayerState(
            "lora",
            1,
            1.0,
            {"down": torch.ones(1, layer.in_features), "up": torch.ones(layer.out_features, 1)},
        )
        for path, layer in layers_of(roots).items()
        if ".attn" in path and isinstance(layer, torch.nn.Linear)
    }
    code, text = run(write(AdapterState(layers), tmp_path / "a"), "--against", folder)
    assert code == 0 and f"{len(layers)}/{len(layers)} unet layers, 0 unused tensors" in text
    assert "effect at strength 1: the denoiser's outputs move by" in text and "does nothing" not in text
    stranger = {
        "unet.nowhere": LayerState("lora", 1, 1.0, {"down": torch.ones(1, 3), "up": torch.ones(3, 1)})
    }
    code, text = run(write(AdapterState(layers | stranger), tmp_path / "b"), "--against", folder)
    assert code == 1 and "2 unused tensors" in text and "unused: unet.nowhere.lora_A.weight" in text
    with pytest.raises(WrongBase):
        run(write(adapter(SHAPES), tmp_path / "c"), "--against", folder)


def test_what_a_terminal_would_obey_in_a_file_is_shown_and_not_sent(tmp_path: Path) -> None:
    evil = "\x1b]0;PWN\x07\x1b[31m[bold]\x9b"
    shown = "\\x1b]0;PWN\\x07\\x1b[31m[bold]\\x9b"
    layers = {f"unet.{evil}": LayerState("lora", 1, 1.0, {"down": torch.ones(1, 3), "up": torch.ones(3, 1)})}
    tokens = {f"<{evil}>": TokenState({"text_encoder": torch.ones(1, 32)})}
    tokens["my fox"] = TokenState({"text_encoder": torch.ones(2, 32)})
    said = Metadata(base_name=evil, extra={evil: evil})
    code, text = run(write(AdapterState(layers, tokens, said), tmp_path))
    assert code == 0 and not any(letter in text for letter in "\x1b\x07\x9b")
    assert f"base        {shown}" in text  # a value
    assert f"{shown}  {shown}" in text  # a key and its value
    assert f"<{shown}>  1 vector\n" in text and f"with 2 tokens: <{shown}>" in text
    assert "2 vectors, in a prompt: my_fox" in text
    assert f"unet.{shown}" in text  # a block of the picture


def test_tensors_of_no_known_kind_are_shown_beside_what_the_file_holds(tmp_path: Path) -> None:
    file = load(write(adapter(), tmp_path))
    strange = {f"{letter}.strange": torch.ones(1) for letter in "abcdefghijkl"}
    save(replace(file, tensors={**file.tensors, **strange}), tmp_path / "b.safetensors")
    code, text = run(tmp_path / "b.safetensors")
    assert code == 0 and "8 unet" in text and text.count(".strange") == 10 and "... and 2 more" in text
