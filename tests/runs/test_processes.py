"""Whole runs in several processes: what is encoded and drawn once, what is said once, and two hosts."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import scumble
from scumble.formats import read
from tests.runs.worlds import write_world

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny base on disk, and six captioned pictures."""
    return write_world(tmp_path_factory.mktemp("world"))


def environment(**more: str) -> dict[str, str]:
    path = os.pathsep.join((str(ROOT / "src"), str(ROOT)))
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **more}


def launched(processes: int, *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *(f"--nproc-per-node={processes}", *command),
        ],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )


def settings(world: Path, **more: Any) -> dict[str, Any]:
    """DreamBooth with class pictures, flips and a held-out picture: all that is made before a run."""
    return {
        "base": str(world / "base"),
        "method": "dreambooth",
        "device": "cpu",
        "data": {"images": str(world / "pictures"), "random_flip": True, "held_out": 1, **more},
        "train": {
            **{"steps": 4, "batch": 2, "checkpoint_every": 2, "held_out_every": 2},
            # the processes must agree on when they look up, though only one of them draws
            **{"log_every": 10, "preview_every": 3, "optimizer": {"learning_rate": 1e-3}},
        },
        "preview": {"prompts": ["a colour"], "steps": 1},
        "dreambooth": {"prior": "images", "class_prompt": "a dog", "class_count": 3, "class_steps": 1},
        "quiet": True,
    }


def run(folder: Path, processes: int, told: dict[str, Any], *words: str) -> list[dict[str, list[str]]]:
    """What each process encoded and drew."""
    folder.mkdir(exist_ok=True)
    done = launched(processes, str(ROOT / "tests/runs/counting.py"), str(folder), json.dumps(told), *words)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads((folder / f"counts-{rank}.json").read_text()) for rank in range(processes)]


def made(counts: list[dict[str, list[str]]], what: str) -> Counter[str]:
    return Counter(name for found in counts for name in found[what])


def once(counts: list[dict[str, list[str]]]) -> int:
    """Pictures (some flipped), captions and class pictures, each made by one process, once; how many tensors."""
    for what in counts[0]:
        assert set(made(counts, what).values()) == {1}, f"{what}: {made(counts, what)}"
    assert len(made(counts, "drawn")) == 3 and len(made(counts, "captions")) == 7
    assert len(made(counts, "pictures")) > 6 + 3, "and some flipped"
    return len(made(counts, "pictures")) + len(made(counts, "captions"))


def same(one: Path, other: Path) -> None:
    mine, theirs = (read(path / "pytorch_lora_weights.safetensors").state for path in (one, other))
    for path, layer in mine.layers.items():
        for name, tensor in layer.tensors.items():
            assert (tensor - theirs.layers[path].tensors[name]).abs().max() < 1e-5, f"{path}.{name}"


def test_two_machines_without_a_disk_in_common_make_everything_once(world: Path, tmp_path: Path) -> None:
    counts = run(tmp_path, 2, settings(world), "apart")
    number = once(counts)
    assert all(len(found[what]) > 0 for found in counts for what in found), "both worked"
    assert not (tmp_path / "run-1").exists(), "only the main process writes results"
    kept = [{path.name for path in (tmp_path / f"cache-{rank}").rglob("*.safetensors")} for rank in (0, 1)]
    assert kept[0] == kept[1] and len(kept[0]) == number
    told = settings(world)
    told["train"] |= {"batch": 4}
    alone = scumble.train(**told, output=tmp_path / "alone", data__cache=str(tmp_path / "cache-1"))
    assert alone.reason == "complete"
    same(tmp_path / "alone", tmp_path / "run-0")


@pytest.mark.slow
def test_a_shared_cache_is_filled_once_and_found_again(world: Path, tmp_path: Path) -> None:
    told = settings(world, cache="shared")
    once(run(tmp_path, 4, told | {"train": told["train"] | {"batch": 1}}))
    # without a folder it is in memory, and made once too
    memory = tmp_path / "memory"
    once(run(memory, 2, settings(world)))
    assert not (memory / "cache").exists()


@pytest.mark.slow
def test_a_run_whose_checkpoints_lie_on_one_machine_goes_on(world: Path, tmp_path: Path) -> None:
    run(tmp_path, 2, settings(world), "apart")
    first = (tmp_path / "run-0/pytorch_lora_weights.safetensors").read_bytes()
    folder = tmp_path / "run-0"
    (folder / "pytorch_lora_weights.safetensors").unlink()
    shutil.rmtree(folder / "checkpoint-000004")
    counts = run(tmp_path, 2, settings(world), "apart", "resume")
    assert not made(counts, "pictures") and not made(counts, "drawn"), "each has its own cache"
    assert (folder / "pytorch_lora_weights.safetensors").read_bytes() == first


COMMAND = ("-m", "scumble.cli.main", "train", "--device", "cpu", "--steps", "3", "--batch", "2")


@pytest.mark.slow
def test_a_person_reads_everything_once(world: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    places = ("--base", str(world / "base"), "--images", str(world / "pictures"), "--output", str(out))
    done = launched(2, *COMMAND, *places, "--prompt", "a colour", "preview.steps=1")
    assert done.returncode == 0, done.stderr[-4000:]
    printed = done.stdout + done.stderr
    for text in ("6 pictures can be trained on", "pictures a step", "finished at step 3", "Adapter: "):
        assert printed.count(text) == 1, f"{text!r}: {printed}"
    assert "Traceback" not in printed and "rror" not in printed, printed
    names = {path.name for path in out.iterdir()}
    assert names == {
        *("run.toml", "events.jsonl", "report.html", "README.md", "previews", "checkpoint-000003"),
        "pytorch_lora_weights.safetensors",
    }
    events = [json.loads(line)["event"] for line in (out / "events.jsonl").read_text().splitlines()]
    assert events.count("Started") == events.count("Finished") == 1 and events.count("StepDone") == 3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (("train.steps=0",), "steps"),
        pytest.param(
            ("adapter.targets=nothing_of_the_kind",), "nothing_of_the_kind", marks=pytest.mark.thorough
        ),
        pytest.param(("data.resolution=17",), "17", marks=pytest.mark.thorough),
        (("--images", "not/there"), "not/there"),
    ],
)
def test_what_is_wrong_is_said_once_before_anything_long(
    world: Path, tmp_path: Path, wrong: tuple[str, ...], said: str
) -> None:
    places = ("--base", str(world / "base"), "--images", str(world / "pictures"))
    done = launched(2, *COMMAND, *places, "--output", str(tmp_path / "run"), *wrong)
    assert done.returncode != 0
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and said in done.stderr, done.stderr[-4000:]
    assert done.stderr.count("Traceback") == 1, "the launcher's own"
