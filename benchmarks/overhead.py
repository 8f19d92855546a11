"""What do unmerged adapters cost a UNet's forward: scumble with none, one, three and twenty resident, beside peft?

Copies of one UNet share their weights and take turns in one process; without gradients, in eval mode.

    base             the bare UNet
    resident         twenty adapters in memory, none of them acting: what it costs to be ready to switch
    one, three       ranks 4; 4, 16 and 16, on all attention layers, at strength 0.8
    peft 1, peft 3   the same with diffusers and peft

    python benchmarks/overhead.py                              # seconds, a toy UNet: to see that it runs
    python benchmarks/overhead.py --shape thin --clock cpu     # SD 1.5's graph, narrow: what each operation costs
    python benchmarks/overhead.py --full --size 32             # SD 1.5's shape

Limit: the products of rank r beside a layer of C x C are 2 r / C of its own, 2.5 % at r = 4 and C = 320, where
attention's linear layers are some 15 % of a UNet's forward: 1.003.
"""

from __future__ import annotations

import argparse

import torch
from turns import DTYPES, build, fill, in_turns, inputs, options_of, ratios, save, twin

from scumble.adapters import Adapter, LoraSettings

STRENGTH = 0.8


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=int, help="side of the latents; default the shape's")
    parser.add_argument("--batch", type=int, default=1)
    options = options_of(parser)
    unet = build(options.shape, DTYPES[options.dtype], torch.device("cpu")).eval()
    x, t, text = inputs(unet, options.batch, options.size or unet.config.sample_size)
    models = {"base": unet}
    for name, ranks, strength in (
        ("resident", (4,) * 20, 0.0),
        ("one", (4,), STRENGTH),
        ("three", (4, 16, 16), STRENGTH),
    ):
        models[name] = twin(unet).eval()
        for number, rank in enumerate(ranks):
            settings = LoraSettings(rank=rank)
            adapter = Adapter.inject({"unet": models[name]}, "attention", settings, name=f"{number}")
            fill(adapter)
            adapter.strength = strength
    for name, ranks in (("peft 1", (4,)), ("peft 3", (4, 16, 16))):
        models[name] = with_peft(twin(unet).eval(), ranks)

    def forward(name: str) -> None:
        with torch.no_grad():
            models[name](x, t, text)

    steps = {name: lambda name=name: forward(name) for name in models}  # type: ignore[misc]
    seconds = in_turns(steps, options.repeats, options.clock)
    found = ratios(seconds, {name: "base" for name in models if name != "base"})
    save("overhead", options, "1.003 of the base for one adapter of rank 4", ratios=found, seconds=seconds)


def with_peft(unet: torch.nn.Module, ranks: tuple[int, ...]) -> torch.nn.Module:
    """Adapters as diffusers and peft have them, all acting."""
    from peft import LoraConfig

    names = [f"adapter{number}" for number in range(len(ranks))]
    for name, rank in zip(names, ranks, strict=True):
        config = LoraConfig(
            r=rank,
            lora_alpha=rank,
            target_modules=["to_q", "to_k", "to_v", "to_out.0"],
            init_lora_weights=False,
        )
        unet.add_adapter(config, adapter_name=name)
    unet.set_adapters(names, weights=STRENGTH)
    return unet.requires_grad_(False).eval()


if __name__ == "__main__":
    main()
