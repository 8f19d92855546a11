"""What the captions call it, and its class."""

from __future__ import annotations

import pytest
from PIL import Image

from scumble.errors import ConfigError
from scumble.evaluation.concept import Concept, class_of, find_phrase, square, without
from scumble.picturebook.creatures import creature_caption
from scumble.picturebook.scenes import BACKGROUNDS, POSITIONS, SIZES


@pytest.mark.parametrize(
    ("captions", "phrase"),
    [
        (["a photo of sks dog"], "sks dog"),
        (["a photo of a sks dog", "a painting of a sks dog"], "sks dog"),
        (["a sks dog on the beach", "the sks dog, at night", "a big sks dog"], "sks dog"),
        (["a red fox, in blueprint style", "a blue car in a room, in blueprint style"], "in blueprint style"),
        (["<cat-toy>"], "<cat-toy>"),
        (["", "a sks dog"], "sks dog"),
    ],
)
def test_the_phrase_is_what_all_captions_share(captions: list[str], phrase: str) -> None:
    assert find_phrase(captions) == phrase


def test_a_creatures_captions_give_its_name() -> None:
    words = [(BACKGROUNDS[n], POSITIONS[n % 3], SIZES[n % 3]) for n in range(5)]
    assert find_phrase([creature_caption("plimmo", *said) for said in words]) == "plimmo creature"


@pytest.mark.parametrize("captions", [["red", "blue"], [""], []])
def test_captions_that_share_nothing_ask_for_the_subject(captions: list[str]) -> None:
    with pytest.raises(ConfigError, match="--subject"):
        find_phrase(captions)


def test_a_learned_word_is_what_it_is_called() -> None:
    assert find_phrase(["a picture of a fox", "a fox at night"], ["<my-fox>"]) == "<my-fox>"
    assert find_phrase(["a zorbik creature", "the zorbik creature at night"], ["zorbik"]) == "zorbik creature"


def test_words_of_another_file_are_left_out_of_captions() -> None:
    assert find_phrase([without("a photo of <zz> <yy>, dog", ["<yy>"])]) == "<zz> dog"
    assert without("<a>b a", ["<a>", "b"]) == "<a>b a", "whole words alone"


def test_the_class_is_the_last_word() -> None:
    assert [class_of(p) for p in ("sks dog", "zorbik creature", "<toy>", "in neon style")] == [
        "dog", "creature", "", "",
    ]  # fmt: skip


def test_styles_are_told_from_things() -> None:
    assert Concept("in neon style").is_style and Concept("woodcut style").is_style
    assert not Concept("sks dog").is_style and not Concept("stylish dog").is_style


def test_pictures_are_judged_square() -> None:
    picture = Image.new("RGB", (30, 10), "red")
    picture.paste("blue", (10, 0, 20, 10))
    assert square(picture).size == (10, 10) and square(picture).getpixel((0, 0)) == (0, 0, 255)
