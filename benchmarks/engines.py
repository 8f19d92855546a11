"""The engines side by side: a training step as it stands, and with the base's blocks compiled.

    python benchmarks/engines.py                              # the embedded base's UNet, fp32
    python benchmarks/engines.py --full --dtype bf16 --size 64

Both train rank 4 on the attention layers of one UNet with the same weights (embedded base; with --full random ones of
SD 1.5's shape, whose time does not depend on them), in one process, in turns; what is compared are ratios within a
repetition. Beside the ratios: how far the losses are apart, seconds to the first step, and what is compiled anew when
the bucket, the strength and the adapter change. --graph adds the recorded engine, on a GPU. Writes benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from machine import machine
from torch import Tensor, nn
from training_step import DTYPES, RESULTS, as_in_a_base, build, synchronize, twin

from scumble.adapters import Adapter, LoraSettings
from scumble.models.unet import UNetBase
from scumble.training.engine import ENGINES, Engine, Work
from scumble.training.numerics import make_accelerator
from scumble.training.optimizers import OptimizerSettings, build_optimizer


def processor_seconds() -> float:
    """Processor time of this process, and of those that it started and waited for, such as a C++ compiler."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


CLOCKS = {"wall": time.perf_counter, "cpu": processor_seconds}


@dataclass(frozen=True)
class Batch:
    """As much of a batch as an engine looks at."""

    latents: Tensor
    t: Tensor
    text: Tensor
    target: Tensor
    conditioning: str = "cached"

    def __len__(self) -> int:
        return len(self.latents)


def batch_for(unet: UNet2DConditionModel, count: int, height: int, width: int) -> Batch:
    """Random numbers, the same for equal sizes."""
    generator = torch.Generator().manual_seed(height * 1000 + width)
    like = next(unet.parameters())

    def drawn(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator).to(like.device, like.dtype)

    shape = (count, unet.config.in_channels, height, width)
    t = torch.randint(0, 1000, (count,), generator=generator).to(like.device)
    return Batch(drawn(*shape), t, drawn(count, 77, unet.config.cross_attention_dim), drawn(*shape))


class Objective(nn.Module):
    """The squared error of the UNet's answer."""

    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, batch: Batch) -> Tensor:
        return self.measured(self.drawn(batch))

    def drawn(self, batch: Batch) -> Batch:
        return batch

    def measured(self, batch: Batch) -> Tensor:
        answer = self.unet(batch.latents, batch.t, batch.text).sample
        return (answer.float() - batch.target.float()).square().flatten(1).mean(1)


class Arm:
    """One engine on its own UNet over shared weights."""

    def __init__(self, name: str, unet: UNet2DConditionModel, rank: int) -> None:
        self.name, self.unet = name, unet
        as_in_a_base(unet)
        self.adapter: Adapter
        self.engine: Engine | None = None
        self.inject(rank)

    def inject(self, rank: int) -> None:
        """A new adapter in the place of the old one, and an engine for it."""
        if self.engine is not None:
            self.engine.close()
            self.adapter.eject()
        self.adapter = Adapter.inject({"unet": self.unet}, "attention", LoraSettings(rank=rank))
        parameters = list(self.adapter.parameters())
        accelerator = make_accelerator("no", parameters[0].device)
        groups = [{"params": parameters, "lr": 1e-4, "name": "unet"}]
        objective, optimizer = Objective(self.unet), build_optimizer(OptimizerSettings(), groups)
        prepared, stepper = accelerator.prepare(objective, optimizer)
        kinds = UNetBase.repeated
        blocks = [part for part in self.unet.modules() if type(part).__name__ in kinds]
        work = Work(objective, prepared, stepper, parameters, 1.0, blocks, accelerator)
        self.engine = ENGINES.get(self.name)(work)

    def step(self, batch: Batch) -> Tensor:
        """One optimizer step; the losses."""
        assert self.engine is not None
        self.engine.zero()
        losses = self.engine.backward(batch, len(batch), last=True)  # type: ignore[arg-type]
        norm = self.engine.clip()
        self.engine.step({"unet": 1e-4}, (~norm.isfinite()).float())
        return losses

    def timed(self, batch: Batch, clock: Callable[[], float] = time.perf_counter) -> tuple[float, Tensor]:
        """Seconds of a step, and its losses."""
        device = batch.latents.device
        synchronize(device)
        start = clock()
        losses = self.step(batch)
        synchronize(device)
        return clock() - start, losses


