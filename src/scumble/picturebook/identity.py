"""Identity: says which of the invented individuals a picture shows, and where, how big and on what background.

The oracle knows words; this one knows faces. It is what "has the adapter learned *this* creature?" is measured with:

- It answers with one of the creatures' names or "nobody". It learned "nobody" from what is easily mistaken: an
  individual's shape in other colours, another thing in an individual's colours, and ordinary pictures of the
  picturebook. So a name is said only where shape *and* colours are right.
- It looks through the oracle's eyes: a small network on what the oracle's layers see. A new oracle needs a new one:
  `python -m scumble.picturebook.train_identity FILE`.
- It was trained on drawn pictures only, blurred and noised a little. Its accuracy on freshly drawn pictures that it
  never saw is measured by `accuracy` and tested, and so is the law that makes its features a measure of likeness: two
  pictures of one individual in different scenes are closer than pictures of two.
- Background, position and size are the oracle's own answers; that they hold for individuals too is tested here.
- It knows only these individuals. Of a picture of something else its name means nothing; `features` still compare.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from scumble.errors import ModelError
from scumble.picturebook import oracle, scenes
from scumble.picturebook.creatures import CREATURES, Creature, draw_individual
from scumble.picturebook.geometry import RGB
from scumble.picturebook.oracle import SIDE, to_tensor
from scumble.picturebook.shapes import shape
from scumble.rng import Streams

NOBODY = "nobody"
NAMES = (*CREATURES, NOBODY)
PLACES = ("background", "position", "size")
EARLIER = (2, 4)
"""The oracle's layers that are looked at beside its last one: 64 and 112 channels."""
SEEN = 2 * 64 + 2 * 112 + 1024
FEATURES = 128
WEIGHTS = Path(__file__).parent / "assets" / "identity.safetensors"


@dataclass(frozen=True)
class Sighting:
    """Who is seen in one picture, and where."""

    name: str
    """One of the creatures' names, or "nobody"."""
    background: str
    position: str
    size: str
    likeness: Mapping[str, float]
    """Name, "nobody" included -> probability in [0, 1]."""


class IdentityNetwork(nn.Module):
    """(B, 1376) of `look` -> (B, 7) logits, one for each name and the last for nobody. 0.2 M parameters."""

    middle: Tensor
    spread: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("middle", torch.zeros(SEEN))
        self.register_buffer("spread", torch.ones(SEEN))
        self.who = nn.Linear(SEEN, FEATURES)
        self.name = nn.Linear(FEATURES, len(NAMES))

    def features(self, seen: Tensor) -> Tensor:
        """(B, 128): what tells individuals apart."""
        return self.who((seen - self.middle) / self.spread).relu()

    def forward(self, seen: Tensor) -> Tensor:
        return self.name(self.features(seen))


@torch.no_grad()
def look(pictures: Tensor) -> Tensor:
    """(B, 3, 64, 64) in [-1, 1] -> (B, 1376): what the oracle sees.

    Its last layer knows shapes and where they are; mean and maximum of two earlier ones keep colours and markings,
    which the oracle itself has no need for.
    """
    kept = []
    for number, layer in enumerate(oracle.network().body):
        pictures = layer(pictures)
        if number in EARLIER:
            kept += [pictures.mean((2, 3)), pictures.amax((2, 3))]
    return torch.cat([*kept, pictures], dim=1)


@cache
def network() -> IdentityNetwork:
    """The shipped network, loaded once.

    Raises:
        ModelError: the weights are not in the package.
    """
    if not WEIGHTS.exists():
        raise ModelError(
            f"The weights that tell individuals apart are missing: {WEIGHTS}. Reinstall scumble."
        )
    model = IdentityNetwork()
    model.load_state_dict(
        {n: t.float() if t.is_floating_point() else t for n, t in load_file(WEIGHTS).items()}
    )
    return model.eval().requires_grad_(False)


@torch.no_grad()
def read(pictures: Sequence[Image.Image]) -> list[Sighting]:
    """Who is in each picture."""
    sightings = []
    for reading, row in zip(oracle.read(pictures), _each(pictures, network()), strict=True):
        likeness = dict(zip(NAMES, row.softmax(0).tolist(), strict=True))
        name = max(NAMES, key=likeness.__getitem__)
        sightings.append(Sighting(name, reading.background, reading.position, reading.size, likeness))
    return sightings


@torch.no_grad()
def features(pictures: Sequence[Image.Image]) -> Tensor:
    """(N, 128) fp32 of length 1: the cosine of two rows says how alike two individuals are, whatever the scene."""
    return nn.functional.normalize(_each(pictures, network().features), dim=1)


def _each(pictures: Sequence[Image.Image], function: Callable[[Tensor], Tensor]) -> Tensor:
    return torch.cat(
        [function(look(to_tensor(pictures[start : start + 128]))) for start in range(0, len(pictures), 128)]
    )


def recoloured(creature: Creature, rng: random.Random) -> Creature:
    """The same shape in clearly other colours: not this individual."""
    while True:
        palette: list[RGB] = [
            (rng.randrange(20, 256), rng.randrange(20, 256), rng.randrange(20, 256)) for _ in range(3)
        ]
        if rng.random() < 0.3:
            other = rng.choice(list(CREATURES.values()))
            palette = [other.body, other.second, other.third]
        if rng.random() < 0.4:
            palette = [creature.body, creature.second, creature.third]
            rng.shuffle(palette)
        if sum(abs(a - b) for a, b in zip(palette[0], creature.body, strict=True)) > 110:
            return replace(creature, body=palette[0], second=palette[1], third=palette[2])


def disguised(creature: Creature, rng: random.Random) -> Creature:
    """An ordinary subject in this individual's colours: not this individual either."""
    form = shape(rng.choice(scenes.SUBJECTS))
    return replace(creature, build=lambda _: list(form.parts), lift=form.lift)


def accuracy(count: int = 600, *, seed: int = 2**40) -> dict[str, float]:
    """Share of right answers on fresh drawings: "name" of individuals, "nobody" of look-alikes (a third of the
    drawings), and the other questions of both.

    `seed` is far from every seed that training uses, so that no picture was seen before.
    """
    drawn = [example(Streams(seed).python("identity", number), number) for number in range(count)]
    pairs = [(seen, said) for seen, (_, said) in zip(read([p for p, _ in drawn]), drawn, strict=True)]
    individuals = [(seen, said) for seen, said in pairs if said["name"] != NOBODY]
    others = [(seen, said) for seen, said in pairs if said["name"] == NOBODY]

    def share(of: list[tuple[Sighting, dict[str, str]]], question: str) -> float:
        return sum(getattr(seen, question) == said[question] for seen, said in of) / len(of)

    found = {"name": share(individuals, "name"), "nobody": share(others, "name")}
    return found | {question: share(pairs, question) for question in PLACES}


def example(rng: random.Random, number: int) -> tuple[Image.Image, dict[str, str]]:
    """A picture and its right answers: two in three of an individual, the third of somebody like it."""
    creature = list(CREATURES.values())[number // 3 % len(CREATURES)]
    name = creature.name
    if number % 3 == 2:
        creature, name = rng.choice((recoloured, recoloured, disguised))(creature, rng), NOBODY
    said = {
        "name": name,
        "background": rng.choice(scenes.BACKGROUNDS),
        "position": rng.choice(scenes.POSITIONS),
        "size": rng.choice(scenes.SIZES),
    }
    picture = draw_individual(
        creature, said["background"], said["position"], said["size"], rng.randrange(scenes.SEED_LIMIT), SIDE
    )
    return picture, said
