"""From one adapter to another: between resident ones, another strength, from memory, from a file; beside diffusers.

Two pipelines over one UNet and one text encoder, whose weights are memory that nobody wrote to (switching reads none),
take turns in one process. Each adapter changes all attention layers of both. scumble holds --resident of them,
diffusers three.

    switch           one resident's strength to 0, another's to 1
    and read         the same, and every layer looks up what acts now, which else the next forward does
    strength         another strength
    set_adapters     diffusers: switch
    set weights      diffusers: another strength
    copy             another adapter's values, from memory, into the one that is there
    plain copy       the same tensors, copied: the limit of `copy`
    file             load_adapter of scumble, and unloaded (not counted)
    read             safetensors' load_file and nothing else: the limit of `file`
    load_lora        diffusers' load_lora_weights, and deleted (not counted)
    hotswap          diffusers' load_lora_weights(hotswap=True), UNet alone: with a text encoder it refuses

    python benchmarks/switching.py                 # seconds, a toy pipeline
    python benchmarks/switching.py --full          # SD 1.5's shape

Limit: a switch is a pointer, 0; a file is read once.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils.logging import set_verbosity_error
from safetensors.torch import load_file
from training_step import SHAPES
from transformers import CLIPTextConfig, CLIPTextModel
from transformers.utils import logging as transformers_logging
from turns import CLOCKS, fill, options_of, ratios, save

from scumble import load_adapter, unload_adapters
from scumble.adapters import Adapted, Adapter, LoraSettings
from scumble.adapters.dial import Dial
from scumble.formats import write

RANKS = (4, 16)
TEXT = {"tiny": (32, 2), "thin": (32, 12), "sd15": (768, 12)}
"""Width and layers of the text encoder."""


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--resident", type=int, default=20)
    options = options_of(parser)
    set_verbosity_error()
    transformers_logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory(prefix="scumble-switching-") as folder:
        seconds = measure(options, Path(folder))
    over = {
        "switch": "set_adapters",
        "and read": "set_adapters",
        "strength": "set weights",
        "copy": "plain copy",
        "file": "read",
        "load_lora": "file",
        "hotswap": "file",
    }
    found = ratios(seconds, over)
    save("switching", options, "a switch is a pointer; a file is read once", ratios=found, seconds=seconds)


def measure(options: argparse.Namespace, folder: Path) -> dict[str, list[float]]:
    """Seconds of each step in each round; what a step leaves behind is taken away uncounted."""
    first = pipeline_of(options.shape)
    ours, theirs, swapped = (pipeline_of(options.shape, first) for _ in range(3))
    roots = {"unet": ours.unet, "text_encoder": ours.text_encoder}
    targets = ["attention", "text_encoder.*.self_attn.*"]
    residents = [
        Adapter.inject(roots, targets, LoraSettings(rank=RANKS[number % 2]), name=f"resident {number}")
        for number in range(options.resident)
    ]
    files, states = [], []
    for number, adapter in enumerate(residents):
        fill(adapter)
        adapter.strength = 0.0
        if number < 3:
            state = adapter.state()
            states.append(state)
            files.append(write(state, folder / f"{number}.safetensors"))
            only = type(state)({p: v for p, v in state.layers.items() if p.startswith("unet.")})
            write(only, folder / f"unet-{number}.safetensors")
            theirs.load_lora_weights(
                str(folder), weight_name=f"{number}.safetensors", adapter_name=f"a{number}"
            )
    swapped.unet.enable_lora_hotswap(target_rank=max(RANKS))
    swapped.load_lora_weights(str(folder), weight_name="unet-0.safetensors", adapter_name="hot")
    layers = [m for root in roots.values() for m in root.modules() if isinstance(m, Adapted)]
    copies = [[parameter.detach().clone() for parameter in residents[0].parameters()] for _ in range(2)]
    number = 0

    def switch() -> None:
        residents[number % len(residents)].strength = 0.0
        residents[(number + 1) % len(residents)].strength = 1.0

    def and_read() -> None:
        switch()
        for layer in layers:
            layer._acting, layer._read = layer._find(), Dial.turned

    def strength() -> None:
        residents[0].strength = 0.1 * number

    def plain_copy() -> None:
        for into, value in zip(*copies, strict=True):
            into.copy_(value)

    def load_lora() -> None:
        theirs.load_lora_weights(str(folder), weight_name=files[number % 2].name, adapter_name="new")

    def hotswap() -> None:
        name = f"unet-{number % 3}.safetensors"
        swapped.load_lora_weights(str(folder), weight_name=name, adapter_name="hot", hotswap=True)

    steps: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
        "switch": (switch, nothing),
        "and read": (and_read, nothing),
        "strength": (strength, nothing),
        "set_adapters": (lambda: theirs.set_adapters([f"a{number % 3}"]), nothing),
        "set weights": (lambda: theirs.set_adapters(["a0"], [0.1 * (1 + number % 9)]), nothing),
        "copy": (lambda: residents[0].load_state(states[2 * (number % 2)]), nothing),
        "plain copy": (plain_copy, nothing),
        "file": (
            lambda: load_adapter(ours, files[number % 2], quiet=True),
            lambda: unload_adapters(ours),
        ),
        "read": (lambda: load_file(files[number % 2]), nothing),
        "load_lora": (load_lora, lambda: theirs.delete_adapters(["new"])),
        "hotswap": (hotswap, nothing),
    }
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    now = CLOCKS[options.clock]
    for number in range(options.repeats + 1):
        for name, (step, after) in steps.items():
            start = now()
            step()
            taken = now() - start
            after()
            if number:
                seconds[name].append(taken)
    return seconds


def nothing() -> None:
    """What most steps leave behind."""


def pipeline_of(shape: str, like: Any = None) -> StableDiffusionPipeline:
    """A pipeline of a UNet and a text encoder whose weights were never written, or are those of `like`."""
    width, depth = TEXT[shape]
    config = CLIPTextConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=depth,
        num_attention_heads=width // 16,
    )
    with torch.device("meta"):
        models = {"unet": UNet2DConditionModel(**SHAPES[shape]), "text_encoder": CLIPTextModel(config)}
    for name, model in models.items():
        if like is None:
            model.to_empty(device="cpu")
        else:
            model.load_state_dict(getattr(like, name).state_dict(), assign=True)
            for mine, other in zip(model.modules(), getattr(like, name).modules(), strict=True):
                mine._buffers.update(other._buffers)  # those that no state_dict has
        model.requires_grad_(False).eval()
    return StableDiffusionPipeline(
        vae=None,
        tokenizer=None,
        scheduler=DDIMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        **models,
    )


if __name__ == "__main__":
    main()
