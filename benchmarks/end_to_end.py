"""A whole run, start-up included: `scumble train` beside diffusers' own train_text_to_image_lora.py.

    git clone https://github.com/huggingface/diffusers ~/diffusers
    python benchmarks/end_to_end.py --diffusers ~/diffusers --steps 100
    python benchmarks/end_to_end.py --diffusers ~/diffusers --base sd15 --resolution 512 --batch 1 --precision bf16

Both run as they are, each as a process of its own, on one base folder and one folder of pictures, with the same steps,
batch, resolution, rank, rate and precision, in turns. What is compared is pictures per second of the whole process:
imports, loading, encoding, training, saving, and scumble's proof of what it saved. Neither finds a cache.

Where torchvision can't be imported, the script is lent the few transforms that it uses, made of PIL and torch; the JSON
says so. Writes benchmarks/results/. Target: 1.5 times the script's pictures per second over 100 steps.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from bases import write_sd1
from machine import machine

RESULTS = Path(__file__).parent / "results"
SCRIPT = Path("examples/text_to_image/train_text_to_image_lora.py")
TRANSFORMS = '''"""The transforms that diffusers' script uses."""
import enum, random
import numpy, torch
from PIL import Image


class InterpolationMode(enum.Enum):
    BILINEAR = Image.BILINEAR
    BICUBIC = Image.BICUBIC
    LANCZOS = Image.LANCZOS
    NEAREST = Image.NEAREST
    BOX = Image.BOX
    HAMMING = Image.HAMMING


class Compose(list):
    def __init__(self, steps):
        super().__init__(steps)

    def __call__(self, value):
        for step in self:
            value = step(value)
        return value


def Lambda(function):
    return function


def Resize(size, interpolation):
    def resize(image):
        scale = size / min(image.size)
        return image.resize([max(size, round(side * scale)) for side in image.size], interpolation.value)
    return resize


def _crop(size, place):
    def crop(image):
        left, top = (place(side - size) for side in image.size)
        return image.crop((left, top, left + size, top + size))
    return crop


