"""Memory that a run is predicted to take beside what it takes: each run is a process of its own, each forecast another.

Predicted is what `scumble.plan(..., steps=0)` says, which reads no weight. Measured is the most that the process
held (VmHWM) over what it held before the run, with all its libraries loaded and used once in a toy run. Both are told
for each moment of the run: the high-water mark is set back where one begins.

    python benchmarks/plan.py                          # SD 1.5's shape, half and a third of its widths: half an hour
    python benchmarks/plan.py --only third             # a third of the widths: 1.5 GB, some minutes
    python benchmarks/plan.py --tiny                   # to see that it runs

Weights are random: memory does not depend on them. Needs 3 GB of disk and 7 GB of memory. Writes benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from machine import machine

RESULTS = Path(__file__).parent / "results"
WIDTHS = {
    "sd15": (320, 640, 1280, 1280),
    "half": (160, 320, 640, 640),
    "third": (96, 192, 384, 384),
    "tiny": (32, 32, 64, 64),
}
BLOCKS = ("unet.up_blocks.*", "unet.down_blocks.0.*")
ROWS: tuple[dict[str, Any], ...] = (
    {"shape": "third", "pixels": 256, "batch": 1, "precision": "no", "recomputed": False},
    {"shape": "third", "pixels": 256, "batch": 4, "precision": "no", "recomputed": False},
    {"shape": "third", "pixels": 256, "batch": 4, "precision": "no", "recomputed": True},
    {"shape": "third", "pixels": 256, "batch": 4, "precision": "bf16", "recomputed": BLOCKS},
    {"shape": "third", "pixels": 512, "batch": 1, "precision": "bf16", "recomputed": False},
    {"shape": "third", "pixels": 512, "batch": 1, "precision": "no", "recomputed": False},
    {"shape": "half", "pixels": 256, "batch": 1, "precision": "no", "recomputed": False},
    {"shape": "half", "pixels": 256, "batch": 4, "precision": "bf16", "recomputed": False},
    {"shape": "half", "pixels": 512, "batch": 1, "precision": "no", "recomputed": False},
    {"shape": "half", "pixels": 512, "batch": 1, "precision": "no", "recomputed": True},
    {"shape": "half", "pixels": 512, "batch": 1, "precision": "bf16", "recomputed": BLOCKS},
    {"shape": "sd15", "pixels": 256, "batch": 1, "precision": "bf16", "recomputed": False},
    {"shape": "sd15", "pixels": 256, "batch": 2, "precision": "no", "recomputed": False},
    {"shape": "sd15", "pixels": 512, "batch": 1, "precision": "bf16", "recomputed": False},
    {"shape": "sd15", "pixels": 512, "batch": 1, "precision": "bf16", "recomputed": True},
    {"shape": "sd15", "pixels": 512, "batch": 1, "precision": "no", "recomputed": False},
    {"shape": "sd15", "pixels": 512, "batch": 1, "precision": "no", "recomputed": True},
    {"shape": "sd15", "pixels": 512, "batch": 2, "precision": "bf16", "recomputed": BLOCKS},
)
# at 64 pixels the middle's attention would see one place alone, and its queries never train
TINY_ROWS: tuple[dict[str, Any], ...] = (
    {"shape": "tiny", "pixels": 128, "batch": 2, "precision": "no", "recomputed": ("unet.up_blocks.*",)},
)


def main() -> None:
    """Every row: predict, measure, print; then write."""
    options = arguments()
    if options.make:
        make(options.make, options.shape)
    elif options.predict:
        print(json.dumps(predicted(json.loads(options.predict))))
    elif options.measure:
        print(json.dumps(measured(json.loads(options.measure), options.toy)))
    else:
        compare(options)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=WIDTHS, help="rows of one shape")
    parser.add_argument("--rows", type=int, nargs="+", help="numbers of rows, from 0")
    parser.add_argument("--tiny", action="store_true", help="one row of toy size")
    parser.add_argument(
        "--output", type=Path, default=RESULTS / "plan.json", help="the JSON file; rows are added"
    )
    for inner in ("make", "toy"):
        parser.add_argument(f"--{inner}", type=Path, help=argparse.SUPPRESS)
    for inner in ("shape", "predict", "measure"):
        parser.add_argument(f"--{inner}", help=argparse.SUPPRESS)
    return parser.parse_args()


def compare(options: argparse.Namespace) -> None:
    """The table, as text and as JSON; a row of the file that is measured again is replaced."""
    rows = list(TINY_ROWS if options.tiny else ROWS)
    rows = [rows[number] for number in options.rows] if options.rows else rows
    rows = [row for row in rows if options.only in (None, row["shape"])]
    known = json.loads(options.output.read_text())["runs"] if options.output.is_file() else []
    found: dict[str, dict[str, Any]] = {key(run): run for run in known}
    with tempfile.TemporaryDirectory(prefix="plan-") as work:
        picture(Path(work) / "pictures")
        toy = Path(work) / "toy"
        again("--make", toy, "--shape", "tiny")
        for row in rows:
            base = Path(work) / row["shape"]
            if not base.exists():
                again("--make", base, "--shape", row["shape"])
            settings = json.dumps(told(row, base, Path(work) / "pictures", Path(work) / "run"))
            forecast = json.loads(again("--predict", settings).splitlines()[-1])
            held = json.loads(again("--measure", settings, "--toy", toy).splitlines()[-1])
            most, real = max(forecast.values()), max(held.values())
            run = {
                **row,
                "predicted GB": most / 1e9,
                "measured GB": real / 1e9,
                "error": most / real - 1,
                "predicted moment": max(forecast, key=lambda name: forecast[name]),
                "measured moment": max(held, key=lambda name: held[name]),
                "predicted by moment": {name: size / 1e9 for name, size in forecast.items()},
                "measured by moment": {name: size / 1e9 for name, size in held.items()},
            }
            found[key(run)] = run
            print(
                f"{row['shape']:>5} {row['pixels']} px  batch {row['batch']}  {row['precision']:>4}  "
                f"{said(row['recomputed']):<10} predicted {most / 1e9:6.3f} GB in {run['predicted moment']:<10} "
                f"measured {real / 1e9:6.3f} in {run['measured moment']:<10} {100 * run['error']:+5.1f} %",
                flush=True,
            )
            options.output.parent.mkdir(parents=True, exist_ok=True)
            result = {"benchmark": "plan", "runs": list(found.values()), "machine": machine()}
            options.output.write_text(json.dumps(result, indent=2) + "\n")
    print(f"wrote {options.output}")


def key(run: dict[str, Any]) -> str:
    """What a row is about."""
    return json.dumps([run[name] for name in ("shape", "pixels", "batch", "precision", "recomputed")])


def said(recomputed: Any) -> str:
    """In a word."""
    return {False: "kept", True: "recomputed"}[recomputed] if isinstance(recomputed, bool) else "some"


def told(row: dict[str, Any], base: Path, pictures: Path, run: Path) -> dict[str, Any]:
    """The settings of a row's run."""
    return {
        "base": str(base),
        "output": str(run),
        "data": {"images": str(pictures), "caption": "a picture", "resolution": row["pixels"]},
        "adapter": {"rank": 4},
        "device": "cpu",
        "train": {
            "steps": 2,
            "batch": row["batch"],
            "precision": row["precision"],
            "gradient_checkpointing": row["recomputed"],
            "optimizer": {"learning_rate": 1e-2},  # two steps must show in bf16
        },
    }


