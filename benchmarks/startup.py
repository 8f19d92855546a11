"""How long a person waits before scumble does anything: a help text, the first picture, the first step.

    python benchmarks/startup.py                                             # `--help`, `import scumble`: seconds
    python benchmarks/startup.py --base picturebook --diffusers ~/diffusers  # to the first picture and the first step
    python benchmarks/startup.py --base sd15 --size 256 --diffusers ~/diffusers

With a base, each as a process of its own, in turns, with warm files:

    picture        `scumble generate`, one picture of --steps denoising steps, saved
    their picture  a script of a few lines that draws the same with diffusers' pipeline
    step           `scumble train` from its start until the first step is done, with no cache
    their step     diffusers' train_text_to_image_lora.py, the same (with --diffusers, a clone of huggingface/diffusers)

and `picture` again phase by phase, in one process. What counts is processor time, which a busy machine changes little,
and the ratios; both encode --pictures pictures or, in the script's first step, one batch of them.

Limit: the imports of torch, diffusers and transformers, which both sides need, and the forward passes.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from end_to_end import SCRIPT, base_folder, digest, lend_transforms, ours, pictures, theirs
from machine import machine

HERE = Path(__file__).parent
COMMANDS = {
    "python -c pass": ["-c", "pass"],
    "import scumble": ["-c", "import scumble"],
    "scumble --help": ["-m", "scumble", "--help"],
    "import torch": ["-c", "import torch"],
    "import diffusers' pipeline": ["-c", "from diffusers import StableDiffusionPipeline"],
}
AROUND = {**os.environ, "HF_HUB_OFFLINE": "1"}

PICTURE = """
import sys
import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline
base, steps, size, out = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
pipe = StableDiffusionPipeline.from_pretrained(base, safety_checker=None)
pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
pipe.set_progress_bar_config(disable=True)
noise = torch.Generator().manual_seed(0)
pipe("a small red fox", num_inference_steps=steps, height=size, width=size, generator=noise).images[0].save(out)
"""
"""What somebody writes who draws with diffusers alone."""

PHASES = """
import json, sys, time
base, steps, size, out = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
found, last = {}, 0.0
def done(phase):
    global last
    now = time.process_time()
    found[phase], last = now - last, now
