"""Does it pay on this processor to keep convolutions' weights in the order of its kernels (`models/prepacked.py`)?

A frozen UNet's forward and backward with LoRA, in turns in one process over the same weights:

    plain        torch's own convolutions
    kept         weights in blocks, made once
    no memory    the same kernels where no memory is left for blocks: the same bits as "kept"

    python benchmarks/prepacked.py                                         # seconds, a toy UNet: to see that it runs
    python benchmarks/prepacked.py --full --size 32 --dtype bf16           # SD 1.5's shape at 256 pixels

Where "kept" is not clearly below 1 and "no memory" not near it, blocks do not pay: `pays` in that module says where
they are used. The first turns, in which blocks are made, are not counted but told: "making".
"""

from __future__ import annotations

import argparse
import time

import torch
import torch.nn.functional as F
from turns import DTYPES, build, in_turns, inputs, options_of, ratios, save, twin

from scumble.adapters import Adapter, LoraSettings
from scumble.models import prepacked
from scumble.models.attention import set_attention


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=int, help="side of the latents; default the shape's")
    options = options_of(parser)
    if options.shape != "sd15":
        prepacked.SMALLEST = 1
    unet = build(options.shape, DTYPES[options.dtype], torch.device("cpu"))
    x, t, text = inputs(unet, 1, options.size or unet.config.sample_size)
    models = {name: twin(unet) for name in ("plain", "kept", "no memory")}
    for name, model in models.items():
        set_attention(model, "auto")
        if name != "plain":
            prepacked.prepack(model)
        Adapter.inject({"unet": model}, "attention", LoraSettings(rank=4))
    for part in models["no memory"].modules():
        if isinstance(part, prepacked.Prepacked):
            part._room = prepacked.Room(2**60)

    def step(name: str) -> None:
        F.mse_loss(models[name](x, t, text).sample.float(), x.float()).backward()

    making = []
    for _ in range(2):  # blocks are made where a shape comes twice in a row
        begun = time.perf_counter()
        step("kept")
        making.append(time.perf_counter() - begun)
    seconds = in_turns(
        {name: lambda name=name: step(name) for name in models}, options.repeats, options.clock
    )  # type: ignore[misc]
    found = ratios(seconds, {"kept": "plain", "no memory": "plain"})
    print("making  " + "  ".join(f"{each:.2f} s" for each in making))
    save(
        "prepacked",
        options,
        "the products alone, without the reading and writing of a weight in another order",
        pays=prepacked.pays(),
        ratios=found,
        seconds=seconds,
        making=making,
    )


if __name__ == "__main__":
    main()
