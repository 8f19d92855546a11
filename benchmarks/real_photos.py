"""DreamBooth and pivotal tuning on real photographs, at the shape of SD 1.5: memory, seconds a step, files that load.

A base with SD 1.5's configs and random weights is written once to a temporary folder, as diffusers writes bases; time
and memory don't depend on the weights. Then each run is a process of its own, so that its peak memory is its own:

    dreambooth, prior by prediction     the class is held to what the bare base answers
    dreambooth, prior by pictures       two class pictures are drawn first, and train beside the subject's
    pivotal                             the word alone for half of the steps, then the adapter around it

    python benchmarks/real_photos.py PHOTOS                  # PHOTOS/dog/*.jpg, PHOTOS/duck_toy/*.jpg
    python benchmarks/real_photos.py PHOTOS --tiny           # toy sizes: a minute, to see that it runs

PHOTOS holds one folder of pictures for each subject. Needs 5 GB of disk and about 8 GB of memory. Writes
benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from machine import machine

RESULTS = Path(__file__).parent / "results"
SUBJECTS = ("dog", "duck_toy")
ARMS = ("dreambooth-prediction", "dreambooth-images", "pivotal")
CLASS_PICTURES = 2


def main() -> None:
    """Make the base, run every arm on every subject, print, write."""
    options = arguments()
    if options.make:
        make(options.make, tiny=options.tiny)
    elif options.arm:
        print(json.dumps(run(options)))
    else:
        measure(options)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("photos", type=Path, help="folder with a folder of pictures for each subject")
    parser.add_argument("--subjects", nargs="+", default=SUBJECTS)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS)
    parser.add_argument("--pixels", type=int, default=256)
    parser.add_argument("--precision", choices=("no", "bf16"), default="bf16")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--tiny", action="store_true", help="toy sizes, 16 pixels")
    parser.add_argument("--output", type=Path, help="the JSON file; default in benchmarks/results/")
    for inner in ("make", "base", "run"):
        parser.add_argument(f"--{inner}", type=Path, help=argparse.SUPPRESS)
    for inner in ("arm", "subject"):
        parser.add_argument(f"--{inner}", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.pixels = 16 if options.tiny else options.pixels
    return options


def measure(options: argparse.Namespace) -> None:
    """The table, as text and as JSON."""
    rows = []
    with tempfile.TemporaryDirectory(prefix="real_photos-") as work:
        base = Path(work) / "base"
        again("--make", base, options)
        for subject in options.subjects:
            for arm in options.arms:
                folder = Path(work) / f"{arm}-{subject}"
                inner = ("--base", base, "--run", folder, "--arm", arm, "--subject", subject)
                row = json.loads(again(*inner, options).splitlines()[-1])
                rows.append(row)
                print(
                    f"{subject:>12} {arm:<24} {row['seconds a step']:8.2f} s a step   "
                    f"{row['seconds before']:7.1f} s before   {row['peak GB']:6.2f} GB   "
                    + ", ".join(f"{name} {size / 1e6:.2f} MB" for name, size in row["files"].items()),
                    flush=True,
                )
    shape = {"pixels": options.pixels, "precision": options.precision, "steps": options.steps, "batch": 1}
    result = {
        "benchmark": "real_photos",
        "what": {"base": "tiny" if options.tiny else "SD 1.5, random weights", **shape},
        "runs": rows,
        "machine": machine(),
    }
    path = options.output or RESULTS / f"real_photos-{options.precision}-{options.pixels}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(f"wrote {path}")


def again(*inner: Any) -> str:
    """This file as another process, told to do one thing; what it printed."""
    *told, options = inner
    shared = ["--pixels", options.pixels, "--precision", options.precision, "--steps", options.steps]
    command = [
        sys.executable,
        __file__,
        options.photos,
        *told,
        *shared,
        *(["--tiny"] if options.tiny else []),
    ]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, told))} failed:\n{done.stderr}")
    return done.stdout


def make(folder: Path, *, tiny: bool) -> None:
    """A random base as a diffusers folder: SD 1.5's configs in bf16, or the toy one."""
    from scumble.models import tiny as toys

    if tiny:
        toys.save("sd1", folder)
        return
    import torch
    from bases import write_sd1

    write_sd1(folder, dtype=torch.bfloat16)


