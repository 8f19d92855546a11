"""What a training step takes in memory at SD 1.5's shape: each configuration in a process of its own.

    python benchmarks/memory.py                       # 64x64 latents (512 pixels), batch 1, two steps each
    python benchmarks/memory.py --tiny --latents 16   # toy sizes, to see that it runs
    python benchmarks/memory.py --only "int8 recomputed"

A base with the published shapes and random weights is written once, in fp32, the largest that such files are. A process
imports what training imports (that is the interpreter, and is subtracted), loads the base as a run does, lets go of VAE
and text encoder as a run with cached inputs does, and takes two steps: LoRA of rank 4 on the UNet's attention, one
picture, AdamW. On a CPU the peak is the largest resident set since the last reset of its mark; on a GPU (--device cuda)
it is `max_memory_allocated`. Each configuration is called smaller than the one before it, and may not take more. GB are
10^9 bytes.

Writes benchmarks/results/memory.json.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"

CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "bf16": {},
    "bf16 within a budget": {"tight": True},
    "bf16 recomputed": {"tight": True, "checkpointing": True},
    "fp8 recomputed": {"tight": True, "checkpointing": True, "quantization": "fp8"},
    "int8 recomputed": {"tight": True, "checkpointing": True, "quantization": "int8"},
    "nf4 recomputed": {"tight": True, "checkpointing": True, "quantization": "nf4"},
}
"""The largest first; fp8 and int8 are of one size. "tight": as in a run that is told to save memory, weights are not
kept in the order of kernels as well."""

TARGETS = {"bf16 recomputed": 2.9, "fp8 recomputed": 2.0, "int8 recomputed": 2.0, "nf4 recomputed": 2.0}
"""GB that a configuration is to stay within."""

SLACK = 0.03
"""Peaks that differ by less (in parts of the larger) are called equal: two runs of one configuration do."""


def measure(folder: str, options: dict[str, Any]) -> dict[str, Any]:
    """One configuration, in this process: bytes above the interpreter, and seconds of a step."""
    import torch
    import transformers.models.clip.modeling_clip  # noqa: F401 - what diffusers and transformers import when needed
    from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel  # noqa: F401

    from scumble.adapters import Adapter, LoraSettings
    from scumble.data.record import Batch
    from scumble.models.family import Conditioning, Frame
    from scumble.models.heap import give_back
    from scumble.models.loading import load_base
    from scumble.models.prepacked import unpack
    from scumble.rng import Streams
    from scumble.training.numerics import make_accelerator
    from scumble.training.objective import DenoisingObjective
    from scumble.training.optimizers import OptimizerSettings, build_optimizer

    device = torch.device(options["device"])
    accelerator = make_accelerator("bf16", device)
    meter = Meter(device)
    base = load_base(
        folder,
        dtype=torch.bfloat16,
        device=device,
        quantization=options.get("quantization", "none"),
    )
    if options.get("tight"):
        unpack(base.denoiser)
    loading = meter.peak()
    resting = base.rest(pictures=True, text=True)
    give_back()
    loaded = meter.now()
    meter.reset()
    adapter = Adapter.inject(base.roots, "attention", LoraSettings(rank=4))
    base.train_memory(checkpointing=options.get("checkpointing", False))
    optimizer = build_optimizer(OptimizerSettings(), [{"params": list(adapter.parameters()), "name": "unet"}])
    objective = DenoisingObjective(base, Streams(0))
    torch.manual_seed(1)
    side = options["latents"]
    width = base.denoiser.config["cross_attention_dim"]  # type: ignore[index]
    batch = Batch(
        latents=torch.randn(1, base.latent_channels, side, side),
        conditioning=Conditioning(torch.randn(1, 77, width, dtype=torch.bfloat16)),
        captions=("",),
        frame=Frame.plain(1, side * base.latent_factor, side * base.latent_factor),
        weight=torch.ones(1),
        keys=("",),
        positions=(0,),
    )
    seconds, losses = [], []
    for _ in range(options["steps"]):
        begun = time.perf_counter()
        with accelerator.autocast():
            loss = objective(batch).sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(adapter.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - begun)
    return {
        "loading peak": loading,
        "loaded": loaded,
        "training peak": meter.peak(),
        "interpreter": meter.before,
        "resting": resting,
        "weights": sum(p.nbytes for module in base.modules().values() for p in module.parameters()),
        "loss": losses,
        "seconds": seconds,
    }


class Meter:
    """Memory above what was there when the meter was made, in bytes."""

    def __init__(self, device: Any) -> None:
        self._device = device
        self.before = 0
        self.reset()
        self.before = self.now()

    def now(self) -> int:
        """What is held."""
        return self._read("VmRSS") - self.before

    def peak(self) -> int:
        """The most that was held since the last reset."""
        return self._read("VmHWM") - self.before

    def reset(self) -> None:
        """Forget the peak."""
        import torch

        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            Path("/proc/self/clear_refs").write_text("5")

    def _read(self, what: str) -> int:
        import torch

        if self._device.type == "cuda":
            read = torch.cuda.memory_allocated if what == "VmRSS" else torch.cuda.max_memory_allocated
            return int(read(self._device))
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{what}:"))


def judge(found: dict[str, dict[str, Any]]) -> list[str]:
    """What is not as it should be, each as a sentence."""
    wrong = []
    for name, limit in TARGETS.items():
        if name in found and (peak := found[name]["training peak"] / 1e9) > limit:
            wrong.append(f"{name} takes {peak:.2f} GB, {limit} is the target")
    names = [name for name in CONFIGURATIONS if name in found]
    for larger, smaller in pairwise(names):
        a, b = found[larger]["training peak"], found[smaller]["training peak"]
        if b > a * (1 + SLACK):
            wrong.append(f"{smaller} takes {b / 1e9:.2f} GB, more than {larger} ({a / 1e9:.2f})")
    for name, each in found.items():
        if each["loading peak"] > each["training peak"]:
            wrong.append(
                f"{name} takes more while it is loaded ({each['loading peak'] / 1e9:.2f} GB) than while it trains "
                f"({each['training peak'] / 1e9:.2f})"
            )
    return wrong


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure each configuration in a subprocess, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--latents", type=int, default=64, help="side of the latents")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--tiny", action="store_true", help="the base inside the package, to see that it works"
    )
    parser.add_argument(
        "--only", action="append", choices=list(CONFIGURATIONS), help="these alone; repeatable"
    )
    parser.add_argument(
        "--base", type=Path, help="where the base is, or is written to; else a temporary folder"
    )
    parser.add_argument("--output", type=Path, help="the JSON file; default in benchmarks/results/")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child:
        print(json.dumps(measure(str(options.base), json.loads(options.child))))
        return {}
    from bases import write_sd1
    from machine import machine

    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        base = Path("picturebook") if options.tiny else options.base or Path(scratch) / "sd15"
        if not options.tiny and not base.exists():
            write_sd1(base)
        for name in options.only or CONFIGURATIONS:
            told = {
                **CONFIGURATIONS[name],
                "latents": options.latents,
                "steps": options.steps,
                "device": options.device,
            }
            ran = subprocess.run(
                [sys.executable, __file__, "--base", str(base), "--child", json.dumps(told)],
                capture_output=True,
                text=True,
                env={**os.environ, "HF_HUB_OFFLINE": "1"},
            )
            if ran.returncode:
                raise SystemExit(f"{name}: {ran.stderr}")
            each = found[name] = json.loads(ran.stdout.splitlines()[-1])
            sizes = "  ".join(
                f"{what} {each[what] / 1e9:.2f}" for what in ("loading peak", "loaded", "training peak")
            )
            print(f"{name:18} {sizes} GB   loss {each['loss'][0]:.4f}", flush=True)
    wrong = judge(found)
    print("\n".join(wrong) or "Every target is met, and nothing smaller takes more.")
    result = {
        "command": "python benchmarks/memory.py" + (" --tiny" if options.tiny else ""),
        "latents": options.latents,
        "steps": options.steps,
        "device": options.device,
        "bytes above the interpreter": found,
        "targets in GB": TARGETS,
        "missed": wrong,
        "machine": machine(),
    }
    output = options.output or RESULTS / f"memory{'-tiny' if options.tiny else ''}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=1) + "\n")
    return result


if __name__ == "__main__":
    main()
