"""Law: training n steps equals training some of them, `kill -9`, resuming, `kill -9` in a save, resuming to
n.

Real processes are killed. The pictures are 7 and a step takes 4, so every checkpoint falls inside an epoch;
dropout is on, so torch's generator matters.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
TRAIN = {
    "steps": 12,
    "batch": 2,
    "accumulate": 2,
    "checkpoint_every": 2,
    "held_out_every": 5,
    "optimizer": {"learning_rate": 1e-3},
    "schedule": {"name": "cosine", "warmup_steps": 2},
}


def child(run: Path, **wanted: Any) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join((str(ROOT / "src"), str(ROOT)))
    return subprocess.run(
        [sys.executable, str(ROOT / "tests/training/child.py"), str(run), json.dumps(wanted)],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def finished(run: Path, **wanted: Any) -> dict[str, Any]:
    done = child(run, **wanted)
    assert done.returncode == 0, done.stderr
    return json.loads((run / "facts-0.json").read_text())


def killed(run: Path, **wanted: Any) -> None:
    done = child(run, **wanted)
    assert done.returncode == -signal.SIGKILL, done.stderr


CASES = {
    "fp32": {"train": TRAIN, "dropout": 0.2},
    "bf16, with text encoder": {
        "train": TRAIN | {"precision": "bf16"},
        "targets": ["attention", "text_encoder.attention"],
        "dropout": 0.2,
    },
    "prodigy, running mean, checkpointing": {
        "train": TRAIN
        | {
            "optimizer": {"name": "prodigy", "learning_rate": 1.0},
            "ema": 0.9,
            "gradient_checkpointing": True,
        },
        "dropout": 0.2,
    },
    # the text encoder rests after step 6, the last that is saved before the second kill: the run goes on between phases
    "dreambooth, text encoder at rest from step 6": {
        "train": TRAIN,
        "method": "dreambooth",
        "options": {
            "prior": "prediction",
            "class_prompt": "a dog",
            "train_text_encoder": True,
            "text_encoder_until": 0.5,
        },
        "dropout": 0.2,
    },
}

CASES |= {
    "pivotal, its word at rest from step 6": {
        "train": TRAIN,
        "method": "pivotal",
        "options": {"placeholders": "picture", "vectors": 2, "inversion_steps": 6},
        "dropout": 0.2,
    },
    "pivotal, its word trained on from step 5, with the text encoder": {
        "train": TRAIN,
        "method": "pivotal",
        "options": {
            "placeholders": "picture",
            "inversion_steps": 5,
            "joint": True,
            "train_text_encoder": True,
            "inversion_schedule": {"name": "linear"},
        },
        "dropout": 0.2,
    },
    "textual inversion": {
        "train": TRAIN | {"ema": 0.9},
        "method": "textual-inversion",
        "options": {"placeholders": "picture", "vectors": 2},
    },
}

MOMENTS = ("manifest", "half an adapter", "rename", "manifest", "manifest", "rename", "half an adapter")
"""Where in the save the process is killed, one for each case."""


STANDING = ("fp32", "pivotal, its word at rest from step 6")
"""Cases that stand for the others."""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "moment"),
    [
        pytest.param(case, moment, marks=() if case in STANDING else pytest.mark.thorough)
        for case, moment in zip(CASES, MOMENTS, strict=True)
    ],
)
def test_two_kills_leave_no_trace(tmp_path: Path, case: str, moment: str) -> None:
    wanted = CASES[case]
    straight = finished(tmp_path / "straight", **wanted)
    run = tmp_path / "killed"
    killed(run, **wanted, die_after_step=5)  # the last checkpoint is that of step 4
    killed(run, **wanted, resume="latest", die_in_save=[8, moment])
    assert not (run / "checkpoint-000008").exists() and (run / ".checkpoint-000008.partial").is_dir()
    resumed = finished(run, **wanted, resume="latest")
    assert resumed["steps"] == [7, 8, 9, 10, 11, 12]
    assert resumed["losses"] == straight["losses"][6:]
    assert (run / "adapter.safetensors").read_bytes() == (
        tmp_path / "straight/adapter.safetensors"
    ).read_bytes()
    assert (run / "best/adapter.safetensors").read_bytes() == (
        tmp_path / "straight/best/adapter.safetensors"
    ).read_bytes()
    assert not list(run.glob(".*")), "what the killed save left is cleared away"


@pytest.mark.slow
def test_forty_steps_in_three_lives(tmp_path: Path) -> None:
    """Forty steps; killed after 20 and in the save of 30."""
    wanted = {"train": TRAIN | {"steps": 40, "checkpoint_every": 10}, "dropout": 0.1}
    finished(tmp_path / "straight", **wanted)
    run = tmp_path / "killed"
    killed(run, **wanted, die_after_step=21)
    killed(run, **wanted, resume="latest", die_in_save=[30, "manifest"])
    resumed = finished(run, **wanted, resume="latest")
    assert resumed["steps"] == list(range(21, 41))
    assert (run / "adapter.safetensors").read_bytes() == (
        tmp_path / "straight/adapter.safetensors"
    ).read_bytes()