def settings(arm: str, subject: str, steps: int) -> dict[str, Any]:
    """What the arm is told beside data and base."""
    noun = subject.replace("_", " ")
    if arm == "pivotal":
        words = {
            "placeholders": "<it>",
            "vectors": 2,
            "inversion_steps": steps // 2,
            "train_text_encoder": True,
        }
        return {"method": "pivotal", "pivotal": words}
    prior = {"prior": arm.partition("-")[2], "class_prompt": f"a photo of a {noun}"}
    if prior["prior"] == "images":
        prior |= {"class_count": CLASS_PICTURES, "class_steps": 2}  # type: ignore[dict-item]
    return {"method": "dreambooth", "dreambooth": {"instance_prompt": f"a photo of sks {noun}", **prior}}


def run(options: argparse.Namespace) -> dict[str, Any]:
    """One run, and what it took."""
    import scumble

    result = scumble.train(
        base=str(options.base),
        output=options.run,
        data={"images": str(options.photos / options.subject), "resolution": options.pixels},
        adapter={"rank": 4},
        train={
            "steps": options.steps,
            "batch": 1,
            "precision": options.precision,
            "optimizer": {"learning_rate": 1e-2},  # a few steps must show in bf16
        },
        quiet=True,
        **settings(options.arm, options.subject, options.steps),
    )
    peak = peak_bytes()
    rows = [json.loads(line) for line in (options.run / "events.jsonl").read_text().splitlines()]
    seconds = [row["seconds"] for row in rows if row["event"] == "StepDone"]
    (started,) = (row for row in rows if row["event"] == "Started")
    assert result.reason == "complete" and result.adapter is not None and len(seconds) == options.steps
    files = sorted(options.run.glob("*.safetensors"))
    return {
        "subject": options.subject,
        "arm": options.arm,
        "pictures": started["facts"]["pictures"],
        "layers": started["facts"]["layers"],
        "seconds a step": statistics.median(seconds),
        "seconds of each step": seconds,
        "seconds before": result.seconds - sum(seconds),
        "peak GB": peak / 1e9,
        "files": {path.name: path.stat().st_size for path in files},
        "largest difference in a fresh base": result.difference,
        "loaded by diffusers": loaded(options.base, files, options.precision),
        "class pictures": len(list(options.run.rglob("class-*/*.png"))),
    }


def peak_bytes() -> int:
    """The most memory that this process has held (VmHWM: unlike ru_maxrss it starts anew with a new program)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])


def loaded(base: Path, files: list[Path], precision: str) -> dict[str, Any]:
    """What unmodified diffusers makes of the files: how far each part's answer moves."""
    import torch
    from diffusers import StableDiffusionPipeline

    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    pipeline: Any = StableDiffusionPipeline.from_pretrained(base, torch_dtype=dtype, safety_checker=None)
    generator = torch.Generator().manual_seed(0)
    side = 8 * max(1, 2 ** (len(pipeline.unet.config.block_out_channels) - 1) // 4)
    latents = torch.randn(1, 4, side, side, generator=generator).to(dtype)
    words = torch.randn(1, 77, pipeline.unet.config.cross_attention_dim, generator=generator).to(dtype)

    def answers() -> torch.Tensor:
        with torch.no_grad():
            return pipeline.unet(latents, torch.tensor([500]), words).sample.float()

    before, found = answers(), {}
    for path in files:
        if path.name.startswith("learned_embeds"):
            size = len(pipeline.tokenizer)
            pipeline.load_textual_inversion(str(path.parent), weight_name=path.name)
            found[path.name] = {"tokens": len(pipeline.tokenizer) - size}
            assert found[path.name]["tokens"] > 0
        else:
            pipeline.load_lora_weights(str(path.parent), weight_name=path.name)
            found[path.name] = {"moves the UNet's answer by": (answers() - before).abs().max().item()}
            assert found[path.name]["moves the UNet's answer by"] > 0
    return found


if __name__ == "__main__":
    main()
