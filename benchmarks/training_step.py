"""One training step at the shape of SD 1.5's UNet: the frozen floor, scumble's LoRA and peft's.

Three copies of one UNet share their weights (random ones: time does not depend on them) in one process, and
take turns, so that whatever else the machine does falls on all alike. What is compared are ratios within a
repetition.

    floor     frozen forward, backward to a leaf at the first attn1: what any adapter there must pay
    scumble   rank 4 on the attention layers: forward, backward, optimizer; over the UNet as it is in scumble's bases:
              with its choice of attention kernels, and weights in the order of the CPU's
    peft      the same layers with peft

    python benchmarks/training_step.py --dtype bf16 --size 64 --repeats 7
    python benchmarks/training_step.py --shape tiny --repeats 20      # seconds, to see that it runs

Needs about 3.4 GB for the weights in fp32, 1.7 in bf16, and 0.5 to 2.5 GB above. Writes benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from machine import machine

from scumble.adapters import Adapter, LoraSettings
from scumble.models.attention import set_attention
from scumble.models.prepacked import pays, prepack

RESULTS = Path(__file__).parent / "results"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SHAPES: dict[str, dict[str, Any]] = {
    "sd15": {"sample_size": 64, "cross_attention_dim": 768},
    # The same graph with thin channels: what is left is the cost per operation, not per number.
    "thin": {
        "sample_size": 64,
        "cross_attention_dim": 32,
        "block_out_channels": (32, 32, 64, 64),
        "norm_num_groups": 8,
    },
    "tiny": {
        "sample_size": 16,
        "cross_attention_dim": 32,
        "block_out_channels": (32, 64),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "norm_num_groups": 8,
    },
}


def main() -> None:
    """Measure, print, write."""
    options = arguments()
    dtype, device = DTYPES[options.dtype], torch.device(options.device)
    torch.manual_seed(0)
    unet = build(options.shape, dtype, device)
    size = options.size or unet.config.sample_size
    latents = torch.randn(options.batch, 4, size, size, device=device, dtype=dtype)
    text = torch.randn(options.batch, 77, unet.config.cross_attention_dim, device=device, dtype=dtype)
    target = torch.randn_like(latents)
    t = torch.randint(0, 1000, (options.batch,), device=device)

    def loss(model: UNet2DConditionModel) -> torch.Tensor:
        return F.mse_loss(model(latents, t, text).sample.float(), target.float())

    steps = {
        "floor": floor_step(unet, loss),
        "scumble": scumble_step(twin(unet), loss, options.rank),
        "peft": peft_step(twin(unet), loss, options.rank),
    }
    seconds = measure(steps, options.repeats, options.warmup, device)
    report(options, seconds, size, peaks(steps, device))


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="sd15")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="dtype of the frozen weights")
    parser.add_argument(
        "--size", type=int, choices=(16, 32, 64, 96, 128), help="side of the latents; default the shape's"
    )
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--warmup", type=int, default=2, help="turns that are not counted")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, help="the JSON file; default in benchmarks/results/")
    return parser.parse_args()


def build(shape: str, dtype: torch.dtype, device: torch.device) -> UNet2DConditionModel:
    """A frozen UNet with small random weights, made without ever holding them in fp32."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**SHAPES[shape])
    unet = unet.to(dtype).to_empty(device=device)
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.normal_(std=0.02)
    return unet.requires_grad_(False).train()


