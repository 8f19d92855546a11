"""`scumble doctor`: verdicts, and a fix for each line that is not ok."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from scumble.cli import doctor
from scumble.cli.doctor import OPTIONAL, TESTED, Line, base_findings, findings, package_line


@pytest.mark.parametrize(
    ("version", "verdict", "fix"),
    [
        (None, "failed", "pip install 'torch>=2.4'"),
        ("2.3.1", "failed", "pip install --upgrade 'torch>=2.4'"),
        ("2.4", "ok", ""),
        ("2.13.0+cpu", "ok", ""),
        ("2.14.0", "ok", ""),
        ("3.0.0", "note", "if it fails: pip install 'torch==2.13.0'"),
    ],
)
def test_a_package_is_missing_too_old_fine_or_untested(version: str | None, verdict: str, fix: str) -> None:
    line = package_line("torch", version, "2.4", "2.13.0")
    assert (line.verdict, line.fix) == (verdict, fix)


def test_the_versions_are_those_of_the_project_files() -> None:
    root = Path(__file__).parents[2]
    wanted = dict(
        re.match(r"([\w-]+)>=([\d.]+)", text).groups()  # type: ignore[union-attr]
        for text in re.findall(
            r'^    "([\w-]+>=[^"]+)",$', (root / "pyproject.toml").read_text().split("[project.opt")[0], re.M
        )
    )
    tested = dict(
        line.split("==") for line in (root / "constraints.txt").read_text().splitlines() if "==" in line
    )
    assert {name: oldest for name, (oldest, _) in TESTED.items()} == wanted
    assert {name: newest for name, (_, newest) in TESTED.items()} == {name: tested[name] for name in TESTED}


def test_this_machine_is_looked_at_and_what_is_not_ok_has_a_fix() -> None:
    lines = list(findings())
    assert {line.what for line in lines} >= {"python", "cpu", "memory", *TESTED, *OPTIONAL}
    assert [line for line in lines if line.verdict != "ok" and not line.fix] == []
    (precision,) = [line for line in lines if line.what == "cpu precision"]
    assert precision.found == "no, bf16; not fp16"


def test_a_failed_line_is_a_failed_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from scumble.cli.main import main

    monkeypatch.setattr(
        doctor, "findings", lambda: iter([Line("failed", "torch", "not installed", "pip install torch")])
    )
    with pytest.raises(SystemExit) as stop:
        main(["doctor"])
    assert stop.value.code == 1
    out = capsys.readouterr().out
    assert "failed torch" in out and "-> pip install torch" in out and "1 line failed." in out
    monkeypatch.setattr(doctor, "findings", lambda: iter([Line("ok", "torch", "2.13")]))
    with pytest.raises(SystemExit) as stop:
        main(["doctor"])
    assert stop.value.code == 0


def test_a_check_that_breaks_is_a_failed_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> str:
        raise RuntimeError("no metadata")

    monkeypatch.setattr(doctor, "_installed", broken)
    assert any(line.verdict == "failed" and "no metadata" in line.found for line in findings())


# -- a base --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from scumble.models.tiny import save

    return save("flux", tmp_path_factory.mktemp("base") / "flux")


def test_a_base_is_described_without_its_weights(flux: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import safetensors.torch

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr(safetensors.torch, "load_file", refuse)
    monkeypatch.setattr("scumble.models.loading._load_part", refuse)
    lines = {line.what: line for line in base_findings(str(flux))}
    assert {line.verdict for line in lines.values()} == {"ok"}
    assert lines["base"].found.endswith("is Flux.1 (flux), 16 pixels, sides in multiples of 4")
    assert lines["prediction"].found == "flow"
    assert {
        "transformer",
        "vae",
        "text_encoder",
        "text_encoder_2",
        "tokenizer",
        "tokenizer_2",
        "scheduler",
    } <= set(lines)
    assert "FluxTransformer2DModel, 0.1 million parameters, F32, 0.4 MiB" in lines["transformer"].found
    assert "int8" in lines["to train, in int8"].found and "nf4" in lines["to train, in nf4"].found
    assert "rank 16" in lines["to train, least"].found and "bf16" in lines["to draw"].found


def test_what_is_missing_is_a_failed_line(flux: Path, tmp_path: Path) -> None:
    import shutil

    base = tmp_path / "base"
    shutil.copytree(flux, base)
    shutil.rmtree(base / "text_encoder_2")
    lines = list(base_findings(str(base)))
    failed = [line for line in lines if line.verdict == "failed"]
    assert any("text_encoder_2/config.json" in line.found for line in failed)
    assert not any(line.what.startswith("to ") for line in lines)


def test_the_command_takes_a_base(flux: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from scumble.cli.main import main

    with pytest.raises(SystemExit) as stop:
        main(["doctor", "--base", str(flux)])
    assert stop.value.code == 0
    assert "It can be drawn with and trained on." in capsys.readouterr().out
