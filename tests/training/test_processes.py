"""Several processes, really: gloo on the CPU, started by `torchrun` and `accelerate launch`.

Law: any division of a step over processes and accumulation trains the same, to 1e-5; whoever dies is named by
the others, who end.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from scumble.formats import read
from scumble.training import state as checkpoints
from tests.training.child import one
from tests.weight import weighed

ROOT = Path(__file__).parents[2]
TRAIN: dict[str, Any] = {
    "steps": 50,
    "checkpoint_every": 10,
    "optimizer": {"learning_rate": 1e-3},
    "schedule": {"name": "cosine", "warmup_steps": 5},
}
WORDS = {"placeholders": "picture", "vectors": 2}
CASES: dict[str, dict[str, Any]] = {
    # the clipping is felt in every step; position 51 is the fourth sample of step 7
    "masks, a running mean, clipping and a poisoned picture": {
        "train": TRAIN | {"ema": 0.9, "max_grad_norm": 1e-3, "log_every": 3},
        "masks": True,
        "poison": {"51": "nan"},
    },
    "class pictures in turn, text encoder too": {
        "train": TRAIN,
        "method": "dreambooth",
        "options": {
            "prior": "images",
            "class_prompt": "a dog",
            "train_text_encoder": True,
            "text_encoder_until": 0.5,
        },
    },
    "class kept by prediction": {
        "train": TRAIN,
        "method": "dreambooth",
        "options": {"prior": "prediction", "class_prompt": "a dog", "prior_weight": 0.5},
    },
    "textual inversion": {"train": TRAIN, "method": "textual-inversion", "options": WORDS},
    "pivotal": {
        "train": TRAIN,
        "method": "pivotal",
        "options": {**WORDS, "inversion_steps": 20, "joint": True},
    },
}
STANDING = ("masks, a running mean, clipping and a poisoned picture", "pivotal")
"""Cases that stand for the others where time is."""
DIVISIONS: dict[str, dict[str, int]] = {
    "one by eight": {"batch": 8},
    "accumulated": {"batch": 4, "accumulate": 2},
    "two by four": {"batch": 4},
    "two by two twice": {"batch": 2, "accumulate": 2},
    "four by two": {"batch": 2},
}
LAUNCHERS = {
    "torchrun": ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node={}"],
    "accelerate": [
        *("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes={}", "--num_machines=1"),
        *("--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=0"),
    ],
}


def launched(
    run: Path, processes: int, wanted: dict[str, Any], launcher: str = "torchrun"
) -> subprocess.CompletedProcess[str]:
    """child.py with `wanted`, in so many processes."""
    run.mkdir(parents=True, exist_ok=True)
    for name in wanted.get("cases", ()):
        (run / name).mkdir(exist_ok=True)
    path = os.pathsep.join((str(ROOT / "src"), str(ROOT)))
    start = [part.format(processes) for part in LAUNCHERS[launcher]]
    return subprocess.run(
        [sys.executable, *start, str(ROOT / "tests/training/child.py"), str(run), json.dumps(wanted)],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )


def start(run: Path, processes: int, **wanted: Any) -> list[dict[str, Any]]:
    """Train in `processes` processes; what each found."""
    done = launched(run, processes, wanted)
    assert done.returncode == 0, done.stderr[-4000:]
    return facts(run, processes)


def here(run: Path, **wanted: Any) -> dict[str, Any]:
    """Train in this process; what it found."""
    run.mkdir(parents=True, exist_ok=True)
    one(run, wanted)
    return facts(run, 1)[0]


def facts(run: Path, processes: int) -> list[dict[str, Any]]:
    return [json.loads((run / f"facts-{rank}.json").read_text()) for rank in range(processes)]


def divided(wanted: dict[str, Any], division: str) -> dict[str, Any]:
    return {**wanted, "train": wanted["train"] | DIVISIONS[division]}


def same(one: Path, other: Path) -> None:
    """Two files hold the same adapter and words, to 1e-5."""
    mine, theirs = read(one / "adapter.safetensors").state, read(other / "adapter.safetensors").state
    assert mine.layers.keys() == theirs.layers.keys() and mine.tokens.keys() == theirs.tokens.keys()
    for path, layer in mine.layers.items():
        for name, tensor in layer.tensors.items():
            difference = (tensor - theirs.layers[path].tensors[name]).abs().max()
            assert difference < 1e-5, f"{path}.{name} differs by {difference}"
    for name, token in mine.tokens.items():
        for root, rows in token.vectors.items():
            difference = (rows - theirs.tokens[name].vectors[root]).abs().max()
            assert difference < 1e-5, f"{name} of {root} differs by {difference}"


def alike(one: dict[str, Any], ranks: list[dict[str, Any]]) -> None:
    """Every process of a division found what one process alone found."""
    for found in ranks:
        assert found["weights"] == ranks[0]["weights"], "all processes hold the same weights, bit for bit"
        assert found["step"] == one["step"]
    assert not any(found["steps"] for found in ranks[1:]), "only the main process tells"
    first = ranks[0]
    assert (first["steps"], first["rates"], first["samples"]) == (one["steps"], one["rates"], one["samples"])
    assert first["losses"] == pytest.approx(one["losses"], abs=1e-5)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A short run in two processes, then one in which process 1 ends in an error: (folder, what was printed)."""
    run = tmp_path_factory.mktemp("two")
    masks = CASES["masks, a running mean, clipping and a poisoned picture"]
    short = {"steps": 6, "log_every": 1, "max_grad_norm": 1e-3}
    good = {**masks, "poison": {"27": "nan"}, "train": masks["train"] | short | {"batch": 4}}
    bad = {"train": TRAIN | {"steps": 6, "batch": 4, "checkpoint_every": 2}, "fail": [1, 3, "error"]}
    done = launched(run, 2, {"cases": {"good": good, "bad": bad}})
    assert done.returncode != 0
    (run / "wanted.json").write_text(json.dumps(good))
    return run, done.stderr


