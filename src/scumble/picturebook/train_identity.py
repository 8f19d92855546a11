"""How the network that tells individuals apart was trained: on drawn pictures, a little spoilt like generated ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save_file
from torch.nn import functional

from scumble.picturebook import scenes
from scumble.picturebook.draw import draw
from scumble.picturebook.identity import NAMES, NOBODY, SIDE, IdentityNetwork, example, look
from scumble.picturebook.oracle import to_tensor
from scumble.picturebook.train_oracle import spoil
from scumble.rng import Streams

SEED = 78
ORDINARY_ONE_IN = 10
"""One picture in this many is an ordinary one of the picturebook: nobody."""
SPOILT = 2
"""Each picture is looked at this often, spoilt anew."""


def training_example(number: int) -> tuple[Image.Image, dict[str, str]]:
    """The picture of this number, and its right answers."""
    rng = Streams(SEED).python("identity-training", number)
    if number % ORDINARY_ONE_IN:
        return example(rng, number - number // ORDINARY_ONE_IN)
    scene = scenes.random_scene(rng, things=1, held_out=None)
    thing = scene.things[0]
    said = {"name": NOBODY, "background": scene.background, "position": thing.position, "size": thing.size}
    return draw(scene, SIDE), said


def train_identity(
    file: Path, *, pictures: int = 3_000, steps: int = 800, log: Callable[[str], None] = print
) -> None:
    """Draw, look through the oracle, train, and write the weights (fp16) to `file`: a minute on one core."""
    examples = [training_example(number) for number in range(pictures)]
    names = torch.tensor([NAMES.index(said["name"]) for _, said in examples])
    streams = Streams(SEED)
    rows, labels = [], []
    for again in range(SPOILT):
        for start in range(0, pictures, 96):
            batch = to_tensor([picture for picture, _ in examples[start : start + 96]])
            rows.append(look(spoil(batch, streams.generator("identity-spoil", again, start))))
        labels.append(names)
    seen, label = torch.cat(rows), torch.cat(labels)
    log(f"identity: {pictures} pictures drawn and looked at")
    torch.manual_seed(SEED)
    model = IdentityNetwork()
    model.middle.copy_(seen.mean(0))
    model.spread.copy_(seen.std(0).clamp(min=1e-2))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=0.05)
    total = 0.0
    for step in range(steps):
        chosen = torch.randint(len(seen), (192,), generator=streams.generator("identity-batch", step))
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1.0, (steps - step) / (0.6 * steps))
        blurred = seen[chosen] + 0.3 * model.spread * torch.randn(
            192, seen.shape[1], generator=streams.generator("identity-noise", step)
        )
        loss = functional.cross_entropy(model(blurred), label[chosen])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        total += loss.item()
        if (step + 1) % 200 == 0:
            log(f"identity {step + 1}/{steps} loss {total / 200:.4f}")
            total = 0.0
    save_file({name: tensor.half().contiguous() for name, tensor in model.state_dict().items()}, file)


if __name__ == "__main__":
    import argparse

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path, help="where the weights go")
    train_identity(parser.parse_args().file)
