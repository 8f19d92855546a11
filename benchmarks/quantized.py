"""What holding the embedded base in few bits costs: in its pictures, and in what adapters learn over it.

    python benchmarks/quantized.py
    python benchmarks/quantized.py --pictures 1 --denoising 2 --steps 2     # to see that it runs

Pictures: the same prompts and seeds with the base in fp32 and held in each code; PSNR to fp32's, beside what bf16
alone changes. "all of it" holds also what stands outside of the blocks (latents in and out, time), to see what leaving
it alone is worth. Training: one style for a few steps over each, then the loss on held-out pictures, over the base that
it trained on and over the plain one in fp32. Processor time is not told: weights are made anew in each layer, which
this small base feels more than a large one. Writes benchmarks/results/quantized.json.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy
import torch
from machine import machine
from torch import nn

from scumble.formats import read
from scumble.inference.request import Request
from scumble.inference.session import Session
from scumble.models import quantized, streaming
from scumble.models.codes import CODES
from scumble.models.loading import load_base
from scumble.picturebook.dataset import write_dataset
from scumble.runs.build import build
from scumble.runs.demo import held_out_scenes, prompt
from scumble.runs.load import load
from scumble.runs.train import train

RESULTS = Path(__file__).parent / "results"


@contextmanager
def everything() -> Iterator[None]:
    """Inside, layers outside of the blocks are held in few bits as well."""

    def layers(module: nn.Module) -> dict[str, Any]:
        return {path: part for path, part in module.named_modules() if quantized._is_plain(part)}

    with (
        patch.object(quantized, "SMALLEST", 1),
        patch.object(quantized, "layers_held", layers),
        patch.object(streaming, "layers_held", layers),
    ):
        yield


def drawn(count: int, steps: int, **held: Any) -> list[numpy.ndarray[Any, Any]]:
    """`count` pictures of scenes that no style ever shows."""
    requests = [
        Request(prompt=prompt(scene), seed=seed, steps=steps)
        for seed, scene in enumerate(held_out_scenes(count, seed=5))
    ]
    with Session(load_base("picturebook", **held)) as session:
        return [numpy.asarray(one.image, dtype=float) for one in session.generate(requests)]


def psnr(mine: numpy.ndarray[Any, Any], theirs: numpy.ndarray[Any, Any]) -> float:
    """Decibels; the most for equal pictures is 99."""
    error = float(((mine - theirs) ** 2).mean())
    return 99.0 if error == 0 else min(99.0, 10 * math.log10(255**2 / error))


def pictures(count: int, steps: int) -> dict[str, dict[str, float]]:
    """PSNR to fp32's pictures, median, least and most."""
    plain = drawn(count, steps)
    ways: dict[str, dict[str, Any]] = {"bf16": {"dtype": torch.bfloat16}}
    ways |= {name: {"quantization": name} for name in CODES}
    found = {}
    for name, held in ways.items():
        found[name] = drawn(count, steps, **held)
    with everything():
        for name in CODES:
            found[f"{name}, all of it"] = drawn(count, steps, quantization=name)
    told = {}
    for name, each in found.items():
        values = [psnr(mine, theirs) for mine, theirs in zip(each, plain, strict=True)]
        told[name] = {"median": float(numpy.median(values)), "least": min(values), "most": max(values)}
        print(
            f"{name:16} PSNR median {told[name]['median']:5.1f}   least {told[name]['least']:5.1f}",
            flush=True,
        )
    return told


def training(steps: int, style: str, folder: Path) -> dict[str, dict[str, float]]:
    """Held-out loss of adapters trained over each, over their own base and over the plain one."""
    write_dataset(style, folder / "pictures")
    common: dict[str, Any] = {
        "base": "picturebook",
        "data": {"images": str(folder / "pictures"), "held_out": 8, "cache": str(folder / "cache")},
        "adapter": {"rank": 8},
        "train": {"steps": steps, "batch": 4, "checkpoint_every": 0, "optimizer": {"learning_rate": 1e-3}},
    }
    plain = build(load(None, (), **common, output=str(folder / "plain")), device=torch.device("cpu"))
    held: Any = plain.plan.held_out
    told: dict[str, dict[str, float]] = {}
    ways: dict[str, dict[str, Any]] = {"fp32": {}, **{name: {"train__quantization": name} for name in CODES}}
    for name, changes in ways.items():
        out = folder / name
        result = train(
            load(None, (), **{**common, "output": str(out), "train__held_out_every": steps}, **changes),
            quiet=True,
        )
        assert result.adapter is not None
        own = next(
            event
            for event in map(json.loads, reversed((out / "events.jsonl").read_text().splitlines()))
            if event["event"] == "HeldOut"
        )
        held._adapter.load_state(read(result.adapter).state)
        mine, bare = held()
        told[name] = {"own base": own["adapter"], "own base, bare": own["base"]}
        told[name] |= {"plain base": mine.mean().item(), "plain base, bare": bare.mean().item()}
        print(
            f"{name:16} " + "   ".join(f"{what} {value:.5f}" for what, value in told[name].items()),
            flush=True,
        )
    return told


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pictures", type=int, default=8)
    parser.add_argument("--denoising", type=int, default=15, help="denoising steps of a picture")
    parser.add_argument("--steps", type=int, default=100, help="steps of each training")
    parser.add_argument("--style", default="blueprint")
    parser.add_argument("--output", type=Path, default=RESULTS / "quantized.json")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        found = {
            "command": "python benchmarks/quantized.py",
            "what": {k: getattr(options, k) for k in ("pictures", "denoising", "steps", "style")},
            "psnr to fp32": pictures(options.pictures, options.denoising),
            "held-out loss": training(options.steps, options.style, Path(folder)),
            "machine": machine(),
        }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(found, indent=1) + "\n")
    return found


if __name__ == "__main__":
    main()
