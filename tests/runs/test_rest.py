"""A transformer's own file with the rest of another base: trained on, said in files, drawn with, described."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import scumble
from scumble.cli.doctor import base_findings
from scumble.cli.main import main
from scumble.errors import ModelError
from scumble.formats import read
from scumble.inference.find_base import find_base, find_rest
from scumble.inference.request import Request
from scumble.inference.session import Session
from scumble.models import FAMILIES, load_base
from tests.models import original_transformers as transformers
from tests.runs.worlds import write_world

PREFIX = "model.diffusion_model."


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four pictures, a tiny SD 3 as a folder, and a file of its transformer alone."""
    place = write_world(tmp_path_factory.mktemp("world"), 4)
    shutil.rmtree(place / "base")
    parts = transformers.sd3_parts(2)
    base = FAMILIES.get("sd3").load(parts, dtype=torch.float32, device=torch.device("cpu"))
    base.pipeline().save_pretrained(place / "rest")
    tensors = transformers.sd3_tensors(parts)
    alone = {key.removeprefix(PREFIX): t for key, t in tensors.items() if key.startswith(PREFIX)}
    transformers.write(place / "transformer.safetensors", alone)
    return place


@pytest.fixture(scope="module")
def result(world: Path) -> Any:
    return scumble.train(
        base=str(world / "transformer.safetensors"),
        rest=world / "rest",
        data={"images": str(world / "pictures"), "resolution": 16},
        output=world / "run",
        train={"steps": 2, "batch": 2},
        quiet=True,
    )


def test_a_run_says_where_the_rest_came_from(world: Path, result: Any) -> None:
    assert result.reason == "complete" and result.difference <= 1e-5
    file, rest = world / "transformer.safetensors", str(world / "rest")
    metadata = read(result.adapter).state.metadata
    assert metadata.base_name == str(file)
    assert metadata.base_fingerprint == load_base(world / "rest", device="cpu").fingerprint()
    assert f'rest = "{rest}"' in (world / "run" / "run.toml").read_text()
    card = (world / "run" / "README.md").read_text()
    assert f'pipeline = scumble.load_base("{file}", rest="{rest}").pipeline()' in card
    assert "import scumble\n" in card and "from_single_file" not in card


def test_an_adapter_finds_its_base_and_that_base_s_rest(world: Path, result: Any, tmp_path: Path) -> None:
    base = find_base(result.adapter)
    assert find_rest(result.adapter, base) == str(world / "rest")
    assert find_rest(result.adapter, "another") is None
    request = Request(
        prompt="a fox", steps=2, width=16, height=16, scheduler="FlowMatchEulerDiscreteScheduler"
    )
    drawn = []
    for told in (
        {"adapters": [result.adapter]},
        {"base": base, "rest": world / "rest", "adapters": [result.adapter]},
        {"base": world / "rest", "adapters": [result.adapter]},
    ):
        with Session(**told, device="cpu") as session:  # type: ignore[arg-type]
            drawn.append(session.generate(request)[0].image.tobytes())
    assert drawn[0] == drawn[1] == drawn[2]
    with pytest.raises(ModelError, match=r"is not complete\. Missing: the VAE"):
        Session(base, device="cpu")
    with pytest.raises(ModelError, match="device and rest are for a base that is loaded here"):
        Session(load_base(world / "rest", device="cpu"), rest=world / "rest")


def test_the_doctor_says_what_is_where(world: Path) -> None:
    file, rest = str(world / "transformer.safetensors"), str(world / "rest")
    alone = {line.what: line for line in base_findings(file) if line.what != "base"}
    assert alone["vae"].verdict == "failed" and "--rest" in alone["vae"].fix
    assert alone["transformer"].verdict == "ok" and "in the file (F32)" in alone["transformer"].found
    assert "to draw" not in alone
    lines = {line.what: line for line in base_findings(file, rest=rest)}
    assert {line.verdict for line in lines.values()} <= {"ok", "note"}
    assert "in the file (F32)" in lines["transformer"].found and "in the file" not in lines["vae"].found
    assert "rank 16" in lines["to train, least"].found and rest in lines["assumed"].found


def test_inspect_compares_with_a_file_and_its_rest(
    world: Path, result: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, rest = str(world / "transformer.safetensors"), str(world / "rest")

    def inspected(adapter: Path, *told: str) -> tuple[bool, str]:
        with pytest.raises(SystemExit) as stop:
            main(["inspect", str(adapter), *told])
        said = capsys.readouterr()
        return not stop.value.code, " ".join((said.out + said.err).split())

    fits, said = inspected(result.adapter, "--against", file, "--rest", rest)
    assert fits and "It was trained on this very base." in said and "0 unused tensors" in said
    assert inspected(result.adapter, "--against", file) == (fits, said)  # the adapter remembers the rest
    stranger = tmp_path / "alone.safetensors"  # as another tool writes it
    save_file(load_file(result.adapter), stranger)
    fits, said = inspected(stranger, "--against", file)
    assert not fits and "is not complete. Missing: the VAE" in said
    fits, said = inspected(stranger, "--against", file, "--rest", rest)
    assert fits and "the denoiser's outputs move by" in said
    fits, said = inspected(stranger, "--rest", rest)
    assert not fits and "--rest has no effect without --against" in said


def test_commands_take_the_rest(world: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file, rest = str(world / "transformer.safetensors"), str(world / "rest")
    commands = (
        ["doctor", "--base", file],
        ["generate", "a fox", "--base", file, "--size", "16x16", "--steps", "1", "--device", "cpu",
         "--scheduler", "FlowMatchEulerDiscreteScheduler", "--out", str(tmp_path / "fox.png")],
        ["data", "check", str(world / "pictures"), "--base", file, "--resolution", "16"],
    )  # fmt: skip
    for command in commands:
        for told, fails in (([], True), (["--rest", rest], False)):
            with pytest.raises(SystemExit) as stop:
                main([*command, *told])
            assert bool(stop.value.code) is fails, (command, capsys.readouterr())
    assert (tmp_path / "fox.png").is_file()
