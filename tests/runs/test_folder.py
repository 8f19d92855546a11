"""Who may write into a run folder, what a run continues from, and what an overwrite removes."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from scumble.errors import ConfigError, ResumeError
from scumble.runs.folder import Layout, RunFolder


def checkpoint(run: Path, name: str) -> Path:
    folder = run / name
    folder.mkdir(parents=True)
    files = {}
    for file in ("adapter.safetensors", "optimizer.safetensors", "state.json"):
        (folder / file).write_bytes(file.encode())
        files[file] = hashlib.sha256(file.encode()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps({"version": 1, "step": 5, "sha256": files}))
    return folder


def test_a_new_or_empty_folder_is_free(tmp_path: Path) -> None:
    assert RunFolder(tmp_path / "new").claim() == (None, [])
    (tmp_path / ".hidden").touch()
    (tmp_path / "my.toml").touch()
    assert RunFolder(tmp_path).claim() == (None, [])
    assert not (tmp_path / "new").exists(), "claiming writes nothing"


@pytest.mark.parametrize(
    "left", ["pytorch_lora_weights.safetensors", "events.jsonl", "report.html", "checkpoint-000005/x"]
)
def test_a_folder_with_a_run_is_refused_with_the_ways_out(tmp_path: Path, left: str) -> None:
    (tmp_path / left).parent.mkdir(exist_ok=True)
    (tmp_path / left).touch()
    with pytest.raises(ConfigError, match=r"already holds.*--resume latest.*--output.*--overwrite"):
        RunFolder(tmp_path).claim()
    assert RunFolder(tmp_path).claim(overwrite=True) == (None, [])
    with pytest.raises(ConfigError, match="Choose one"):
        RunFolder(tmp_path).claim(overwrite=True, resume="latest")


def test_files_of_others_are_never_mixed_with_a_run_nor_removed(tmp_path: Path) -> None:
    (tmp_path / "holiday.jpg").touch()
    with pytest.raises(ConfigError, match=r"holiday\.jpg, which no run wrote"):
        RunFolder(tmp_path).claim(overwrite=True)
    assert RunFolder(tmp_path, Layout(strict=False)).claim() == (None, [])
    checkpoint(tmp_path, "checkpoint-000005")
    (tmp_path / "previews").mkdir()
    (tmp_path / "pytorch_lora_weights.safetensors").touch()
    RunFolder(tmp_path).clear()
    assert [path.name for path in tmp_path.iterdir()] == ["holiday.jpg"]


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="is a file"):
        RunFolder(tmp_path / "file").claim()


def test_resume_finds_the_newest_whole_checkpoint(tmp_path: Path) -> None:
    old, new = checkpoint(tmp_path, "checkpoint-000005"), checkpoint(tmp_path, "checkpoint-000010")
    folder = RunFolder(tmp_path)
    assert folder.claim(resume="latest") == (new, [])
    assert folder.claim(resume=tmp_path) == (new, [])
    assert folder.claim(resume=old) == (old, [])
    assert folder.claim(resume="checkpoint-000005") == (old, [])
    (new / "state.json").write_text("{")
    found, notes = folder.claim(resume="latest")
    assert found == old and "checkpoint-000010 is skipped" in notes[0]
    with pytest.raises(ResumeError, match=r"state\.json is damaged"):
        folder.claim(resume=new)


def test_resume_without_a_checkpoint_is_told(tmp_path: Path) -> None:
    with pytest.raises(ResumeError, match="no checkpoint to continue from"):
        RunFolder(tmp_path).claim(resume="latest")
    checkpoint(tmp_path, "checkpoint-000005")
    with pytest.raises(ResumeError, match=r"no such folder.*checkpoint-000005"):
        RunFolder(tmp_path).claim(resume="checkpoint-000099")


def test_another_layout_finds_its_own_names(tmp_path: Path) -> None:
    script = Layout(checkpoint="checkpoint-{step}", tensorboard="logs", strict=False)
    made = checkpoint(tmp_path, "checkpoint-500")
    (tmp_path / "logs" / "tensorboard").mkdir(parents=True)
    folder = RunFolder(tmp_path, script)
    assert folder.claim(resume="latest") == (made, [])
    assert "logs/**" in folder.published()
    assert tmp_path / "logs" / "tensorboard" in folder.results()
    assert folder.others() == []