def twin(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """Another UNet over the very same weights."""
    with torch.device("meta"):
        other = UNet2DConditionModel.from_config(unet.config)
    other.load_state_dict(unet.state_dict(), assign=True)
    first, same = next(unet.parameters()), next(other.parameters())
    assert first.data_ptr() == same.data_ptr()
    return other.requires_grad_(False).train()


Loss = Callable[[UNet2DConditionModel], torch.Tensor]
Step = Callable[[], None]


def floor_step(unet: UNet2DConditionModel, loss: Loss) -> Step:
    """Forward, and backward down to the first layer that an adapter would change; nothing is trained."""
    first = next(module for name, module in unet.named_modules() if name.endswith("attn1"))

    def leaf(_: Any, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (inputs[0].detach().requires_grad_(), *inputs[1:])

    first.register_forward_pre_hook(leaf)
    return lambda: loss(unet).backward()


def scumble_step(unet: UNet2DConditionModel, loss: Loss, rank: int) -> Step:
    """A whole optimizer step with scumble's LoRA."""
    as_in_a_base(unet)
    adapter = Adapter.inject({"unet": unet}, "attention", LoraSettings(rank=rank))
    return optimizing(unet, loss, list(adapter.parameters()))


def as_in_a_base(unet: UNet2DConditionModel) -> None:
    """What scumble does with the UNet of a base that it loads."""
    set_attention(unet, "auto")
    if pays():
        prepack(unet)


def peft_step(unet: UNet2DConditionModel, loss: Loss, rank: int) -> Step:
    """A whole optimizer step with peft's LoRA, as diffusers' training scripts set it up."""
    from peft import LoraConfig

    unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    parameters = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    return optimizing(unet, loss, parameters)


def optimizing(unet: UNet2DConditionModel, loss: Loss, parameters: list[torch.nn.Parameter]) -> Step:
    """Forward, backward and one fused AdamW step over `parameters`."""
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)

    def step() -> None:
        loss(unet).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def measure(
    steps: dict[str, Step], repeats: int, warmup: int, device: torch.device
) -> dict[str, list[float]]:
    """Seconds of each step, interleaved; the order turns each time, so that nobody is always first."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    for repetition in range(-warmup, repeats):
        shift = repetition % len(names)
        for name in names[shift:] + names[:shift]:
            synchronize(device)
            start = time.perf_counter()
            steps[name]()
            synchronize(device)
            if repetition >= 0:
                seconds[name].append(time.perf_counter() - start)
        if repetition >= 0:
            print(
                f"{repetition + 1:3}  " + "  ".join(f"{n} {s[-1]:8.4f} s" for n, s in seconds.items()),
                flush=True,
            )
    return seconds


def synchronize(device: torch.device) -> None:
    """Wait for the device, where there is something to wait for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peaks(steps: dict[str, Step], device: torch.device) -> dict[str, float]:
    """GiB that each step takes at its peak above what lay on the device before it; GPUs only."""
    if device.type != "cuda":
        return {}
    above = {}
    for name, step in steps.items():
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        above[name] = (torch.cuda.max_memory_allocated() - before) / 2**30
        print(f"peak above the weights  {name:8} {above[name]:.3f} GiB")
    return above


def report(
    options: argparse.Namespace, seconds: dict[str, list[float]], size: int, above: dict[str, float]
) -> None:
    """Print the ratios' median and spread, and write everything as JSON."""
    pairs = {
        "scumble/floor": ("scumble", "floor"),
        "peft/floor": ("peft", "floor"),
        "scumble/peft": ("scumble", "peft"),
    }
    ratios = {}
    for name, (over, under) in pairs.items():
        each = [a / b for a, b in zip(seconds[over], seconds[under], strict=True)]
        ratios[name] = {
            "median": statistics.median(each),
            "least": min(each),
            "most": max(each),
            "each": each,
        }
        low, middle, high = (ratios[name][key] for key in ("least", "median", "most"))
        print(f"{name:15} median {middle:.3f}   from {low:.3f} to {high:.3f}   n={len(each)}")
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    print("median seconds  " + "  ".join(f"{name} {value:.4f}" for name, value in medians.items()))
    result = {
        "benchmark": "training_step",
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "what": {k: getattr(options, k) for k in ("shape", "dtype", "batch", "rank", "repeats")}
        | {"size": size},
        "machine": machine()
        | {"threads": torch.get_num_threads(), "load_at_end": round(os.getloadavg()[0], 2)},
        "median_seconds": medians,
        **({"peak_gib_above_weights": above} if above else {}),
        "ratios": ratios,
        "seconds": seconds,
    }
    path = (
        options.output
        or RESULTS
        / f"training_step-{options.shape}-{options.dtype}-{size}-b{options.batch}-{options.device}.json"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
