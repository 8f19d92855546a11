"""Reproduce: the settings out of a file's header make the same file again, bit for bit."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

import scumble
from scumble.cli.main import main
from scumble.errors import ConfigError, FormatError
from scumble.formats import read, write
from scumble.runs.load import load
from scumble.runs.reproduce import reproduce
from tests.inference.makers import adapter_file


def test_what_was_trained_is_trained_again_bit_for_bit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from PIL import Image

    from scumble.models.tiny import save

    save("sd1", tmp_path / "base")
    (tmp_path / "pictures").mkdir()
    for number in range(3):
        Image.new("RGB", (16, 16), (60 * number, 90, 200)).save(tmp_path / f"pictures/{number}.png")
    first = scumble.train(
        base=str(tmp_path / "base"),
        data={"images": str(tmp_path / "pictures"), "caption": 'a "sks" fox'},
        output=tmp_path / "run",
        train={"steps": 2, "batch": 2, "optimizer": {"learning_rate": 0.01}, "seed": 7},
        adapter={"rank": 3},
        save={"dtype": "bf16"},
        quiet=True,
    )
    assert first.adapter is not None
    content, resolved = first.adapter.read_bytes(), load(tmp_path / "run" / "run.toml")
    out = tmp_path / "again.toml"
    for arguments in (["reproduce", str(first.adapter), "-o", str(out)], ["config", "check", str(out)]):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 0, capsys.readouterr().err
    again = tmp_path / "run-again"  # the first run's folder is kept
    assert load(out) == resolved.model_copy(update={"output": again})
    assert reproduce(first.adapter, tmp_path / "x").count(f'"{tmp_path / "x"}"') == 1
    with pytest.raises(SystemExit) as stop:
        main(["reproduce", str(first.adapter), "-o", str(out)])
    assert stop.value.code == 2 and "there already" in capsys.readouterr().err
    second = scumble.train(out, quiet=True)
    assert second.folder == again
    assert second.adapter is not None and second.adapter.read_bytes() == content
    other = scumble.train(out, "train.seed=8", "output=" + str(tmp_path / "other"), quiet=True)
    assert other.adapter is not None and other.adapter.read_bytes() != content


def test_a_file_that_does_not_say_is_told(tmp_path: Path) -> None:
    file = adapter_file(tmp_path / "x.safetensors")
    with pytest.raises(FormatError, match="does not say how it was made"):
        reproduce(file)
    state = read(file).state

    def saying(**said: str) -> Path:
        return write(replace(state, metadata=replace(state.metadata, **said)), file)

    with pytest.raises(FormatError, match="not a JSON table"):
        reproduce(saying(settings="[1]"))
    with pytest.raises(ConfigError, match=r"made by scumble 9\.0.*\n.*no setting \"flux\""):
        reproduce(saying(settings='{"base": "a", "output": "b", "flux": 1}', version="9.0"))
    plain = {"base": "a/b", "output": "runs/x", "data": {"images": "p"}}
    text = reproduce(saying(settings=json.dumps(plain), version='1\n[hub]\npush = true\n"'))
    (tmp_path / "run.toml").write_text(text)
    assert not load(tmp_path / "run.toml").hub.push, "a header's text stays inside its comment"