def CenterCrop(size):
    return _crop(size, lambda room: room // 2)


def RandomCrop(size):
    return _crop(size, lambda room: random.randint(0, room))


def RandomHorizontalFlip():
    return lambda image: image.transpose(Image.FLIP_LEFT_RIGHT) if random.random() < 0.5 else image


def ToTensor():
    return lambda image: torch.from_numpy(numpy.array(image)).permute(2, 0, 1).float() / 255


def Normalize(mean, std):
    return lambda tensor: (tensor - mean[0]) / std[0]
'''

LAUNCH = """# What else looks for torchvision must not find the stand-ins: it has looked by then.
import runpy, sys, types
import datasets, diffusers
from transformers.utils import import_utils
import_utils.is_torchvision_available()
import lent_transforms
package = types.ModuleType("torchvision")
package.transforms = lent_transforms
sys.modules.update({"torchvision": package, "torchvision.transforms": lent_transforms})
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def main() -> None:
    """Make base and pictures, run both in turns, print, write."""
    options = arguments()
    script = options.diffusers / SCRIPT
    if not script.is_file():
        raise SystemExit(
            f"{script} is not there: --diffusers is the folder of a clone of huggingface/diffusers."
        )
    with tempfile.TemporaryDirectory(prefix="end-to-end-") as folder:
        work = Path(folder)
        base = base_folder(options.base, work)
        pictures(work / "pictures", options.pictures, options.resolution)
        lent = lend_transforms(work / "lent")
        seconds: dict[str, list[float]] = {"script": [], "scumble": []}
        for repetition in range(options.repeats):
            names = list(seconds) if repetition % 2 == 0 else list(seconds)[::-1]
            for name in names:
                place = work / f"{name}-{repetition}"
                if name == "script":
                    command = [
                        *([str(lent)] if lent else []),
                        str(script),
                        *theirs(base, work, place, options),
                    ]
                else:
                    command = ["-m", "scumble", "train", *ours(base, work, place, options)]
                seconds[name].append(timed(command, work))
            print("  ".join(f"{name} {each[-1]:7.1f} s" for name, each in seconds.items()), flush=True)
    seen = options.steps * options.batch
    ratios = [a / b for a, b in zip(seconds["script"], seconds["scumble"], strict=True)]
    middle = statistics.median(ratios)
    rates = {name: seen / statistics.median(each) for name, each in seconds.items()}
    print("pictures per second  " + "  ".join(f"{name} {rate:.3f}" for name, rate in rates.items()))
    print(
        f"scumble/script  median {middle:.2f}   from {min(ratios):.2f} to {max(ratios):.2f}   n={len(ratios)}"
    )
    result = {
        "benchmark": "end_to_end",
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "what": {
            name: getattr(options, name)
            for name in ("base", "steps", "batch", "resolution", "precision", "pictures")
        },
        "script": {
            "sha256": digest(script),
            "transforms": "stand-ins" if lent else f"torchvision {version('torchvision')}",
        },
        "pictures_per_second": rates,
        "scumble/script": {"median": middle, "least": min(ratios), "most": max(ratios), "each": ratios},
        "seconds": seconds,
        "machine": machine() | {"load_at_end": round(os.getloadavg()[0], 2)},
    }
    name = Path(options.base).name
    path = (
        options.output
        or RESULTS / f"end_to_end-{name}-{options.precision}-{options.resolution}-b{options.batch}.json"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(f"wrote {path}")


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--diffusers", type=Path, required=True, help="a clone of huggingface/diffusers")
    parser.add_argument(
        "--base",
        default="picturebook",
        help="picturebook; sd15, random weights of that shape (needs 4 GB of disk); tiny; or a diffusers folder",
    )
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--resolution", type=int, default=64)
    parser.add_argument("--precision", choices=("no", "bf16", "fp16"), default="no")
    parser.add_argument("--pictures", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, help="the JSON file; default in benchmarks/results/")
    return parser.parse_args()


def base_folder(name: str, work: Path) -> Path:
    """A folder in diffusers' layout."""
    if name == "picturebook":
        from scumble import picturebook

        return picturebook.path()
    if name == "tiny":
        from scumble.models.tiny import save

        return save("sd1", work / "base")
    return write_sd1(work / "base") if name == "sd15" else Path(name).resolve()


def pictures(folder: Path, count: int, side: int) -> None:
    """Pictures of coloured boxes with their captions, as `datasets` reads a folder."""
    from PIL import Image, ImageDraw

    folder.mkdir()
    draw, lines = random.Random(0), []
    for number in range(count):
        picture = Image.new("RGB", (side, side), tuple(draw.randrange(256) for _ in range(3)))
        corner = [draw.randrange(side // 2) for _ in range(2)]
        box = (*corner, *(place + side // 3 for place in corner))
        ImageDraw.Draw(picture).rectangle(box, fill=tuple(draw.randrange(256) for _ in range(3)))
        picture.save(folder / f"{number:03}.png")
        lines.append(json.dumps({"file_name": f"{number:03}.png", "text": f"a box, number {number}"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")


def lend_transforms(folder: Path) -> Path | None:
    """A file that starts a script with stand-ins for torchvision's transforms; None where torchvision works."""
    asked = [sys.executable, "-c", "from torchvision import transforms"]
    if subprocess.run(asked, capture_output=True, check=False).returncode == 0:
        return None
    folder.mkdir()
    (folder / "lent_transforms.py").write_text(TRANSFORMS)
    (folder / "launch.py").write_text(LAUNCH)
    return folder / "launch.py"


def theirs(base: Path, work: Path, place: Path, options: argparse.Namespace) -> list[str]:
    """What the script is told."""
    told = {
        "pretrained_model_name_or_path": base,
        "train_data_dir": work / "pictures",
        "cache_dir": place / "cache",
        "output_dir": place,
        "resolution": options.resolution,
        "train_batch_size": options.batch,
        "max_train_steps": options.steps,
        "mixed_precision": options.precision,
        "checkpointing_steps": 10**6,
        "learning_rate": 1e-4,
        "rank": 4,
        "seed": 0,
    }
    flags = [part for name, value in told.items() for part in (f"--{name}", str(value))]
    return [*flags, "--center_crop"]


def ours(base: Path, work: Path, place: Path, options: argparse.Namespace) -> list[str]:
    """What scumble is told."""
    told = {
        "base": base,
        "data.images": work / "pictures",
        "data.cache": place / "cache",
        "data.resolution": options.resolution,
        "output": place / "run",
        "adapter.rank": 4,
        "train.steps": options.steps,
        "train.batch": options.batch,
        "train.precision": options.precision,
        "train.checkpoint_every": 0,
        "train.optimizer.learning_rate": 1e-4,
    }
    return [f"{name}={value}" for name, value in told.items()]


def timed(command: list[str], work: Path) -> float:
    """Seconds of a whole Python process; its last words where it fails."""
    around = {**os.environ, "HF_HUB_OFFLINE": "1"}
    begun = time.perf_counter()
    done = subprocess.run(
        [sys.executable, *command], env=around, cwd=work, capture_output=True, text=True, check=False
    )
    if done.returncode:
        said = done.stdout[-1500:] + done.stderr[-3000:]
        raise SystemExit(f"{' '.join(command)}\nended with {done.returncode}:\n{said}")
    return time.perf_counter() - begun


def digest(path: Path) -> str:
    """sha256 hex of a file: which version of the script it was."""
    import hashlib

    return hashlib.sha256(path.read_bytes()).hexdigest()


if __name__ == "__main__":
    main()
