"""Golden losses: the first ten of each family x method on the tiny base. Numbers do not move by accident.

When they move on purpose, run `python tests/golden/test_losses.py` from the repository's root (with
`PYTHONPATH=src:.` where scumble is not installed; perhaps with the names of some cases), and say why in CHANGELOG.md.
"""

from __future__ import annotations

import itertools
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from scumble.adapters.lora import LoraSettings
from scumble.methods.method import METHODS
from scumble.models import FAMILIES
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
    for family in ("sd1", "sd2", "sdxl")
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
CASES |= {
    f"text-to-image-{family}": {"family": family, "train": PLAIN}
    for family in ("sd1-inpainting", "sd2-inpainting", "sdxl-inpainting")
}
PRIOR = {"class_prompt": "a dog", "prior_weight": 0.5}
CASES |= {
    f"dreambooth-{name}": {"family": "sd1", "train": PLAIN, "method": "dreambooth", "options": options}
    for name, options in (
        ("prior-images", {"prior": "images", **PRIOR}),
        ("prior-prediction", {"prior": "prediction", **PRIOR}),
        (
            "text-encoder",
            {"train_text_encoder": True, "text_encoder_until": 0.5, "text_encoder_learning_rate": 1e-3},
        ),
    )
}
WORD = {"placeholders": "picture", "vectors": 2}  # the tiny base's captions are "picture 0", "picture 1", ...
CASES |= {
    name: {"family": "sd1", "train": PLAIN, "method": method, "options": {**WORD, **options}}
    for name, method, options in (
        ("textual-inversion", "textual-inversion", {"initial": "the"}),
        ("pivotal", "pivotal", {"inversion_steps": 5}),
        ("pivotal-joint", "pivotal", {"inversion_steps": 5, "joint": True, "train_text_encoder": True}),
    )
}
CASES["slider"] = {
    "family": "sd1",
    "train": PLAIN | {"held_out_every": 0},  # it learns without pictures, so none are held out
    "method": "slider",
    "options": {
        "positive": "a big fox",
        "negative": "a small fox",
        "neutral": "a fox",
        "preserve": ("in the snow", "at night"),
        "eta": 20.0,
        "paths": 3,
        "path_steps": 4,
    },
}

CASES |= {
    f"{name}-sdxl": {**CASES[name], "family": "sdxl"}
    for name in (
        *("dreambooth-prior-images", "dreambooth-prior-prediction", "dreambooth-text-encoder"),
        *("textual-inversion", "pivotal", "pivotal-joint", "slider"),
    )
}

CASES |= {
    f"{name}-{family}": {**CASES[name], "family": family}
    for family in ("sd2", "sd1-inpainting", "sd2-inpainting", "sdxl-inpainting")
    for name in ("dreambooth-prior-prediction", "textual-inversion", "pivotal-joint", "slider")
}

FLOW = {
    "measured": "clean",
    "weighting": "cosmap",
    "timesteps": {"distribution": "logit-normal", "shift": 1.0},
}
CASES |= {
    "text-to-image-sd3": {"family": "sd3", "train": PLAIN},
    "text-to-image-sd3-weighted": {"family": "sd3", "train": PLAIN | {"objective": FLOW}},
    "dreambooth-sd3": {
        "family": "sd3",
        "train": PLAIN,
        "method": "dreambooth",
        "options": {"prior": "prediction", **PRIOR},
    },
    "pivotal-sd3": {**CASES["pivotal-joint"], "family": "sd3"},
    "textual-inversion-sd3": {**CASES["textual-inversion"], "family": "sd3"},
    "slider-sd3": {**CASES["slider"], "family": "sd3"},
}
CASES |= {
    "text-to-image-flux": {"family": "flux", "train": PLAIN},
    "text-to-image-flux-weighted": {
        "family": "flux",
        "train": PLAIN | {"objective": {"guidance": 3.5, "timesteps": {"shift": "resolution"}}},
    },
    "dreambooth-flux": {**CASES["dreambooth-sd3"], "family": "flux"},
    "dreambooth-text-encoder-flux": {**CASES["dreambooth-text-encoder"], "family": "flux"},
    "pivotal-flux": {**CASES["pivotal-joint"], "family": "flux"},
    "textual-inversion-flux": {**CASES["textual-inversion"], "family": "flux"},
    "slider-flux": {**CASES["slider"], "family": "flux"},
}


def measure(case: str, folder: Path) -> dict[str, Any]:
    settings = TrainSettings.model_validate(CASES[case]["train"])
    plan, _ = make_plan(
        settings,
        family=CASES[case]["family"],
        adapter=LoraSettings(rank=4),
        held_out=True,
        method=CASES[case].get("method", "text-to-image"),
        options=CASES[case].get("options"),
    )
    listener = Listener()
    train(plan, folder, settings, [listener], Streams(settings.seed))
    steps, held = listener.all(StepDone), listener.all(HeldOut)
    return {
        "losses": [event.loss for event in steps],
        "gradient norms": [event.gradient_norm for event in steps],
        "held out": [loss for event in held for loss in (event.adapter, event.base)],
    }


@pytest.mark.parametrize("case", CASES)
def test_the_first_ten_losses_are_where_they_were(case: str, tmp_path: Path) -> None:
    golden = json.loads((HERE / f"{case}.json").read_text())
    found = measure(case, tmp_path)
    assert found.keys() == golden.keys()
    for name, values in golden.items():
        assert found[name] == pytest.approx(values, rel=TOLERANCE, abs=TOLERANCE), name


def test_every_base_family_has_a_curve_of_every_method() -> None:
    mine = [name for name in FAMILIES if FAMILIES.get(name).__module__.startswith("scumble.")]  # no plug-in's
    methods = [name for name in METHODS if METHODS.get(name).__module__.startswith("scumble.")]
    found = {(case["family"], case.get("method", "text-to-image")) for case in CASES.values()}
    assert set(itertools.product(mine, methods)) <= found
    assert {file.stem for file in HERE.glob("*.json")} == set(CASES)


if __name__ == "__main__":
    for name in sys.argv[1:] or CASES:
        with tempfile.TemporaryDirectory() as folder:
            (HERE / f"{name}.json").write_text(json.dumps(measure(name, Path(folder)), indent=1) + "\n")
