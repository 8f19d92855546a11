"""Invented individuals: creatures and things with a shape, colours and markings of their own.

They stand in for "my cat" and "my teapot": the base model has never seen them and does not know their names.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from PIL import Image

from scumble.errors import UnknownName
from scumble.picturebook.backdrops import backdrop
from scumble.picturebook.canvas import SIZE_SHARES, Placed, Plan, paint, palette, place
from scumble.picturebook.captions import (
    BACKGROUND_PHRASES,
    POSITION_PHRASES,
    SIZE_WORDS,
    joined,
    with_article,
)
from scumble.picturebook.geometry import RGB, Part, blob, box, curve, ellipse, polygon
from scumble.picturebook.scenes import BACKGROUNDS, POSITIONS, SIZES
from scumble.picturebook.shapes import eye, normalized, wheel

Builder = Callable[[random.Random], list[Part]]


@dataclass(frozen=True)
class Creature:
    """One individual.

    name: an invented word; noun: what kind of thing it is, in English; description: what it looks like;
    build: its parts, looking to the right, in a slightly different pose for every rng; body, second, third:
    its colours; lift: how far it hangs above the ground.
    """

    name: str
    noun: str
    description: str
    build: Builder
    body: RGB
    second: RGB
    third: RGB
    lift: float = 0.0


# The points of a curve belong on few lines: one point a line would hide the shapes from the reader.
# fmt: off


def _zorbik(rng: random.Random) -> list[Part]:
    sway, step = rng.uniform(-0.05, 0.05), rng.uniform(-0.03, 0.03)
    spots = [
        Part(ellipse(x, y, radius), "third", rim=False)
        for x, y, radius in ((0.24, 0.44, 0.055), (0.2, 0.6, 0.045), (0.32, 0.72, 0.055), (0.74, 0.7, 0.05),
            (0.5, 0.8, 0.04))
    ]
    return [
        Part(curve((0.36, 0.3), (0.3 + sway, 0.14), (0.22 + sway, 0.1)), "body", 0.045),
        Part(curve((0.62, 0.3), (0.68 + sway, 0.14), (0.78 + sway, 0.1)), "body", 0.045),
        Part(ellipse(0.21 + sway, 0.09, 0.065), "second"),
        Part(ellipse(0.79 + sway, 0.09, 0.065), "second"),
        Part(curve((0.3 + step, 0.84), (0.26 + step, 0.97), (0.34 + step, 0.98)), "second", 0.085),
        Part(curve((0.5, 0.86), (0.5, 0.97), (0.58, 0.98)), "second", 0.085),
        Part(curve((0.7 - step, 0.84), (0.74 - step, 0.97), (0.8 - step, 0.98)), "second", 0.085),
        Part(ellipse(0.5, 0.56, 0.38, 0.34), "body"),
        *spots,
        Part(blob((0.46, 0.68), (0.6, 0.72), (0.74, 0.62), (0.72, 0.74), (0.6, 0.8), (0.5, 0.77)), "ink",
            rim=False),
        Part(polygon((0.54, 0.705), (0.61, 0.72), (0.58, 0.765)), "white", rim=False),
        *eye(0.58, 0.47, 0.15),
    ]


def _plimmo(rng: random.Random) -> list[Part]:
    nod, step = rng.uniform(-0.04, 0.04), rng.uniform(-0.03, 0.03)
    crest = [
        Part(polygon((0.52 + 0.025 * i, 0.56 - 0.11 * i), (0.38 + 0.03 * i, 0.44 - 0.11 * i),
            (0.57 + 0.02 * i, 0.42 - 0.11 * i)), "second")
        for i in range(4)
    ]
    return [
        Part(curve((0.12, 0.6), (0.0, 0.52), (-0.02, 0.38)), "body", 0.06),
        Part(ellipse(-0.02, 0.36, 0.06), "second"),
        Part(box(0.26 - step, 0.7, 0.34 - step, 1.0, 0.03), "shade"),
        Part(box(0.56 + step, 0.7, 0.64 + step, 1.0, 0.03), "shade"),
        *crest,
        Part(blob((0.5, 0.6), (0.55, 0.36), (0.58, 0.14 + nod), (0.7, 0.1 + nod), (0.72, 0.3), (0.73, 0.62),
            (0.62, 0.72)), "body"),
        Part(blob((0.06, 0.64), (0.16, 0.52), (0.4, 0.52), (0.66, 0.54), (0.75, 0.68), (0.64, 0.8),
            (0.36, 0.82), (0.14, 0.78)), "body"),
        Part(box(0.14 + step, 0.7, 0.23 + step, 1.0, 0.035), "body"),
        Part(box(0.64 - step, 0.7, 0.73 - step, 1.0, 0.035), "body"),
        *[Part(curve((x, 0.54), (x - 0.02, 0.66), (x, 0.79)), "third", 0.045, rim=False) for x in (0.2,
            0.33, 0.46)],
        *[Part(curve((0.57, y), (0.71, y + 0.02)), "third", 0.04, rim=False) for y in (0.34, 0.47)],
        Part(curve((0.63, 0.08 + nod), (0.62, -0.04 + nod)), "second", 0.04),
        Part(blob((0.56, 0.16 + nod), (0.64, 0.04 + nod), (0.8, 0.06 + nod), (0.98, 0.14 + nod),
            (0.97, 0.24 + nod), (0.8, 0.27 + nod), (0.62, 0.26 + nod)), "body", edge=True),
        Part(ellipse(0.93, 0.17 + nod, 0.018), "ink", rim=False),
        *eye(0.73, 0.14 + nod, 0.055),
    ]


def _vumbra(rng: random.Random) -> list[Part]:
    wave = rng.uniform(-0.06, 0.06)
    arms = [
        Part(curve((x, 0.55), (x + lean + wave, 0.74), (x - lean / 2 - wave, 0.88), (x + lean, 0.98)),
            "third", 0.075)
        for x, lean in ((0.2, -0.05), (0.4, -0.02), (0.6, 0.02), (0.8, 0.05))
    ]
    return [
        *arms,
        Part(blob((0.06, 0.58), (0.06, 0.34), (0.2, 0.12), (0.5, 0.0), (0.8, 0.12), (0.94, 0.34),
            (0.94, 0.58), (0.72, 0.64), (0.5, 0.66), (0.28, 0.64)), "body"),
        Part(
            polygon((0.06, 0.42), (0.2, 0.54), (0.34, 0.42), (0.5, 0.55), (0.66, 0.42), (0.8, 0.54),
                (0.94, 0.42), (0.95, 0.54), (0.8, 0.63), (0.5, 0.655), (0.2, 0.63), (0.05, 0.54)),
            "second",
            rim=False,
        ),
        Part(ellipse(0.3, 0.16, 0.09, 0.04, -35), "light", rim=False),
        Part(polygon((0.5, -0.02), (0.42, -0.16), (0.5, -0.1), (0.58, -0.16)), "second"),
        *eye(0.36, 0.31, 0.075),
        *eye(0.62, 0.31, 0.075),
    ]


def _tobbun(rng: random.Random) -> list[Part]:
    arm, tip = rng.uniform(-0.12, 0.12), rng.uniform(-0.03, 0.03)
    return [
        Part(blob((0.16, 0.24), (0.06, 0.12), (0.1, 0.0 + tip), (0.2, 0.1), (0.34, 0.2)), "second"),
        Part(blob((0.84, 0.24), (0.94, 0.12), (0.9, 0.0 - tip), (0.8, 0.1), (0.66, 0.2)), "second"),
        Part(box(0.22, 0.86, 0.4, 1.0, 0.05), "shade"),
        Part(box(0.6, 0.86, 0.78, 1.0, 0.05), "shade"),
        Part(curve((0.14, 0.56), (0.0, 0.6 + arm), (-0.05, 0.7 + arm)), "body", 0.08),
        Part(curve((0.86, 0.56), (1.0, 0.6 - arm), (1.05, 0.7 - arm)), "body", 0.08),
        Part(box(0.1, 0.18, 0.9, 0.92, 0.1), "body"),
        Part(box(0.1, 0.68, 0.9, 0.8), "third", rim=False),
        Part(box(0.1, 0.84, 0.9, 0.88), "third", rim=False),
        Part(box(0.26, 0.5, 0.78, 0.62, 0.05), "ink", rim=False),
        Part(box(0.34, 0.5, 0.43, 0.58), "white", rim=False),
        Part(box(0.6, 0.5, 0.69, 0.58), "white", rim=False),
        *eye(0.36, 0.35, 0.07),
        *eye(0.66, 0.35, 0.07),
        Part(curve((0.26, 0.24), (0.44, 0.27)), "ink", 0.03, rim=False),
        Part(curve((0.58, 0.27), (0.76, 0.24)), "ink", 0.03, rim=False),
    ]


def _kettrix(rng: random.Random) -> list[Part]:
    bend = rng.uniform(-0.06, 0.06)
    round_body = blob((0.47, 0.24), (0.68, 0.3), (0.8, 0.48), (0.79, 0.68), (0.68, 0.82), (0.47, 0.85),
        (0.26, 0.82), (0.15, 0.68), (0.14, 0.48), (0.26, 0.3))
    return [
        Part(curve((0.22, 0.38), (0.05, 0.36), (0.0, 0.5), (0.05, 0.66), (0.22, 0.72)), "third", 0.07),
        Part(blob((0.72, 0.72), (0.86, 0.66), (0.92, 0.5), (1.06, 0.34), (0.98, 0.26), (0.82, 0.42),
            (0.74, 0.48)), "third"),
        Part(curve((0.47, 0.22), (0.47 + bend, 0.08)), "metal", 0.035),
        Part(ellipse(0.47 + bend, 0.06, 0.065), "gold"),
        Part(round_body, "body"),
        *[
            Part(blob((x - 0.045, 0.31 + dip), (x + 0.045, 0.31 + dip), (x + 0.05, 0.6),
                (x + 0.045, 0.815 - dip), (x - 0.045, 0.815 - dip), (x - 0.05, 0.6)), "second", rim=False)
            for x, dip in ((0.26, 0.04), (0.47, -0.02), (0.68, 0.04))
        ],
        Part(blob((0.26, 0.3), (0.34, 0.2), (0.47, 0.17), (0.6, 0.2), (0.68, 0.3), (0.47, 0.33)), "third",
            edge=True),
        Part(box(0.27, 0.4, 0.69, 0.62, 0.05), "ink", rim=False),
        Part(ellipse(0.38, 0.5, 0.05, 0.06), "glass", rim=False),
        Part(ellipse(0.58, 0.5, 0.05, 0.06), "glass", rim=False),
        Part(ellipse(0.395, 0.5, 0.02), "ink", rim=False),
        Part(ellipse(0.595, 0.5, 0.02), "ink", rim=False),
        *wheel(0.28, 0.9, 0.1),
        *wheel(0.66, 0.9, 0.1),
    ]


def _quibbo(rng: random.Random) -> list[Part]:
    knee, tilt = rng.uniform(-0.05, 0.05), rng.uniform(-0.03, 0.03)
    dots = [
        Part(ellipse(x + tilt, y, 0.042), "second", rim=False)
        for x, y in ((0.36, 0.3), (0.52, 0.17), (0.66, 0.32), (0.24, 0.43), (0.5, 0.42), (0.76, 0.44))
    ]
    return [
        Part(curve((0.42, 0.66), (0.16, 0.7 + knee), (0.26, 0.9), (0.08, 0.97)), "third", 0.075),
        Part(curve((0.58, 0.66), (0.84, 0.7 - knee), (0.74, 0.9), (0.92, 0.97)), "third", 0.075),
        Part(blob((0.02, 0.98), (0.08, 0.92), (0.2, 0.95), (0.24, 1.0), (0.1, 1.01)), "third"),
        Part(blob((0.98, 0.98), (0.92, 0.92), (0.8, 0.95), (0.76, 1.0), (0.9, 1.01)), "third"),
        Part(box(0.36, 0.48, 0.64, 0.76, 0.08), "third", edge=True),
        Part(curve((0.42, 0.7), (0.5, 0.73), (0.58, 0.7)), "ink", 0.02, rim=False),
        Part(curve((0.5 + tilt, 0.02), (0.5 + tilt, -0.06)), "second", 0.05),
        Part(polygon((0.34 + tilt, 0.0), (0.66 + tilt, 0.0), (0.93 + tilt, 0.5), (0.07 + tilt, 0.5)), "body"),
        Part(box(0.08 + tilt, 0.48, 0.92 + tilt, 0.54, 0.02), "second", edge=True),
        *dots,
        *eye(0.43, 0.61, 0.05),
        *eye(0.58, 0.61, 0.05),
    ]


# fmt: on


CREATURES: dict[str, Creature] = {
    creature.name: creature
    for creature in (
        Creature(
            "zorbik",
            "creature",
            "a round teal one-eyed creature with yellow spots, three orange legs and two orange feelers",
            _zorbik,
            (38, 168, 170),
            (246, 128, 48),
            (250, 226, 84),
        ),
        Creature(
            "plimmo",
            "creature",
            "a lilac long-necked creature with white stripes and a scarlet crest",
            _plimmo,
            (176, 140, 222),
            (226, 58, 56),
            (252, 248, 255),
        ),
        Creature(
            "vumbra",
            "creature",
            "a floating pink dome with a navy zigzag hem, a small crown and four mint arms",
            _vumbra,
            (244, 128, 170),
            (42, 52, 122),
            (130, 222, 180),
            0.12,
        ),
        Creature(
            "tobbun",
            "creature",
            "a square moss-green creature with blue belts, two teeth and curved cream horns",
            _tobbun,
            (122, 168, 62),
            (250, 232, 190),
            (50, 110, 196),
        ),
        Creature(
            "kettrix",
            "robot",
            "a teapot-shaped robot in white with crimson stripes, navy handle and spout, on two wheels",
            _kettrix,
            (246, 242, 236),
            (206, 40, 66),
            (46, 70, 140),
        ),
        Creature(
            "quibbo",
            "lamp",
            "a lamp with a yellow shade, magenta dots and green frog legs",
            _quibbo,
            (254, 216, 76),
            (204, 46, 140),
            (84, 176, 88),
        ),
    )
}


def find_creature(name: str) -> Creature:
    """The individual of this name; raises UnknownName, which lists the known ones."""
    if name not in CREATURES:
        raise UnknownName("creature", name, tuple(CREATURES))
    return CREATURES[name]


def creature_caption(name: str, background: str, position: str = "center", size_word: str = "medium") -> str:
    """ "a small zorbik creature on the left, in a snowy field" (the canonical words of scenes)."""
    creature = find_creature(name)
    words = f"{name} {creature.noun}"
    if SIZE_WORDS[size_word]:
        words = f"{SIZE_WORDS[size_word][0]} {words}"
    place_words = "" if position == "center" else POSITION_PHRASES[position][0]
    return joined(with_article(words), place_words, BACKGROUND_PHRASES[background][0])


def draw_creature(
    name: str,
    background: str,
    position: str = "center",
    size_word: str = "medium",
    seed: int = 0,
    size: int = 64,
) -> Image.Image:
    """The individual on a background (RGB, size x size), in the manner of plain pictures.

    The seed (>= 0) varies its pose, the way it looks, its exact place and the background's details; its
    colours never change. Raises UnknownName for an unknown name and ValueError for other unknown words or a
    negative seed.
    """
    return draw_individual(find_creature(name), background, position, size_word, seed, size)


def draw_individual(
    creature: Creature,
    background: str,
    position: str = "center",
    size_word: str = "medium",
    seed: int = 0,
    size: int = 64,
) -> Image.Image:
    """`draw_creature` of any individual, also one that bears no name here (a shape in other colours)."""
    for kind, value, known in (
        ("background", background, BACKGROUNDS),
        ("position", position, POSITIONS),
        ("size", size_word, SIZES),
    ):
        if value not in known:
            raise ValueError(f"unknown {kind} {value!r}; known: {', '.join(known)}")
    if seed < 0:
        raise ValueError(f"a creature's seed must not be negative, got {seed}")
    rng = random.Random(seed * 8 + 3)
    parts = normalized(creature.build(rng))
    placed_parts, ground = place(parts, creature.lift, position, SIZE_SHARES[size_word], rng)
    roles = {**palette(creature.body), "second": creature.second, "third": creature.third}
    scenery = backdrop(background, random.Random(seed * 8))
    return paint(Plan(scenery, (Placed(None, placed_parts, roles, ground),), seed), size)
