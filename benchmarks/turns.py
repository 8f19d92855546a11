"""Taking turns: things to compare run one after the other in one process, again and again, and what counts is the
ratio within each round, so that whatever else the machine does falls on all alike."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from machine import machine
from training_step import DTYPES, build, twin

from scumble.adapters import Adapter

__all__ = ["DTYPES", "build", "fill", "in_turns", "inputs", "options_of", "ratios", "save", "twin"]

RESULTS = Path(__file__).parent / "results"
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}


def options_of(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The command line, with what all of these benchmarks take."""
    parser.add_argument("--full", action="store_true", help="SD 1.5's shape: 3.4 GB in fp32; minutes")
    parser.add_argument(
        "--shape",
        choices=("tiny", "thin", "sd15"),
        help="tiny (default): seconds. thin: SD 1.5's graph with narrow layers, the cost per operation",
    )
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, help="default: torch's own")
    parser.add_argument(
        "--clock", choices=CLOCKS, default="wall", help="cpu: processor time, for a busy machine"
    )
    parser.add_argument("--output", type=Path, help="the JSON file; default in benchmarks/results/")
    options = parser.parse_args()
    options.shape = options.shape or ("sd15" if options.full else "tiny")
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    return options


def in_turns(
    steps: Mapping[str, Callable[[], object]], repeats: int, clock: str = "wall", warmup: int = 1
) -> dict[str, list[float]]:
    """Seconds of each step in each round; the order turns, so that nobody is always first."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    names, now = list(steps), CLOCKS[clock]
    for number in range(-warmup, repeats):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            start = now()
            steps[name]()
            if number >= 0:
                seconds[name].append(now() - start)
    return seconds


def ratios(seconds: Mapping[str, list[float]], over: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Name over name, round by round: median, least, most; printed."""
    found = {}
    for name, under in over.items():
        each = [a / b for a, b in zip(seconds[name], seconds[under], strict=True)]
        found[f"{name} / {under}"] = {
            "median": statistics.median(each),
            "least": min(each),
            "most": max(each),
        }
    width = max(map(len, found), default=0)
    for name, values in seconds.items():
        print(
            f"{name:{width}}  median {1e3 * statistics.median(values):10.3f} ms   least {1e3 * min(values):10.3f}"
        )
    for name, value in found.items():
        print(
            f"{name:{width}}  {value['median']:8.3f}   from {value['least']:.3f} to {value['most']:.3f}"
            f"   n={len(next(iter(seconds.values())))}"
        )
    return found


def save(name: str, options: argparse.Namespace, limit: str, **measured: Any) -> None:
    """Write what was measured, the physical limit in words, the settings and the machine."""
    print(f"limit: {limit}")
    result = {
        "benchmark": name,
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "what": {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items() if k != "output"},
        "machine": machine() | {"threads": torch.get_num_threads(), "load": round(os.getloadavg()[0], 2)},
        "limit": limit,
        **measured,
    }
    path = options.output or RESULTS / f"{name}-{options.shape}-{options.dtype}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(f"wrote {path}")


@torch.no_grad()
def fill(adapter: Adapter, size: float = 0.01) -> None:
    """Small random values, as a loaded adapter has them: with an effect, and frozen."""
    for parameter in adapter.train(False).parameters():
        parameter.normal_(std=size).requires_grad_(False)


def inputs(unet: UNet2DConditionModel, batch: int, side: int) -> tuple[torch.Tensor, int, torch.Tensor]:
    """(latents, t, text) for a UNet."""
    dtype = next(unet.parameters()).dtype
    latents = torch.randn(batch, 4, side, side).to(dtype)
    return latents, 500, torch.randn(batch, 77, unet.config.cross_attention_dim).to(dtype)
