"""How long does a LoRA take from its file into a pipeline? `load_adapter` beside diffusers' `load_lora_weights`.

    OMP_NUM_THREADS=1 python benchmarks/loading.py                  # a minute; writes benchmarks/results/loading.json

Two pipelines over the very same UNet of SD 1.5's shape, in one process, take turns: load, then unload, again and
again. Only the load is timed: it ends when the next picture would be drawn with the adapter. The file is a rank-16
LoRA of every attention layer (128), written by diffusers' own `save_lora_weights`. The UNet's weights are
memory that nobody wrote to: loading does not depend on their values, and reads none. What is compared is the ratio in
each repetition, so that whatever else the machine does falls on both; on a busy machine the processor's time is the
one to look at.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils.logging import set_verbosity_error
from machine import machine
from training_step import SHAPES

from scumble import load_adapter, unload_adapters
from scumble.adapters import Adapter, LoraSettings
from scumble.adapters.adapted import Adapted

HERE = Path(__file__).parent
NAME = "pytorch_lora_weights.safetensors"


def pipeline_of(unet: UNet2DConditionModel) -> StableDiffusionPipeline:
    """A diffusers pipeline with that UNet and nothing else that adapters go to."""
    return StableDiffusionPipeline(
        vae=None,
        text_encoder=None,
        tokenizer=None,
        unet=unet,
        scheduler=DDIMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def empty_unet(shape: str) -> UNet2DConditionModel:
    """A UNet whose weights are memory that was never written."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**SHAPES[shape])
    return unet.to_empty(device="cpu").requires_grad_(False).eval()


def twin(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """Another UNet over the same weights."""
    with torch.device("meta"):
        other = UNet2DConditionModel.from_config(unet.config)
    other.load_state_dict(unet.state_dict(), assign=True)
    return other.requires_grad_(False).eval()


def write_with_diffusers(unet: UNet2DConditionModel, folder: Path, rank: int, dtype: torch.dtype) -> Path:
    """A LoRA of every attention layer, with changes that are not zero, in the file of diffusers' own writer."""
    adapter = Adapter.inject({"unet": unet}, "attention", LoraSettings(rank=rank))
    generator = torch.Generator().manual_seed(0)
    layers = {}
    for path, layer in adapter.state().layers.items():
        spelled = path.removeprefix("unet.")
        up = torch.randn(layer.tensors["up"].shape, generator=generator) * 0.02
        layers[f"{spelled}.lora_A.weight"] = layer.tensors["down"].to(dtype)
        layers[f"{spelled}.lora_B.weight"] = up.to(dtype)
    adapter.eject()
    StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=layers)
    return folder / NAME


def timed(work: Callable[[], Any]) -> tuple[float, float]:
    """Milliseconds on the clock, and of the processor."""
    start = time.perf_counter(), time.process_time()
    work()
    return 1e3 * (time.perf_counter() - start[0]), 1e3 * (time.process_time() - start[1])


Times = dict[str, list[tuple[float, float]]]


def measure(path: Path, ours: Any, theirs: Any, rounds: int) -> Times:
    """Milliseconds of every load, in turns."""
    found: Times = {"scumble": [], "diffusers": []}

    def scumble() -> None:
        found["scumble"].append(timed(lambda: load_adapter(ours, path, quiet=True)))
        held = sum(isinstance(module, Adapted) for module in ours.unet.modules())
        assert unload_adapters(ours) == 1 and held

    def diffusers() -> None:
        found["diffusers"].append(
            timed(lambda: theirs.load_lora_weights(str(path.parent), weight_name=path.name))
        )
        theirs.unload_lora_weights()

    # Garbage is collected before every turn: none pays for what the other left. What is there by now (many thousand
    # objects of torch and diffusers) is not looked through each time, which would empty the processor's caches.
    gc.collect()
    gc.freeze()
    for number in range(rounds):
        for turn in (scumble, diffusers) if number % 2 else (diffusers, scumble):
            gc.collect()
            turn()
    gc.unfreeze()
    return found


def summary(found: dict[str, list[float]]) -> dict[str, Any]:
    """Medians, spread, ratios, and the last loads against the first, of one clock's figures."""
    ratios = [d / s for s, d in zip(found["scumble"][1:], found["diffusers"][1:], strict=True)]
    report: dict[str, Any] = {
        name: {
            "first ms": round(times[0], 2),
            "median ms": round(statistics.median(times[1:]), 2),
            "least ms": round(min(times[1:]), 2),
            "most ms": round(max(times[1:]), 2),
            "last ms": round(times[-1], 2),
            # one load may fall on a moment when the machine does something else; five seldom do
            "last five over first five": round(
                statistics.median(times[-5:]) / statistics.median(times[1:6]), 3
            ),
        }
        for name, times in found.items()
    }
    report["diffusers over scumble"] = {
        "median": round(statistics.median(ratios), 2),
        "least": round(min(ratios), 2),
        "most": round(max(ratios), 2),
        "first load": round(found["diffusers"][0] / found["scumble"][0], 2),
    }
    return report


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    set_verbosity_error()
    warnings.simplefilter("ignore")
    parser.add_argument("--shape", choices=SHAPES, default="sd15")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--json", type=Path, default=HERE / "results" / "loading.json")
    arguments = parser.parse_args()
    base = empty_unet(arguments.shape)
    ours, theirs = pipeline_of(base), pipeline_of(twin(base))
    report: dict[str, Any] = {"rank": arguments.rank, "rounds": arguments.rounds, "shape": arguments.shape}
    with tempfile.TemporaryDirectory(prefix="scumble-loading-") as folder:
        for word, dtype in (("fp16", torch.float16), ("fp32", torch.float32)):
            path = write_with_diffusers(base, Path(folder) / word, arguments.rank, dtype)
            found = measure(path, ours, theirs, arguments.rounds)
            report[word] = {"bytes": path.stat().st_size}
            for clock, number in (("wall", 0), ("processor", 1)):
                report[word][clock] = summary(
                    {name: [t[number] for t in times] for name, times in found.items()}
                )
            print(word, json.dumps(report[word], indent=1), flush=True)
    report["machine"] = machine()
    arguments.json.parent.mkdir(exist_ok=True)
    arguments.json.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
