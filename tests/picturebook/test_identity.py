"""Individuals are told apart, from look-alikes too, whatever scene they are in."""

from __future__ import annotations

import random

import torch
from PIL import ImageFilter

from scumble.picturebook import identity, scenes
from scumble.picturebook.creatures import CREATURES, draw_creature, draw_individual
from scumble.picturebook.draw import draw
from scumble.rng import Streams


def test_fresh_drawings_are_read_right() -> None:
    right = identity.accuracy(300)
    assert right["name"] >= 0.98 and right["nobody"] >= 0.9
    for question in ("background", "position", "size"):
        assert right[question] >= 0.95, question


def test_ordinary_pictures_show_nobody() -> None:
    drawn = [draw(scenes.random_scene(Streams(2**42).python("test", n), things=1)) for n in range(40)]
    assert sum(seen.name == identity.NOBODY for seen in identity.read(drawn)) >= 39


def test_the_same_shape_in_other_colours_is_somebody_else() -> None:
    rng = random.Random(2**43)
    others = [identity.recoloured(creature, rng) for creature in CREATURES.values() for _ in range(5)]
    seen = identity.read([draw_individual(other, "meadow", seed=2**40 + n) for n, other in enumerate(others)])
    assert sum(one.name == identity.NOBODY for one in seen) >= 28


def test_a_blurred_picture_is_read_too() -> None:
    names = list(CREATURES) * 5
    drawn = [
        draw_creature(name, scenes.BACKGROUNDS[n % 8], seed=2**40 + n).filter(ImageFilter.GaussianBlur(0.7))
        for n, name in enumerate(names)
    ]
    assert sum(seen.name == name for seen, name in zip(identity.read(drawn), names, strict=True)) >= 29


def test_the_same_subject_in_new_scenes_is_nearer_than_any_other_subject() -> None:
    """Five training pictures of each, and fresh ones in other scenes: the nearest subject is always the right one."""
    places = [
        ("sky", "left", "big"),
        ("room", "center", "medium"),
        ("snow", "right", "big"),
        ("sea", "left", "medium"),
    ]

    def mean(name: str) -> torch.Tensor:
        drawn = [draw_creature(name, *place, seed=n) for n, place in enumerate(places)]
        return torch.nn.functional.normalize(identity.features(drawn).mean(0), dim=0)

    known = torch.stack([mean(name) for name in CREATURES])
    for number, name in enumerate(CREATURES):
        new = [
            draw_creature(name, background, "right", "small", seed=2**40)
            for background in ("desert", "night", "beach")
        ]
        likeness = identity.features(new) @ known.T
        assert likeness.argmax(1).tolist() == [number] * 3, name


def test_probabilities_add_up() -> None:
    (seen,) = identity.read([draw_creature("quibbo", "room")])
    assert seen.name == "quibbo" and abs(sum(seen.likeness.values()) - 1) < 1e-5
    assert set(seen.likeness) == {*CREATURES, identity.NOBODY}
