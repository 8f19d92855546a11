"""Weights & Biases: a real offline run, read back with wandb's own reader of its log."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from scumble.training.sinks.wandb import ID_NAME, WandbSink
from tests.training.sinks.runs import events, feed, loss

wandb = pytest.importorskip("wandb")
BLOCK = 32768


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "data"))


def records(folder: Path) -> list[Any]:
    """Every record of the offline logs below `folder`, in wandb's own classes.

    The log is LevelDB's format after a header of 7 bytes: blocks of 32 KiB; in them pieces of records, each
    after 4 bytes of checksum, 2 of length and 1 of kind (1 whole, 2 first, 3 middle, 4 last).
    """
    from wandb.proto import wandb_internal_pb2

    found = []
    for log in sorted(folder.rglob("*.wandb")):
        data, position, pieces = log.read_bytes(), 7, b""
        while position + 7 <= len(data):
            if BLOCK - position % BLOCK < 7:
                position += BLOCK - position % BLOCK
                continue
            length, kind = int.from_bytes(data[position + 4 : position + 6], "little"), data[position + 6]
            pieces += data[position + 7 : position + 7 + length]
            position += 7 + length
            if kind in (1, 4):
                record = wandb_internal_pb2.Record()
                record.ParseFromString(pieces)
                found.append(record)
                pieces = b""
    return found


def history(found: list[Any]) -> list[dict[str, Any]]:
    rows = []
    for record in found:
        if record.WhichOneof("record_type") == "history":
            rows.append(
                {
                    item.key or "/".join(item.nested_key): json.loads(item.value_json)
                    for item in record.history.item
                }
            )
    return rows


@pytest.mark.slow
def test_offline_run_holds_numbers_pictures_and_settings_and_a_resume_keeps_its_name(tmp_path: Path) -> None:
    run = tmp_path / "fox"
    feed(WandbSink(run), events(run, last=20))
    identity = (run / ID_NAME).read_text()
    feed(WandbSink(run), events(run, first=20))
    assert (run / ID_NAME).read_text() == identity
    wandb.teardown()  # the process that writes the log has written all of it then
    found = records(run)
    rows = history(found)
    losses = {row["step"]: row["train/loss"] for row in rows if "train/loss" in row}
    assert losses == {step: loss(step) for step in range(1, 41) if step != 13}
    assert [row["held_out/base"] for row in rows if "held_out/base" in row] == [0.2] * 4
    captions = [row["preview/0/captions"] for row in rows if "preview/0/captions" in row]
    assert len(captions) == 4
    assert captions[0] == [f"{word}: a <b>small</b> & red fox (seed 1)" for word in ("base", "adapter")]
    assert len(list(run.rglob("media/images/preview/*.png"))) >= 4
    runs = [record.run for record in found if record.WhichOneof("record_type") == "run"]
    assert {item.run_id for item in runs} == {identity}
    assert {item.display_name for item in runs} == {"fox"}
    config = {item.key: json.loads(item.value_json) for item in runs[0].config.update}
    assert config["settings"]["adapter"]["rank"] == 4
