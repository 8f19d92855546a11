"""The oracle reads fresh drawings, plain and styled, and still reads what an autoencoder does to them."""

from __future__ import annotations

import pytest
from PIL import ImageFilter

from scumble.picturebook import oracle, scenes
from scumble.picturebook.draw import draw
from scumble.picturebook.styles import STYLES
from scumble.rng import Streams


def fresh(count: int, seed: int = 2**41) -> list[scenes.Scene]:
    return [
        scenes.random_scene(Streams(seed).python("test", n), things=1, held_out=None) for n in range(count)
    ]


def test_fresh_plain_drawings_are_read_right() -> None:
    for question, share in oracle.accuracy(500).items():
        assert share >= 0.99, question


@pytest.mark.parametrize("style", STYLES)
def test_styled_drawings_are_read_right(style: str) -> None:
    right = oracle.accuracy(120, style=style)
    for question in ("style", "subject", "color"):
        assert right[question] >= 0.98, question


def test_a_picture_of_another_size_is_read_too() -> None:
    asked = fresh(40)
    large = oracle.read([draw(scene, 256) for scene in asked])
    assert sum(r.agrees(s, "subject", "color", "background") for r, s in zip(large, asked, strict=True)) >= 39


def test_a_slightly_blurred_picture_is_read_too() -> None:
    asked = fresh(100)
    blurred = [draw(scene).filter(ImageFilter.GaussianBlur(0.8)) for scene in asked]
    judged = oracle.judge(blurred, asked)
    assert judged.pictures == 100 and judged.subject_and_color >= 0.95 and judged.style >= 0.95


def test_a_wrong_answer_is_counted_as_wrong() -> None:
    """The judge can fail: pictures judged against other scenes mostly disagree."""
    asked = fresh(60)
    judged = oracle.judge([draw(scene) for scene in asked], asked[1:] + asked[:1], "neon")
    assert judged.style == 0 and judged.subject < 0.3 and judged.color < 0.4


def test_agreement_is_about_the_named_words_only() -> None:
    scene = scenes.Scene((scenes.Thing("fox", "red", "left", "small"),), "snow")
    reading = oracle.Reading("fox", "red", "beach", "left", "big", "plain", {})
    assert reading.agrees(scene, "subject", "color", "position")
    assert not reading.agrees(scene, "background") and not reading.agrees(scene, "subject", "size")