def main() -> None:
    """Measure, print, write."""
    options = arguments()
    device, dtype = torch.device(options.device), DTYPES[options.dtype]
    torch.manual_seed(0)
    unet = build("sd15", dtype, device) if options.full else embedded(dtype, device)
    side = options.size or unet.config.sample_size
    names = ["eager", "compile", *(["graph"] if options.graph else [])]
    unets = {name: unet if name == "eager" else twin(unet) for name in names}
    arms = {name: Arm(name, unets[name], options.rank) for name in names}
    batch = batch_for(unet, options.batch, side, side)
    clock = CLOCKS[options.clock]
    first = {name: arm.timed(batch, clock)[0] for name, arm in arms.items()}
    print(
        "seconds to the first step  " + "  ".join(f"{name} {value:.2f}" for name, value in first.items()),
        flush=True,
    )
    seconds, apart = measured(arms, batch, options.repeats, clock)
    ratios = {
        f"{name}/eager": [a / b for a, b in zip(seconds[name], seconds["eager"], strict=True)]
        for name in names[1:]
    }
    for name, each in ratios.items():
        print(
            f"{name:15} median {statistics.median(each):.3f}   from {min(each):.3f} to {max(each):.3f}   n={len(each)}"
        )
    graphs = compiled_graphs()
    anew = changes(arms["compile"], side, options)
    print(
        f"graphs of the first step {graphs}, anew: "
        + ", ".join(f"{what} {count}" for what, count in anew.items())
    )
    gained = first["compile"] - first["eager"]
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    saved = medians["eager"] - medians["compile"]
    print(
        f"the first step's {gained:.1f} s come back after {gained / saved:.0f} steps"
        if saved > 0
        else "never back"
    )
    shape = "sd15" if options.full else "picturebook"
    result = {
        "benchmark": "engines",
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "what": {
            "shape": shape,
            "dtype": options.dtype,
            "batch": options.batch,
            "size": side,
            "rank": options.rank,
            "clock": options.clock,
        },
        "seconds_to_first_step": first,
        "median_seconds": medians,
        "ratios": {
            name: {"median": statistics.median(each), "least": min(each), "most": max(each), "each": each}
            for name, each in ratios.items()
        },
        "largest_relative_difference_of_losses": apart,
        "graphs_of_first_step": graphs,
        "compiled_anew": anew,
        "machine": machine()
        | {"threads": torch.get_num_threads(), "load_at_end": round(os.getloadavg()[0], 2)},
    }
    path = (
        options.output
        or RESULTS / f"engines-{shape}-{options.dtype}-{side}-b{options.batch}-{device.type}.json"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(f"wrote {path}")


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--full", action="store_true", help="SD 1.5's shape: 3.4 GB in fp32, 1.7 in bf16, and room"
    )
    parser.add_argument("--graph", action="store_true", help="the recorded engine too; needs a GPU")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="dtype of the frozen weights")
    parser.add_argument("--size", type=int, help="side of the latents; default the base's own")
    parser.add_argument("--batch", type=int, default=2, help="1 is compiled apart from all other numbers")
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument(
        "--clock", choices=CLOCKS, default="wall", help="cpu: processor time, on a machine with other work"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, help="the JSON file; default in benchmarks/results/")
    return parser.parse_args()


def embedded(dtype: torch.dtype, device: torch.device) -> UNet2DConditionModel:
    """The embedded base's UNet, frozen."""
    from scumble.models import load_base

    denoiser: Any = load_base("picturebook", dtype=dtype, device=device).denoiser
    return denoiser.train()


def measured(
    arms: dict[str, Arm], batch: Batch, repeats: int, clock: Callable[[], float]
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Seconds of each arm, in turns whose order changes, after one step to warm up; and how far their losses come
    apart, as a share of eager's."""
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    apart, names = dict.fromkeys(arms, 0.0), list(arms)
    for repetition in range(-1, repeats):
        shift, losses = repetition % len(names), {}
        for name in names[shift:] + names[:shift]:
            spent, losses[name] = arms[name].timed(batch, clock)
            if repetition >= 0:
                seconds[name].append(spent)
        for name, found in losses.items():
            share = ((found - losses["eager"]) / losses["eager"]).abs().max().item()
            apart[name] = max(apart[name], share)
        if repetition >= 0:
            told = "  ".join(f"{name} {each[-1]:8.4f} s" for name, each in seconds.items())
            print(f"{repetition + 1:3}  {told}", flush=True)
    return seconds, {name: value for name, value in apart.items() if name != "eager"}


def changes(arm: Arm, side: int, options: argparse.Namespace) -> dict[str, int]:
    """How many graphs are compiled anew for what a run, or the next one, may change."""
    found: dict[str, int] = {}

    def count(what: str, action: Callable[[], object]) -> None:
        before = compiled_graphs()
        action()
        found[what] = compiled_graphs() - before

    def strength(value: float) -> None:
        arm.adapter.strength = value
        arm.step(batch_for(arm.unet, options.batch, side, side))

    def adapter(rank: int) -> None:
        arm.inject(rank)
        arm.step(batch_for(arm.unet, options.batch, side, side))

    wide, high = side + side // 2, side // 2
    count("another bucket", lambda: arm.step(batch_for(arm.unet, options.batch, high, wide)))
    count("more pictures", lambda: arm.step(batch_for(arm.unet, options.batch + 1, side, side)))
    count("another strength", lambda: strength(0.7))
    count("a new adapter", lambda: adapter(options.rank))
    count("of half the rank", lambda: adapter(options.rank // 2))
    return found


def compiled_graphs() -> int:
    """Graphs that torch.compile has made in this process."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


if __name__ == "__main__":
    main()
