"""`scumble config`: what new writes, check accepts; what is wrong, check names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from scumble.cli.main import main
from scumble.runs.config import RunConfig


def run(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    out, err = capsys.readouterr()
    return int(stop.value.code or 0), out, err


def test_new_then_check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, text, _ = run(["config", "new", "--base", "some/base", "--images", "my pictures"], capsys)
    assert code == 0 and "# Optimizer steps." in text
    file = tmp_path / "run.toml"
    file.write_text(text)
    code, resolved, err = run(["config", "check", str(file), "train.steps=7"], capsys)
    assert code == 0 and "is fine" in err
    file.write_text(resolved)
    assert "steps = 7" in resolved and 'images = "my pictures"' in resolved
    assert run(["config", "check", str(file)], capsys)[1] == resolved, "a resolved file resolves to itself"


def test_check_tells_every_mistake(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "run.toml"
    file.write_text('base = "b"\noutput = "o"\n[data]\nimages = "i"\nresolutoin = 64\n[train]\nsteps = 0\n')
    code, out, err = run(["config", "check", str(file)], capsys)
    assert (code, out) == (2, "")
    assert f'{file}:5: [data] has no setting "resolutoin". Did you mean "resolution"?' in err
    assert f"{file}:7: train.steps = 0: must be greater than or equal to 1." in err


def test_the_schema_describes_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    code, text, _ = run(["config", "schema"], capsys)
    schema = json.loads(text)
    assert code == 0 and set(schema["properties"]) == set(RunConfig.model_fields)
    assert schema["additionalProperties"] is False

    def undescribed(node: dict[str, object], path: str) -> list[str]:
        properties = node.get("properties", {})
        assert isinstance(properties, dict)
        return [f"{path}.{name}" for name, field in properties.items() if not described(field)]

    def described(field: dict[str, str]) -> bool:
        return "description" in field or "description" in schema["$defs"].get(
            field.get("$ref", "").split("/")[-1], {}
        )

    lacking = undescribed(schema, "")
    for name, definition in schema["$defs"].items():
        lacking += undescribed(definition, name)
    assert not lacking, "a setting is written once, with its text"


def test_new_writes_the_settings_of_a_family(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, text, _ = run(["config", "new", "--family", "lokr"], capsys)
    assert code == 0 and 'family = "lokr"' in text and "# factor =" in text
    file = tmp_path / "run.toml"
    file.write_text(text)
    code, resolved, _ = run(["config", "check", str(file), "adapter.factor=8"], capsys)
    assert code == 0 and "factor = 8" in resolved
    code, _, err = run(["config", "new", "--family", "lokt"], capsys)
    assert code == 2 and 'Did you mean "lokr"' in err
