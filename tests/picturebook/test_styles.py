"""Styles: unlike plain and unlike each other, while subject, colour and place stay readable."""

from __future__ import annotations

import colorsys
import random

import numpy as np
import pytest
from numpy.typing import NDArray

from scumble.picturebook.canvas import body_mask, plan
from scumble.picturebook.draw import draw
from scumble.picturebook.scenes import COLORS, Scene, Thing, random_scene
from scumble.picturebook.styles import STYLES

NAMES = tuple(STYLES)


def _pixels(scene: Scene, style: str, size: int = 64) -> NDArray[np.float64]:
    return np.asarray(draw(scene, size, style), dtype=np.float64)


def test_there_are_at_least_four() -> None:
    assert {"blueprint", "woodcut", "mosaic", "neon"} <= set(NAMES)


@pytest.mark.parametrize("style", NAMES)
def test_a_style_is_deterministic_and_keeps_the_size(style: str) -> None:
    scene = random_scene(random.Random(0), things=2)
    image = draw(scene, 64, style)
    assert image.size == (64, 64)
    assert image.mode == "RGB"
    assert image.tobytes() == draw(scene, 64, style).tobytes()


def test_styles_differ_from_plain_and_from_each_other() -> None:
    rng = random.Random(1)
    for _ in range(6):
        scene = random_scene(rng)
        pictures = [_pixels(scene, style) for style in ("plain", *NAMES)]
        for index, first in enumerate(pictures):
            for second in pictures[:index]:
                assert np.abs(first - second).mean() > 15


def test_each_style_looks_like_its_name() -> None:
    rng = random.Random(2)
    for _ in range(6):
        scene = random_scene(rng, things=1)
        corner = slice(0, 12)
        paper = _pixels(scene, "blueprint")[corner].mean(axis=(0, 1))
        assert paper[2] > paper[0] + 50
        woodcut = _pixels(scene, "woodcut")[corner]
        assert (woodcut.max(axis=2) - woodcut.min(axis=2)).mean() < 60
        assert _pixels(scene, "neon")[corner].mean() < 70


@pytest.mark.parametrize("style", NAMES)
def test_the_thing_keeps_its_place(style: str) -> None:
    # Two scenes that differ only in the thing's colour differ only where the thing is.
    first = Scene((Thing("teapot", "red", "left", "small"),), "beach", 5)
    second = Scene((Thing("teapot", "green", "left", "small"),), "beach", 5)
    change = np.abs(_pixels(first, style) - _pixels(second, style)).sum(axis=2)
    columns = change.sum(axis=0)
    assert (columns * np.arange(64)).sum() / columns.sum() < 26
    assert change[:, 40:].mean() < 6


@pytest.mark.parametrize("style", NAMES)
def test_colors_stay_readable(style: str) -> None:
    means: dict[str, NDArray[np.float64]] = {}
    for color in COLORS:
        scene = Scene((Thing("mushroom", color, "center", "big"),), "meadow", 4)
        body = np.asarray(body_mask(plan(scene).placed[0], 64)) > 250
        means[color] = _pixels(scene, style)[body].mean(axis=0)
    for index, first in enumerate(COLORS):
        for second in COLORS[:index]:
            assert np.abs(means[first] - means[second]).sum() > 40, (style, first, second)
    for color, low, high in (
        ("red", -0.06, 0.06),
        ("yellow", 0.1, 0.2),
        ("green", 0.25, 0.5),
        ("blue", 0.53, 0.7),
    ):
        hue = colorsys.rgb_to_hsv(*(means[color] / 255))[0]
        assert low <= (hue - 1 if hue > 0.9 else hue) <= high, (style, color, hue)
    assert means["white"].mean() > 150 > means["black"].mean()


@pytest.mark.parametrize("style", NAMES)
def test_styles_do_not_depend_on_the_size(style: str) -> None:
    scene = Scene((Thing("house", "yellow", "right", "big"),), "snow", 8)
    small = np.asarray(draw(scene, 64, style), dtype=np.float64)
    large = np.asarray(draw(scene, 128, style).reduce(2), dtype=np.float64)
    assert np.abs(small - large).mean() < 14