done("Python")
import torch
done("import torch")
import scumble.cli.generate, scumble.inference.session, scumble.inference.request
done("import scumble, pydantic, typer")
import transformers
from transformers import CLIPTextModel, CLIPTokenizer
done("import transformers")
import diffusers
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
done("import diffusers and peft")
base = scumble.inference.session.load_base(base)
done("load the base")
session = scumble.inference.session.Session(base)
asked = scumble.inference.request.Request(prompt="a small red fox", steps=steps, width=size, height=size)
drawn = session.generate(asked)
done("draw")
drawn[0].save(out)
done("save")
print(json.dumps(found))
"""
"""The phases of `scumble generate`, in processor seconds."""

Times = tuple[float, float]
"""(seconds on the clock, seconds of the processor)"""


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument(
        "--base", help="picturebook; sd15, random weights of that shape (4 GB of disk); or a diffusers folder"
    )
    parser.add_argument("--size", type=int, default=64, help="of the pictures, in pixels")
    parser.add_argument("--steps", type=int, default=1, help="denoising steps of the picture")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--pictures", type=int, default=10, help="pictures to train on")
    parser.add_argument("--precision", choices=("no", "bf16", "fp16"), default="no", help="of the training")
    parser.add_argument("--diffusers", type=Path, help="a clone of huggingface/diffusers")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    name = "startup" if options.base is None else f"startup-{Path(options.base).name}-{options.size}"
    result = commands(options.repeats) if options.base is None else paths(options)
    where = options.json or HERE / "results" / f"{name}.json"
    where.parent.mkdir(exist_ok=True)
    load = round(os.getloadavg()[0], 2)
    where.write_text(json.dumps(result | {"machine": machine() | {"load_at_end": load}}, indent=1) + "\n")
    print(f"wrote {where}")


def commands(repeats: int) -> dict[str, object]:
    """Seconds of commands that draw and train nothing."""
    seconds: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(repeats):
        for name, command in COMMANDS.items():
            seconds[name].append(whole(command, Path())[0])
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    for name, median in medians.items():
        print(f"{name:28s} {median:.3f} s   {median / medians['import torch']:.2f} x import torch")
    return {"seconds": medians}


def paths(options: argparse.Namespace) -> dict[str, object]:
    """To the first picture and to the first step, beside diffusers."""
    with tempfile.TemporaryDirectory(prefix="startup-") as folder:
        work = Path(folder)
        base = base_folder(options.base, work)
        pictures(work / "pictures", options.pictures, options.size)
        options.resolution = options.size
        training = argparse.Namespace(**vars(options) | {"steps": 2})
        drawing = [str(base), str(options.steps), str(options.size), str(work / "picture.png")]
        scumble = ["-m", "scumble", "generate", "a small red fox", "--base", str(base)]
        scumble += [
            "--steps",
            str(options.steps),
            "--size",
            str(options.size),
            "--out",
            str(work / "own.png"),
        ]

        def own_step(place: Path) -> Times:
            told = [*ours(base, work, place, training), "train.log_every=1"]
            events = place / "run" / "events.jsonl"
            return until(
                ["-m", "scumble", "train", *told],
                work,
                lambda _: events.is_file() and '"event": "StepDone"' in events.read_text(),
            )

        ways: dict[str, Callable[[Path], Times]] = {
            "picture": lambda _: whole(scumble, work),
            "their picture": lambda _: whole(["-c", PICTURE, *drawing], work),
            "step": own_step,
        }
        if options.diffusers is not None:
            script, lent = options.diffusers / SCRIPT, lend_transforms(work / "lent")

            def their_step(place: Path) -> Times:
                command = [
                    *([str(lent)] if lent else []),
                    str(script),
                    *theirs(base, work, place, training),
                ]
                return until(command, work, lambda said: re.search(r"Steps:.* 1/2 ", said) is not None)

            ways["their step"] = their_step
        times: dict[str, list[Times]] = {name: [] for name in ways}
        for repetition in range(-1, options.repeats):  # the first round warms the files, and is not counted
            for name in list(ways) if repetition % 2 else list(ways)[::-1]:
                taken = ways[name](work / f"{name}-{repetition}".replace(" ", "-"))
                if repetition >= 0:
                    times[name].append(taken)
                print(f"{name:14s} {taken[0]:8.2f} s   processor {taken[1]:8.2f} s", flush=True)
        phases = [
            json.loads(
                subprocess.check_output([sys.executable, "-c", PHASES, *drawing], env=AROUND, cwd=work)
            )
            for _ in range(options.repeats)
        ]
    return told_of(times, phases) | {
        "what": {k: str(v) for k, v in vars(options).items() if k not in ("json", "diffusers")},
        "script": None if options.diffusers is None else digest(options.diffusers / SCRIPT),
    }


def told_of(times: dict[str, list[Times]], phases: list[dict[str, float]]) -> dict[str, object]:
    """Medians, ratios and phases, printed."""
    seconds = {
        clock: {name: [each[number] for each in found] for name, found in times.items()}
        for number, clock in enumerate(("wall", "processor"))
    }
    ratios = {}
    for name in ("picture", "step"):
        if f"their {name}" not in times:
            continue
        for clock, found in seconds.items():
            each = [t / o for t, o in zip(found[f"their {name}"], found[name], strict=True)]
            ratios[f"their {name} / {name}, {clock}"] = {
                "median": statistics.median(each),
                "least": min(each),
                "most": max(each),
            }
    medians = {
        clock: {name: statistics.median(each) for name, each in found.items()}
        for clock, found in seconds.items()
    }
    middle = {phase: statistics.median([each[phase] for each in phases]) for phase in phases[0]}
    for clock, found in medians.items():
        print(f"{clock:10s} " + "   ".join(f"{name} {each:.2f} s" for name, each in found.items()))
    for name, ratio in ratios.items():
        print(f"{name:36s} {ratio['median']:.2f}   from {ratio['least']:.2f} to {ratio['most']:.2f}")
    print(
        "phases of a picture, processor: " + "   ".join(f"{name} {each:.2f}" for name, each in middle.items())
    )
    return {"medians": medians, "ratios": ratios, "phases": middle, "seconds": seconds}


def whole(command: list[str], work: Path) -> Times:
    """What a whole Python process takes; its last words where it fails."""
    before, begun = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(
        [sys.executable, *command], env=AROUND, cwd=work, capture_output=True, text=True, check=False
    )
    taken, after = time.perf_counter() - begun, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\nended with {done.returncode}:\n{done.stderr[-3000:]}")
    return taken, after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def until(command: list[str], work: Path, there: Callable[[str], bool]) -> Times:
    """What a Python process takes until `there` says of its output that it is so far; it is ended then."""
    said = work / "said.txt"
    with said.open("w") as output:
        begun = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, *command], env=AROUND, cwd=work, stdout=output, stderr=subprocess.STDOUT
        )
        while process.poll() is None and not there(said.read_text(errors="replace")):
            time.sleep(0.02)
        taken, used = time.perf_counter() - begun, processor(process.pid)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            process.wait()
        elif not there(said.read_text(errors="replace")):
            raise SystemExit(f"{' '.join(command)}\nended before:\n{said.read_text()[-3000:]}")
    return taken, used


def processor(pid: int) -> float:
    """Processor seconds of a process and of its children that ended."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    main()
