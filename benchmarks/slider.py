"""Does a slider's strength turn one thing and leave the rest? Size, from -2 to 2, judged by the oracle.

    python benchmarks/slider.py                       # about five minutes on two free cores
    python benchmarks/slider.py --steps 100 --prompts 6 --out runs/slider

Trains `method = "slider"` from prompts alone on the embedded base, draws prompts that name no size from the same
seeds at five strengths, and writes `benchmarks/results/slider.json` and `docs/slider.png`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from machine import machine

from scumble import Request, Session, train
from scumble.evaluation.bootstrap import estimate
from scumble.inference.drawing import grid
from scumble.inference.request import AdapterUse
from scumble.picturebook import oracle
from scumble.picturebook.captions import BACKGROUND_PHRASES, caption
from scumble.picturebook.scenes import BACKGROUNDS, SIZES, SUBJECTS, Scene, Thing, random_scene
from scumble.rng import Streams

HERE = Path(__file__).parent
STRENGTHS = (-2.0, -1.0, 0.0, 1.0, 2.0)
PRESERVE = tuple(
    f"{color} {subject} {BACKGROUND_PHRASES[background][0]}"
    for color, subject, background in (
        ("orange", "fox", "snow"), ("blue", "car", "meadow"), ("red", "boat", "sea"), ("pink", "rabbit", "room"),
        ("white", "house", "desert"), ("yellow", "bird", "sky"), ("green", "turtle", "beach"),
        ("purple", "rocket", "night"),
        ("brown", "castle", "meadow"), ("black", "cat", "room"), ("orange", "fish", "sea"), ("red", "mushroom", "snow"),
    )
)  # fmt: skip
SETTINGS: dict[str, Any] = {
    "base": "picturebook",
    "method": "slider",
    "adapter": {"rank": 8, "targets": "attention+mlp"},
    "slider": {
        "positive": "a big {}",
        "negative": "a small {}",
        "neutral": "a {}",
        "preserve": PRESERVE,
        "paths": 48,
        "path_steps": 12,
    },
    "train": {
        "steps": 200,
        "batch": 6,
        "checkpoint_every": 0,
        "optimizer": {"learning_rate": 2e-3},
        "schedule": {"name": "cosine", "warmup_steps": 10},
    },
}


def scenes_without_size(count: int) -> list[Scene]:
    """Scenes of one thing of no said size, none of them named in training."""
    found = []
    for number in range(count):
        rng = Streams(4).python("slider benchmark", number)
        scene = random_scene(rng, things=1, held_out=None)
        thing = scene.things[0]
        found.append(Scene((Thing(thing.subject, thing.color),), scene.background))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=SETTINGS["train"]["steps"])
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--eta", type=float, default=1.0)
    parser.add_argument("--denoising-steps", type=int, default=25)
    parser.add_argument("--shown", type=int, default=4, help="prompts on the sheet")
    parser.add_argument("--out", type=Path, default=None, help="keep the run here")
    parser.add_argument("--json", type=Path, default=HERE / "results" / "slider.json")
    parser.add_argument("--sheet", type=Path, default=HERE.parent / "docs" / "slider.png")
    arguments = parser.parse_args()
    out = arguments.out or Path(tempfile.mkdtemp(prefix="scumble-slider-"))
    settings = SETTINGS | {
        "train": SETTINGS["train"] | {"steps": arguments.steps},
        "slider": SETTINGS["slider"] | {"eta": arguments.eta},
    }
    result = train(**settings, output=out, overwrite=True, quiet=True)
    assert result.adapter is not None
    asked = scenes_without_size(arguments.prompts)
    drawn: dict[float, list[Any]] = {}
    with Session("picturebook", [result.adapter]) as session:
        for strength in STRENGTHS:
            drawn[strength] = []
            for seed, scene in enumerate(asked):
                use = AdapterUse(path=result.adapter, strength=strength)
                request = Request(
                    prompt=caption(scene), seed=seed, steps=arguments.denoising_steps, adapters=(use,)
                )
                drawn[strength] += [drawing.image for drawing in session.generate(request)]
    rows: dict[str, dict[str, Any]] = {}
    for strength, pictures in drawn.items():
        readings = oracle.read(pictures)
        size = np.array([[float(SIZES.index(reading.size))] for reading in readings])
        row: dict[str, Any] = {"size, 0 small to 2 big": estimate(size).as_json()}
        for word in ("subject", "color", "background"):
            right = [[float(r.agrees(s, word))] for r, s in zip(readings, asked, strict=True)]
            row[word] = estimate(np.array(right)).as_json()
        rows[f"{strength:g}"] = row
        said = ", ".join(f"{word} {numbers['value']:.2f}" for word, numbers in row.items())
        print(f"strength {strength:+g}: {said}", flush=True)
    sizes = [row["size, 0 small to 2 big"]["value"] for row in rows.values()]
    monotone = all(a <= b for a, b in itertools.pairwise(sizes))
    print(f"size grows with strength: {monotone}; training {result.seconds:.0f} s")
    arguments.sheet.parent.mkdir(exist_ok=True)
    grid(
        [
            [drawn[strength][number] for strength in STRENGTHS]
            for number in range(min(arguments.shown, len(asked)))
        ],
        columns=[f"{strength:+g}" for strength in STRENGTHS],
        labels=[caption(scene) for scene in asked[: arguments.shown]],
        scale=2,
    ).save(arguments.sheet)
    report = {
        "prompts": arguments.prompts,
        "subjects known to the base": len(SUBJECTS),
        "backgrounds": len(BACKGROUNDS),
        "settings": settings,
        "strengths": rows,
        "size grows with strength": monotone,
        "training seconds": round(result.seconds, 1),
        "file bytes": result.adapter.stat().st_size,
        "machine": machine(),
    }
    arguments.json.parent.mkdir(exist_ok=True)
    arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
