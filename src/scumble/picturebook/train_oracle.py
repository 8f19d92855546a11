"""How the oracle was trained: on drawn pictures, plain and styled, a little spoilt as generated ones are."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from scumble.picturebook import scenes
from scumble.picturebook.draw import draw
from scumble.picturebook.oracle import SIDE, WORDS, OracleNetwork
from scumble.rng import Streams

SEED = 77


def _scene(number: int) -> scenes.Scene:
    return scenes.random_scene(Streams(SEED).python("oracle-training", number), things=1, held_out=None)


def _style(number: int) -> str:
    styles = WORDS["style"]
    return styles[0] if number % 2 else styles[1 + (number // 2) % (len(styles) - 1)]


def _example(number: int) -> np.ndarray:
    return np.asarray(draw(_scene(number), SIDE, _style(number)))


def _labels(number: int) -> dict[str, int]:
    scene = _scene(number)
    thing = scene.things[0]
    said = {w: getattr(thing, w) for w in ("subject", "color", "position", "size")}
    said |= {"background": scene.background, "style": _style(number)}
    return {name: WORDS[name].index(word) for name, word in said.items()}


def spoil(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """What autoencoders and few steps do to pictures: blur, noise, other contrast and light."""
    count = len(pictures)

    def some(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, 1, 1, 1, generator=generator)

    blurred = functional.avg_pool2d(functional.pad(pictures, (1, 1, 1, 1), mode="replicate"), 3, 1)
    pictures = torch.lerp(pictures, blurred, some(0, 1) * (some(0, 1) < 0.6))
    noise = torch.randn(pictures.shape, generator=generator)
    soft = functional.interpolate(noise[:, :, ::4, ::4], scale_factor=4, mode="bilinear")
    pictures = pictures * some(0.85, 1.15) + some(-0.1, 0.1) + noise * some(0, 0.06) + soft * some(0, 0.12)
    shift = [int(torch.randint(-2, 3, (1,), generator=generator)) for _ in range(2)]
    return pictures.roll(shift, (2, 3)).clamp(-1, 1)


def train_oracle(
    file: Path, *, pictures: int = 36_000, steps: int = 5_000, log: Callable[[str], None] = print
) -> None:
    """Draw, train, and write the network's weights (fp16) to `file`."""
    work = file.with_suffix(".npz")
    if not work.exists():
        with ProcessPoolExecutor(os.cpu_count()) as pool:
            drawn = np.stack(list(pool.map(partial(_example), range(pictures), chunksize=64)))
        np.savez(work, drawn=drawn)
    data = torch.from_numpy(np.load(work)["drawn"])
    labels = {name: torch.tensor([_labels(n)[name] for n in range(len(data))]) for name in WORDS}
    torch.manual_seed(SEED)
    model, streams = OracleNetwork(), Streams(SEED)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3, weight_decay=0.02, fused=True)
    total = 0.0
    for step in range(steps):
        generator = streams.generator("oracle-batch", step)
        chosen = torch.randint(len(data), (96,), generator=generator)
        batch = spoil(data[chosen].permute(0, 3, 1, 2).float() / 127.5 - 1, generator)
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min((step + 1) / 200, 1.0, (steps - step) / (0.6 * steps))
        with torch.autocast("cpu", torch.bfloat16):
            answers = model(batch)
        loss = torch.stack(
            [functional.cross_entropy(a.float(), labels[n][chosen]) for n, a in answers.items()]
        ).sum()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        optimizer.zero_grad()
        total += loss.item()
        if (step + 1) % 250 == 0:
            log(f"oracle {step + 1}/{steps} loss {total / 250:.4f}")
            total = 0.0
    state = {
        n: (t.half() if t.is_floating_point() else t).contiguous()
        for n, t in model.eval().state_dict().items()
    }
    save_file(state, file)