def predicted(settings: dict[str, Any]) -> dict[str, int]:
    """Bytes by moment, as the plan says."""
    import scumble

    forecast = scumble.plan(steps=0, **settings).forecast  # type: ignore[attr-defined]
    return {moment.name: moment.total for moment in forecast.moments}


def measured(settings: dict[str, Any], toy: Path) -> dict[str, int]:
    """Bytes by moment, as the system says."""
    import scumble
    from scumble.models.heap import give_back

    with tempfile.TemporaryDirectory(prefix="plan-toy-") as folder:
        small = {**settings["data"], "resolution": 128}
        scumble.train(quiet=True, **{**settings, "base": str(toy), "output": folder + "/toy", "data": small})
    give_back()
    before, found = status("VmRSS"), dict[str, int]()

    def closed(name: str) -> None:
        """What was held since the mark was set back belongs to `name`."""
        found[name] = max(found.get(name, 0), status("VmHWM") - before)
        Path("/proc/self/clear_refs").write_text("5")

    closed("before")
    hook(closed)
    scumble.train(quiet=True, overwrite=True, **settings)
    closed("proof")
    del found["before"]
    return found


def hook(closed: Callable[[str], None]) -> None:
    """Have `closed` told the end of each moment."""
    import scumble.data.loader as loader
    import scumble.methods.parts as parts
    import scumble.runs.build as build
    import scumble.training.loop as loop

    def around(place: Any, name: str, moment: str) -> None:
        own = getattr(place, name)

        def watched(*given: Any, **told: Any) -> Any:
            try:
                return own(*given, **told)
            finally:
                closed(moment)

        setattr(place, name, watched)

    around(build, "load_base", "loading")
    around(build, "check_prediction", "checking the base")
    around(loader.Loader, "prepare", "encoding")
    around(loop, "_train_phase", "training")
    around(parts, "_answers", "proof")


def status(name: str) -> int:
    """A figure of /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(f"{name}:"))
    return 1024 * int(line.split()[1])


def make(folder: Path, shape: str) -> None:
    """A base with random weights as a diffusers folder, in bf16."""
    import torch
    from bases import write_sd1

    widths = WIDTHS[shape]
    vae = tuple(width * 2 // 5 for width in widths[:2]) + (widths[2] * 2 // 5,) * 2
    text = {"sd15": 768, "half": 384, "third": 256, "tiny": 64}[shape]
    write_sd1(
        folder,
        dtype=torch.bfloat16,
        widths=widths,
        vae=tuple(max(32, width // 32 * 32) for width in vae),
        text=text,
        heads=text // 32,
        sample_size=32,
    )


def picture(folder: Path) -> None:
    """One picture of noise, 512 pixels wide."""
    import numpy
    from PIL import Image

    folder.mkdir()
    levels = numpy.random.default_rng(0).integers(0, 256, (512, 512, 3), dtype=numpy.uint8)
    Image.fromarray(levels).save(folder / "noise.png")


def again(*inner: Any) -> str:
    """This file as another process; what it printed."""
    command = [sys.executable, __file__, *map(str, inner)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command[:3])} failed:\n{done.stderr}")
    return done.stdout


if __name__ == "__main__":
    main()
