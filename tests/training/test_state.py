"""Checkpoints: whole or not there."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from scumble.adapters.state import AdapterState, LayerState
from scumble.errors import FormatError, NotFinite, ResumeError
from scumble.training import state as checkpoints
from scumble.training.state import Layout, TrainState, compare, damage, latest_valid, load, save


def an_adapter(value: float = 1.0) -> AdapterState:
    path = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    tensors = {"down": torch.full((2, 8), value), "up": torch.full((8, 2), value)}
    return AdapterState({path: LayerState("lora", 2, 2.0, tensors)})


def a_state(step: int) -> TrainState:
    return TrainState(
        step=step,
        phase="adapter",
        identity={
            "seed": 1,
            "phases": {"adapter": {"optimizer": {"growth": float("inf")}}},
            "steps": {"adapter": 9},
        },
        parameters={"unet/x.down": torch.randn(3, 2)},
        initial={"unet/x.down": "00ff"},
        optimizer={"unet/x.down|exp_avg": torch.randn(3, 2), "unet/x.down|step": torch.tensor(3.0)},
        optimizer_values={"state": {}, "groups": [{"betas": [0.9, 0.999], "name": "unet"}]},
        means={"unet/x.down": torch.randn(3, 2)},
        scaler={"scale": 1024.0, "_growth_tracker": 7},
        skipped_in_a_row=2,
        best_step=1,
        best_loss=0.1 + 0.2,
    )


def folder(run: Path, step: int) -> Path:
    return Layout().checkpoint_folder(run, step)


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    state = a_state(4)
    found = load(save(state, an_adapter(), folder(tmp_path, 4)))
    tensors = ("parameters", "optimizer", "means")
    for field in dataclasses.fields(TrainState):
        mine, theirs = getattr(state, field.name), getattr(found, field.name)
        if field.name in tensors:
            assert mine.keys() == theirs.keys()
            assert all(torch.equal(mine[k], theirs[k]) and mine[k].shape == theirs[k].shape for k in mine)
        else:
            assert mine == theirs, field.name


def test_no_file_is_a_pickle(tmp_path: Path) -> None:
    save(a_state(4), an_adapter(), folder(tmp_path, 4))
    assert {path.suffix for path in folder(tmp_path, 4).iterdir()} == {".safetensors", ".json"}


def test_the_oldest_go_only_after_the_new_one_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (1, 2, 3):
        save(a_state(step), an_adapter(), folder(tmp_path, step), limit=2)
    assert [step for step, _ in Layout().checkpoints(tmp_path)] == [2, 3]

    def full(*_: object) -> None:
        raise FormatError("the disk is full")

    monkeypatch.setattr(checkpoints, "save_tensors", full)
    with pytest.raises(FormatError, match="full"):
        save(a_state(4), an_adapter(), folder(tmp_path, 4), limit=2)
    assert [step for step, _ in Layout().checkpoints(tmp_path)] == [2, 3]
    assert not checkpoints.unfinished(tmp_path)
    assert latest_valid(tmp_path)[0] == folder(tmp_path, 3)


def test_a_limit_leaves_checkpoints_of_later_steps_alone(tmp_path: Path) -> None:
    save(a_state(9), an_adapter(), folder(tmp_path, 9))
    for step in (1, 2):
        save(a_state(step), an_adapter(), folder(tmp_path, step), limit=1)
    assert [step for step, _ in Layout().checkpoints(tmp_path)] == [2, 9]


@pytest.mark.parametrize("name", ["adapter.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("harm", ["cut", "flip", "remove"])
def test_a_damaged_checkpoint_is_skipped_with_a_note(tmp_path: Path, name: str, harm: str) -> None:
    for step in (1, 2):
        save(a_state(step), an_adapter(), folder(tmp_path, step))
    path = folder(tmp_path, 2) / name
    content = bytearray(path.read_bytes())
    if harm == "remove":
        path.unlink()
    else:
        content[len(content) // 2] ^= 1
        path.write_bytes(content if harm == "flip" else content[:-1])
    found, notes = latest_valid(tmp_path)
    assert found == folder(tmp_path, 1)
    assert len(notes) == 1 and "checkpoint-000002" in notes[0] and name in notes[0]
    with pytest.raises(ResumeError, match=name):
        load(folder(tmp_path, 2))


def test_an_unfinished_save_is_ignored_with_a_note(tmp_path: Path) -> None:
    save(a_state(1), an_adapter(), folder(tmp_path, 1))
    partial = tmp_path / ".checkpoint-000002.partial"
    partial.mkdir()
    (partial / "adapter.safetensors").write_bytes(b"half")
    found, notes = latest_valid(tmp_path)
    assert found == folder(tmp_path, 1) and "never finished" in notes[0]


def test_a_folder_without_manifest_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-5").mkdir()
    assert latest_valid(tmp_path)[0] is None
    assert "never finished" in str(damage(tmp_path / "checkpoint-5"))


def test_a_checkpoint_of_the_same_step_is_replaced(tmp_path: Path) -> None:
    save(a_state(1), an_adapter(1.0), folder(tmp_path, 1))
    save(a_state(1), an_adapter(2.0), folder(tmp_path, 1))
    assert damage(folder(tmp_path, 1)) is None and len(list(tmp_path.iterdir())) == 1


def test_a_non_finite_adapter_is_never_written(tmp_path: Path) -> None:
    with pytest.raises(NotFinite):
        save(a_state(1), an_adapter(float("nan")), folder(tmp_path, 1))
    assert not list(tmp_path.iterdir())


def test_two_saves_of_one_state_are_the_same_bytes(tmp_path: Path) -> None:
    state = a_state(1)
    first, second = save(state, an_adapter(), tmp_path / "a"), save(state, an_adapter(), tmp_path / "b")
    for path in first.iterdir():
        assert path.read_bytes() == (second / path.name).read_bytes()


def test_names_of_another_layout_are_found(tmp_path: Path) -> None:
    layout = Layout(checkpoint="checkpoint-{step}")
    save(a_state(500), an_adapter(), layout.checkpoint_folder(tmp_path, 500), layout=layout)
    assert (tmp_path / "checkpoint-500").is_dir()
    assert latest_valid(tmp_path, layout)[0] == tmp_path / "checkpoint-500"


def test_differences_are_listed_by_name(tmp_path: Path) -> None:
    saved = {"adapter": {"rank": 4, "alpha": None}, "seed": 1, "old": True}
    now = {"adapter": {"rank": 8, "alpha": None}, "seed": 1, "new": []}
    assert compare(saved, now) == [
        "adapter.rank: 4 -> 8",
        "new: not there -> []",
        "old: True -> not there",
    ]


def test_a_checkpoint_of_a_later_version_is_refused(tmp_path: Path) -> None:
    path = save(a_state(1), an_adapter(), folder(tmp_path, 1)) / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps(manifest | {"version": 99}))
    with pytest.raises(ResumeError, match="version 99"):
        load(folder(tmp_path, 1))
