"""How well the embedded base draws what it is told: 200 prompts of combinations that its training never saw.

    python benchmarks/picturebook_base.py            # about four minutes on two cores

Unmodified diffusers draws (25 DPM-Solver++ steps, guidance 7.5), the oracle reads. Writes
`benchmarks/results/picturebook_base.json` and the contact sheet `docs/picturebook.png`.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline
from machine import machine

import scumble.picturebook
from scumble.picturebook import captions, oracle, scenes
from scumble.picturebook.draw import contact_sheet
from scumble.rng import Streams

HERE = Path(__file__).parent


def held_out_scenes(count: int, seed: int = 2024) -> list[scenes.Scene]:
    """One-thing scenes whose combination of subject, colour and background was kept from pretraining."""
    streams = Streams(seed)
    return [scenes.random_scene(streams.python("held-out", n), held_out=True) for n in range(count)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", type=Path, default=None, help="another base of the same layout")
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--batch", type=int, default=20)
    parser.add_argument("--sheet", type=Path, default=HERE.parent / "docs" / "picturebook.png")
    parser.add_argument("--json", type=Path, default=HERE / "results" / "picturebook_base.json")
    arguments = parser.parse_args()
    base = arguments.base or scumble.picturebook.path()
    pipe = StableDiffusionPipeline.from_pretrained(base, torch_dtype=torch.float32, safety_checker=None)
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(
        pipe.scheduler.config, algorithm_type="dpmsolver++"
    )
    pipe.set_progress_bar_config(disable=True)

    asked = held_out_scenes(arguments.prompts)
    prompts = [captions.caption(scene) for scene in asked]
    pictures = []
    began = time.monotonic()
    for start in range(0, len(asked), arguments.batch):
        part = prompts[start : start + arguments.batch]
        generators = [torch.Generator().manual_seed(start + n) for n in range(len(part))]
        pictures += pipe(part, num_inference_steps=25, guidance_scale=7.5, generator=generators).images
        print(f"{len(pictures)}/{len(asked)}", flush=True)
    seconds = (time.monotonic() - began) / len(asked)
    began = time.monotonic()
    pipe(prompts[0], num_inference_steps=25, guidance_scale=7.5)
    single = time.monotonic() - began

    readings = oracle.read(pictures)
    words = ("subject", "color", "background", "position", "size")
    right = {w: sum(r.agrees(s, w) for r, s in zip(readings, asked, strict=True)) / len(asked) for w in words}
    right["subject+color+background"] = sum(
        r.agrees(s, "subject", "color", "background") for r, s in zip(readings, asked, strict=True)
    ) / len(asked)
    for word, share in right.items():
        print(f"{word:26s} {share:6.1%}")
    print(f"{single:.2f} s for one picture, {seconds:.2f} s each in batches of {arguments.batch}")
    wrong = [
        p for p, r, s in zip(prompts, readings, asked, strict=True) if not r.agrees(s, "subject", "color")
    ]
    print("wrong:", *wrong[:12], sep="\n  ")
    arguments.sheet.parent.mkdir(exist_ok=True)
    contact_sheet(pictures[:60], 10, prompts[:60]).save(arguments.sheet)
    arguments.json.parent.mkdir(exist_ok=True)
    result = {"prompts": len(asked), "right": right, "seconds_one": single, "seconds_batched": seconds}
    arguments.json.write_text(json.dumps(result | {"machine": machine()}, indent=1))


if __name__ == "__main__":
    main()
