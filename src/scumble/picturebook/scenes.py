"""Scenes as data: what stands where, in which colour, on which background.

A scene is the exact meaning of a picture: captions are written from it, pictures are drawn from it, and an
oracle that reads a picture is judged against it.
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass

SUBJECTS: tuple[str, ...] = (
    "fox",
    "cat",
    "rabbit",
    "bird",
    "fish",
    "turtle",
    "snail",
    "butterfly",
    "tree",
    "flower",
    "mushroom",
    "car",
    "boat",
    "rocket",
    "balloon",
    "train",
    "house",
    "castle",
    "umbrella",
    "teapot",
)
COLORS: tuple[str, ...] = (
    "red",
    "orange",
    "yellow",
    "green",
    "blue",
    "purple",
    "pink",
    "brown",
    "white",
    "black",
)
BACKGROUNDS: tuple[str, ...] = ("sky", "night", "meadow", "beach", "sea", "snow", "room", "desert")
POSITIONS: tuple[str, ...] = ("left", "center", "right")
SIZES: tuple[str, ...] = ("small", "medium", "big")

#: One combination in this many is never drawn for pretraining.
HELD_OUT_ONE_IN = 10
#: Share of one-thing scenes when the number of things is left open.
ONE_THING_SHARE = 0.85
#: Seeds of random scenes lie in 0 .. SEED_LIMIT - 1.
SEED_LIMIT = 2**31


def _require(kind: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"unknown {kind} {value!r}; known: {', '.join(known)}")


@dataclass(frozen=True)
class Thing:
    """One drawn thing; every field is a word of the tuples above, anything else raises ValueError."""

    subject: str
    color: str
    position: str = "center"
    size: str = "medium"

    def __post_init__(self) -> None:
        _require("subject", self.subject, SUBJECTS)
        _require("color", self.color, COLORS)
        _require("position", self.position, POSITIONS)
        _require("size", self.size, SIZES)


@dataclass(frozen=True)
class Scene:
    """One or two things on a background; `seed` (>= 0) fixes every accident of the drawing.

    Raises ValueError for an unknown background, a negative seed or a wrong number of things.
    """

    things: tuple[Thing, ...]
    background: str
    seed: int = 0

    def __post_init__(self) -> None:
        _require("background", self.background, BACKGROUNDS)
        if not 1 <= len(self.things) <= 2:
            raise ValueError(f"a scene holds one or two things, not {len(self.things)}")
        if self.seed < 0:
            raise ValueError(f"a scene's seed must not be negative, got {self.seed}")


def held_out(subject: str, color: str, background: str) -> bool:
    """Whether this combination is kept from pretraining (about one in ten, the same in every process)."""
    digest = hashlib.sha256(f"{subject}|{color}|{background}".encode()).digest()
    return int.from_bytes(digest[:8], "big") % HELD_OUT_ONE_IN == 0


def _random_words(rng: random.Random, wanted: bool | None, background: str) -> tuple[str, str]:
    while True:
        subject, color = rng.choice(SUBJECTS), rng.choice(COLORS)
        if wanted is None or held_out(subject, color, background) == wanted:
            return subject, color


def random_scene(rng: random.Random, *, things: int | None = None, held_out: bool | None = False) -> Scene:
    """A random scene.

    things: 1 or 2; None draws one thing most of the time. Two things are two different subjects, one on the
    left and one on the right, and neither is big.
    held_out: False gives only combinations that are not held out, True only held-out ones (one thing only),
    None any. Raises ValueError for two held-out things or another number of things.
    """
    if things not in (None, 1, 2):
        raise ValueError(f"a random scene holds one or two things, not {things}")
    if held_out and things == 2:
        raise ValueError("held-out scenes hold one thing, so things=2 cannot be asked with held_out=True")
    # The draw is made in every case, so that the same rng state leads to the same later words.
    many = rng.random() >= ONE_THING_SHARE
    count = things or (2 if many and not held_out else 1)
    background = rng.choice(BACKGROUNDS)
    if count == 1:
        subject, color = _random_words(rng, held_out, background)
        only = Thing(subject, color, rng.choice(POSITIONS), rng.choice(SIZES))
        return Scene((only,), background, rng.randrange(SEED_LIMIT))
    first_subject, first_color = _random_words(rng, held_out, background)
    second_subject, second_color = first_subject, first_color
    while second_subject == first_subject:
        second_subject, second_color = _random_words(rng, held_out, background)
    pair = (
        Thing(first_subject, first_color, "left", rng.choice(SIZES[:2])),
        Thing(second_subject, second_color, "right", rng.choice(SIZES[:2])),
    )
    return Scene(pair, background, rng.randrange(SEED_LIMIT))