def test_two_processes_train_what_one_trains(two: tuple[Path, str], tmp_path: Path) -> None:
    run, _ = two
    wanted = json.loads((run / "wanted.json").read_text())
    alone = here(tmp_path, **divided(wanted, "one by eight"))
    ranks = facts(run / "good", 2)
    assert [found["world"] for found in ranks] == [2, 2]
    assert alone["steps"] == [1, 2, 3, 5, 6], "both skip the step with the poisoned picture"
    alike(alone, ranks)
    same(tmp_path, run / "good")


def test_an_error_of_one_process_ends_the_others_with_its_message(two: tuple[Path, str]) -> None:
    run, printed = two
    assert re.search(
        r"ProcessLost: process 1 \(pid \d+ on \S+\) ended the run: DataError: fox.png: it is not there any more",
        printed,
    ), printed[-4000:]
    assert not (run / "bad/facts-0.json").exists()
    found, notes = checkpoints.latest_valid(run / "bad")
    assert found is not None and found.name == "checkpoint-000002" and not notes


@pytest.fixture(scope="module")
def divisions(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Every case that is asked for in every division; two launches, with the cases one after the other in each."""
    own = (item for item in request.session.items if item.path == request.path and hasattr(item, "callspec"))
    asked = {item.callspec.params.get("case") for item in own}
    root = tmp_path_factory.mktemp("divisions")
    launches = {2: ("two by four", "two by two twice"), 4: ("four by two",)}
    for processes, names in launches.items():
        cases = {
            f"{case}, {name}": divided(CASES[case], name) for case in CASES if case in asked for name in names
        }
        done = launched(root, processes, {"cases": cases})
        assert done.returncode == 0, done.stderr[-4000:]
    yield root


@pytest.mark.parametrize("case", weighed(CASES, None, STANDING))
def test_every_division_trains_the_same(divisions: Path, tmp_path: Path, case: str) -> None:
    alone = here(tmp_path / "alone", **divided(CASES[case], "one by eight"))
    alike(alone, [here(tmp_path / "accumulated", **divided(CASES[case], "accumulated"))])
    same(tmp_path / "alone", tmp_path / "accumulated")
    for name, processes in (("two by four", 2), ("two by two twice", 2), ("four by two", 4)):
        alike(alone, facts(divisions / f"{case}, {name}", processes))
        same(tmp_path / "alone", divisions / f"{case}, {name}")


@pytest.mark.slow
def test_a_run_goes_on_in_another_number_of_processes(tmp_path: Path) -> None:
    """2 processes, then 1, then 4."""
    wanted = {"train": TRAIN | {"ema": 0.9}}
    straight = here(tmp_path / "straight", **divided(wanted, "one by eight"))
    run, losses = tmp_path / "run", list[float]()
    for processes, division, until in (
        (2, "two by four", 20),
        (1, "one by eight", 33),
        (4, "four by two", 0),
    ):
        case = divided(wanted, division) | ({"resume": "latest"} if losses else {})
        if until:
            case["interrupt_after_step"] = until
        found = start(run, processes, **case)[0]
        assert found["reason"] == ("interrupted" if until else "complete")
        losses += found["losses"]
    assert losses == pytest.approx(straight["losses"], abs=1e-5)
    same(tmp_path / "straight", run)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "rank", "how"),
    [("torchrun", 1, "kill"), ("torchrun", 0, "kill"), ("accelerate", 1, "kill"), ("accelerate", 1, "error")],
)
def test_a_killed_process_ends_the_run_and_is_named(
    tmp_path: Path, launcher: str, rank: int, how: str
) -> None:
    train = TRAIN | {"batch": 4, "steps": 500, "checkpoint_every": 4}
    done = launched(tmp_path, 2, {"train": train, "fail": [rank, 10, how]}, launcher)
    ended = time.time()
    failed = json.loads((tmp_path / "failed.json").read_text())
    assert done.returncode != 0 and ended - failed["time"] < 60
    said = "is gone: killed" if how == "kill" else "ended the run: DataError: fox.png"
    assert re.search(rf"process {rank} \(pid {failed['pid']} on \S+\) {said}", done.stderr), done.stderr[
        -4000:
    ]
    found, _ = checkpoints.latest_valid(tmp_path)
    assert found is not None and found.name == "checkpoint-000008"


@pytest.mark.slow
def test_a_process_that_hangs_is_named_after_the_timeout(tmp_path: Path) -> None:
    train = TRAIN | {"batch": 4, "steps": 500, "checkpoint_every": 4, "process_timeout": 5}
    done = launched(tmp_path, 2, {"train": train, "fail": [1, 10, "stop"]})
    assert done.returncode != 0
    failed = json.loads((tmp_path / "failed.json").read_text())
    said = rf"process 1 \(pid {failed['pid']} on \S+\) has given no sign of life for 5 s"
    assert re.search(said, done.stderr), done.stderr[-4000:]
    assert checkpoints.latest_valid(tmp_path)[0] is not None


@pytest.mark.slow
def test_processes_that_would_train_something_else_are_told_apart(tmp_path: Path) -> None:
    train = TRAIN | {"batch": 4, "steps": 5}
    done = launched(tmp_path, 2, {"train": train, "seed_by_rank": True})
    assert done.returncode != 0
    assert "would train something else than process 0" in done.stderr and "seed: 0 -> 1" in done.stderr


@pytest.mark.slow
def test_a_signal_to_one_process_stops_both_after_the_same_step(tmp_path: Path) -> None:
    train = {"batch": 2, "steps": 6, "checkpoint_every": 10, "schedule": {"name": "constant"}}
    train["optimizer"] = {"learning_rate": 1e-3}
    straight = start(tmp_path / "straight", 2, train=train)
    stopped = start(tmp_path / "run", 2, train=train, interrupt_after_step=3)
    assert [(found["reason"], found["step"]) for found in stopped] == [("interrupted", 3)] * 2
    resumed = start(tmp_path / "run", 2, train=train, resume="latest")
    assert resumed[0]["steps"] == [4, 5, 6]
    assert resumed[0]["weights"] == resumed[1]["weights"] == straight[0]["weights"]
