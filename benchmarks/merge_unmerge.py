"""How long does it take to merge an adapter into a UNet's weights and to take it out again, and are the bits back?

Two UNets of one shape in one process take turns, each with a rank-4 LoRA of all attention layers.

    copy       the changed weights copied once: read and written, the physical limit of a merge that keeps W0
    merge      scumble.adapters.merge: W = W0 + s up down, W0 kept
    undo       Merged.undo: W0 put back, the same objects
    fuse       diffusers' fuse_lora
    unfuse     diffusers' unfuse_lora, which subtracts

    python benchmarks/merge_unmerge.py                               # seconds, a toy UNet
    python benchmarks/merge_unmerge.py --full --dtype fp16

Prints as well by how much the weights differ from the original ones after one round of each. Memory: while merged,
every changed weight is there twice.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from overhead import with_peft
from turns import DTYPES, build, fill, in_turns, options_of, ratios, save

from scumble.adapters import Adapter, LoraSettings, Merged, layers_of, merge


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options = options_of(parser)
    dtype, cpu = DTYPES[options.dtype], torch.device("cpu")
    mine = build(options.shape, dtype, cpu).eval()
    adapter = Adapter.inject({"unet": mine}, "attention", LoraSettings(rank=4))
    fill(adapter)
    adapter.eject()
    layers = {path: layer for path, layer in layers_of({"unet": mine}).items() if path in adapter.deltas}
    originals = {path: layer.weight for path, layer in layers.items()}
    bits = {path: weight.detach().clone() for path, weight in originals.items()}
    theirs = with_peft(build(options.shape, dtype, cpu), (4,))
    bases = {
        name: module.base_layer.weight
        for name, module in theirs.named_modules()
        if hasattr(module, "base_layer")
    }
    before = {name: weight.detach().clone() for name, weight in bases.items()}
    room = {path: torch.empty_like(weight) for path, weight in bits.items()}
    merged: list[Merged] = []

    def copy() -> None:
        for path, weight in originals.items():
            room[path].copy_(weight.detach())

    steps: dict[str, Callable[[], object]] = {
        "copy": copy,
        "merge": lambda: merged.append(merge(adapter, {"unet": mine})),
        "undo": lambda: merged.pop().undo(),
        "fuse": lambda: theirs.fuse_lora(),
        "unfuse": lambda: theirs.unfuse_lora(),
    }
    # in this order always: what was merged is taken out
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(-1, options.repeats):
        for name, step in steps.items():
            (taken,) = in_turns({name: step}, 1, options.clock, warmup=0).values()
            if number >= 0:
                seconds[name] += taken
    found = ratios(
        seconds,
        {"merge": "copy", "undo": "copy", "fuse": "merge", "unfuse": "undo"},
    )
    exact = all(
        layers[path].weight is originals[path] and torch.equal(originals[path], bits[path]) for path in layers
    )
    drift = max(float((bases[name] - before[name]).abs().max()) for name in bases)
    size = sum(weight.numel() * weight.element_size() for weight in originals.values())
    print(
        f"scumble: bit-identical {exact}; diffusers: off by up to {drift:.2g}; {size / 1e6:.0f} MB of weights"
    )
    save(
        "merge_unmerge",
        options,
        f"{size / 1e6:.0f} MB read and written once, as in `copy`; putting W0 back copies nothing",
        ratios=found,
        seconds=seconds,
        bytes=size,
        bit_identical={"scumble": exact, "diffusers": drift == 0.0},
        drift={"scumble": 0.0 if exact else None, "diffusers": drift},
    )


if __name__ == "__main__":
    main()
