"""Several processes, really: gloo on the CPU, started as `torchrun` does, under Accelerate."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from scumble.formats import read

ROOT = Path(__file__).parents[2]
TRAIN = {
    "steps": 20,
    "checkpoint_every": 10,
    "optimizer": {"learning_rate": 1e-3},
    "schedule": {"name": "cosine", "warmup_steps": 5},
}


def start(
    run: Path, processes: int, *, child: dict[str, Any] | None = None, **train: Any
) -> list[dict[str, Any]]:
    """Train in `processes` processes; what each found. `child`: see child.py."""
    run.mkdir(exist_ok=True)
    wanted = {"train": TRAIN | train, **(child or {})}
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    script = [str(ROOT / "tests/training/child.py"), str(run), json.dumps(wanted)]
    path = os.pathsep.join((str(ROOT / "src"), str(ROOT)))
    done = subprocess.run(
        [sys.executable, *(launcher if processes > 1 else []), *script],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads((run / f"facts-{rank}.json").read_text()) for rank in range(processes)]


@pytest.mark.slow
def test_one_by_eight_is_two_by_four_is_two_by_two_twice(tmp_path: Path) -> None:
    (one,) = start(tmp_path / "one", 1, batch=8)
    two = start(tmp_path / "two", 2, batch=4)
    both = start(tmp_path / "both", 2, batch=2, accumulate=2)
    for ranks in (two, both):
        assert [facts["world"] for facts in ranks] == [2, 2]
        assert ranks[0]["weights"] == ranks[1]["weights"], "both processes hold the same weights, bit for bit"
        assert ranks[0]["rates"] == one["rates"]
        assert ranks[0]["samples"] == one["samples"] == [8] * 20
        assert ranks[0]["losses"] == pytest.approx(one["losses"], abs=1e-5)
        assert not ranks[1]["steps"], "only the main process tells"
    states = [read(tmp_path / name / "adapter.safetensors").state for name in ("one", "two", "both")]
    for path, layer in states[0].layers.items():
        for name, tensor in layer.tensors.items():
            for other in states[1:]:
                assert torch.allclose(tensor, other.layers[path].tensors[name], atol=1e-5), f"{path}.{name}"


@pytest.mark.slow
def test_a_poisoned_picture_of_one_process_is_skipped_by_both(tmp_path: Path) -> None:
    # 2 x 2 pictures a step: position 14 is the first of process 1 in step 4
    ranks = start(tmp_path / "run", 2, batch=2, steps=6, child={"poison": {"14": "nan"}})
    assert ranks[0]["steps"] == [1, 2, 3, 5, 6]
    assert ranks[0]["weights"] == ranks[1]["weights"]


@pytest.mark.slow
def test_a_signal_to_one_process_stops_both_after_the_same_step(tmp_path: Path) -> None:
    options = {"batch": 2, "steps": 6, "schedule": {"name": "constant"}}
    straight = start(tmp_path / "straight", 2, **options)
    stopped = start(tmp_path / "run", 2, child={"interrupt_after_step": 3}, **options)
    assert [(facts["reason"], facts["step"]) for facts in stopped] == [("interrupted", 3)] * 2
    resumed = start(tmp_path / "run", 2, child={"resume": "latest"}, **options)
    assert resumed[0]["steps"] == [4, 5, 6]
    assert resumed[0]["weights"] == resumed[1]["weights"] == straight[0]["weights"]
