"""Golden losses: the first ten of each family x method on the tiny base. Numbers do not move by accident.

When they move on purpose, run `python tests/golden/test_losses.py` from the repository's root (with
`PYTHONPATH=src:.` where scumble is not installed), and say why in CHANGELOG.md.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest

from scumble.adapters.lora import LoraSettings
from scumble.rng import Streams
from scumble.training.events import HeldOut, StepDone
from scumble.training.loop import train
from scumble.training.settings import TrainSettings
from tests.training.world import Listener, make_plan

HERE = Path(__file__).parent
TOLERANCE = 1e-4
PLAIN = {
    "steps": 10,
    "batch": 2,
    "checkpoint_every": 0,
    "held_out_every": 10,
    "optimizer": {"learning_rate": 1e-2},
}
CASES: dict[str, dict[str, Any]] = {
    f"text-to-image-{family}{name}": {"family": family, "train": PLAIN | train}
    for family in ("sd1", "sd2")
    for name, train in (
        ("", {}),
        (
            "-weighted",
            {
                "objective": {"snr_gamma": 5.0, "noise_offset": 0.1, "loss": "huber"},
                "schedule": {"name": "cosine"},
            },
        ),
    )
}


def measure(case: str, folder: Path) -> dict[str, Any]:
    settings = TrainSettings.model_validate(CASES[case]["train"])
    plan, _ = make_plan(settings, family=CASES[case]["family"], adapter=LoraSettings(rank=4), held_out=True)
    listener = Listener()
    train(plan, folder, settings, [listener], Streams(settings.seed))
    steps, (held,) = listener.all(StepDone), listener.all(HeldOut)
    return {
        "losses": [event.loss for event in steps],
        "gradient norms": [event.gradient_norm for event in steps],
        "held out": [held.adapter, held.base],
    }


@pytest.mark.parametrize("case", CASES)
def test_the_first_ten_losses_are_where_they_were(case: str, tmp_path: Path) -> None:
    golden = json.loads((HERE / f"{case}.json").read_text())
    found = measure(case, tmp_path)
    assert found.keys() == golden.keys()
    for name, values in golden.items():
        assert found[name] == pytest.approx(values, rel=TOLERANCE, abs=TOLERANCE), name


if __name__ == "__main__":
    for name in CASES:
        with tempfile.TemporaryDirectory() as folder:
            (HERE / f"{name}.json").write_text(json.dumps(measure(name, Path(folder)), indent=1) + "\n")
