"""The oracle: looks at a picture and says what is in it.

It judges everything in this project that claims to learn something, so it says what it can and can't see:

- It can say the subject, colour, background, position and size of **one** thing, and the style of the drawing, of
  pictures of the picturebook's world at any size (they are reduced to 64x64 first).
- It is a small convolutional network that was trained on drawn pictures only, plain and styled, blurred and noised a
  little. Its accuracy on freshly drawn pictures that it never saw is measured by `accuracy` and tested.
- It always answers, also for a picture that holds two things, an invented creature or nothing: then the words mean
  nothing and only `confidence` warns. In blueprint, woodcut and neon drawings a background is a few thin lines;
  `background` is less sure there (see `accuracy(style=...)`).
- It can't see beauty. A picture with the right fox and smeared outlines is right to it: look at the contact sheets.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from scumble.errors import ModelError
from scumble.picturebook import scenes
from scumble.picturebook.styles import STYLES

SIDE = 64
WORDS: Mapping[str, tuple[str, ...]] = {
    "subject": scenes.SUBJECTS,
    "color": scenes.COLORS,
    "background": scenes.BACKGROUNDS,
    "position": scenes.POSITIONS,
    "size": scenes.SIZES,
    "style": ("plain", *STYLES),
}
WEIGHTS = Path(__file__).parent / "assets" / "oracle.safetensors"


@dataclass(frozen=True)
class Reading:
    """What the oracle sees in one picture."""

    subject: str
    color: str
    background: str
    position: str
    size: str
    style: str
    confidence: Mapping[str, float]
    """Probability of each answer, in [0, 1]."""

    def agrees(self, scene: scenes.Scene, *words: str) -> bool:
        """Whether every named word ("subject", "color", ...) is that of the scene's first thing."""
        thing = scene.things[0]
        asked = {word: scene.background if word == "background" else getattr(thing, word) for word in words}
        return all(getattr(self, word) == said for word, said in asked.items())


class OracleNetwork(nn.Module):
    """(B, 3, 64, 64) in [-1, 1] -> logits (B, number of words) per question. 0.6 M parameters."""

    def __init__(self) -> None:
        super().__init__()

        def stage(inside: int, outside: int, stride: int, kernel: int = 3) -> nn.Sequential:
            convolution = nn.Conv2d(inside, outside, kernel, stride, kernel // 2, bias=False)
            return nn.Sequential(convolution, nn.BatchNorm2d(outside), nn.ReLU())

        self.body = nn.Sequential(
            stage(3, 32, 2, 5), stage(32, 64, 2), stage(64, 64, 1), stage(64, 112, 2), stage(112, 112, 1),
            stage(112, 160, 2), nn.Conv2d(160, 64, 1), nn.ReLU(), nn.Flatten(), nn.Dropout(0.1),
        )  # fmt: skip
        self.heads = nn.ModuleDict({name: nn.Linear(64 * 16, len(words)) for name, words in WORDS.items()})

    def forward(self, pictures: Tensor) -> dict[str, Tensor]:
        """One tensor of logits per question."""
        features = self.body(pictures)
        return {name: head(features) for name, head in self.heads.items()}


def to_tensor(pictures: Sequence[Image.Image]) -> Tensor:
    """Pictures of any size -> (B, 3, 64, 64) in [-1, 1]."""
    small = [p.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BOX if p.width > SIDE else Image.Resampling.BICUBIC)
             if p.size != (SIDE, SIDE) else p.convert("RGB") for p in pictures]  # fmt: skip
    stacked = np.stack([np.asarray(p) for p in small])
    return torch.from_numpy(stacked).permute(0, 3, 1, 2).float() / 127.5 - 1


@cache
def network() -> OracleNetwork:
    """The shipped oracle, loaded once.

    Raises:
        ModelError: the weights are not in the package.
    """
    if not WEIGHTS.exists():
        raise ModelError(f"The oracle's weights are missing: {WEIGHTS}. Reinstall scumble.")
    model = OracleNetwork()
    model.load_state_dict(
        {n: t.float() if t.is_floating_point() else t for n, t in load_file(WEIGHTS).items()}
    )
    return model.eval().requires_grad_(False)


@torch.no_grad()
def read(pictures: Sequence[Image.Image]) -> list[Reading]:
    """What is in each picture."""
    readings: list[Reading] = []
    for start in range(0, len(pictures), 128):
        answers = network()(to_tensor(pictures[start : start + 128]))
        best = {name: logits.softmax(1).max(1) for name, logits in answers.items()}
        for row in range(len(pictures[start : start + 128])):
            words = {name: WORDS[name][int(top.indices[row])] for name, top in best.items()}
            sure = {name: float(top.values[row]) for name, top in best.items()}
            readings.append(Reading(**words, confidence=sure))
    return readings


def accuracy(count: int = 1000, *, style: str = "plain", seed: int = 2**40) -> dict[str, float]:
    """The oracle's own share of right answers per question, on `count` fresh one-thing drawings of one style.

    `seed` is far from every seed that training uses, so that no picture was seen before.
    """
    from scumble.picturebook.draw import draw
    from scumble.rng import Streams

    streams = Streams(seed)
    drawn = [scenes.random_scene(streams.python("oracle", n), things=1, held_out=None) for n in range(count)]
    readings = read([draw(scene, SIDE, style) for scene in drawn])
    words = ("subject", "color", "background", "position", "size")
    right = {w: sum(r.agrees(s, w) for r, s in zip(readings, drawn, strict=True)) / count for w in words}
    return right | {"style": sum(r.style == style for r in readings) / count}


@dataclass(frozen=True)
class Judgement:
    """Shares of pictures, in [0, 1], on which the oracle agrees with what was asked."""

    pictures: int
    style: float
    subject: float
    color: float
    subject_and_color: float
    background: float


def judge(pictures: Sequence[Image.Image], asked: Sequence[scenes.Scene], style: str = "plain") -> Judgement:
    """Read pictures that were drawn for `asked` in `style`. Both must be of one length, at least 1."""
    readings = read(pictures)
    pairs = list(zip(readings, asked, strict=True))

    def share(*words: str) -> float:
        return sum(reading.agrees(scene, *words) for reading, scene in pairs) / len(pairs)

    return Judgement(
        pictures=len(pairs),
        style=sum(reading.style == style for reading in readings) / len(pairs),
        subject=share("subject"),
        color=share("color"),
        subject_and_color=share("subject", "color"),
        background=share("background"),
    )
