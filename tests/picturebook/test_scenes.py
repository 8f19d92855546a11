"""Scenes: valid words only, stable held-out combinations, random scenes that keep their promises."""

from __future__ import annotations

import itertools
import random
import subprocess
import sys

import pytest

from scumble.picturebook.scenes import (
    BACKGROUNDS,
    COLORS,
    POSITIONS,
    SIZES,
    SUBJECTS,
    Scene,
    Thing,
    held_out,
    random_scene,
)

COMBINATIONS = list(itertools.product(SUBJECTS, COLORS, BACKGROUNDS))


def test_the_vocabulary_is_large_enough_and_without_doubles() -> None:
    assert len(SUBJECTS) >= 16
    assert len(COLORS) == 10
    assert len(BACKGROUNDS) == 8
    for words in (SUBJECTS, COLORS, BACKGROUNDS, POSITIONS, SIZES):
        assert len(set(words)) == len(words)


@pytest.mark.parametrize(
    "wrong",
    [
        {"subject": "dragon"},
        {"color": "teal"},
        {"position": "above"},
        {"size": "enormous"},
    ],
)
def test_a_thing_refuses_an_unknown_word_and_lists_the_known_ones(wrong: dict[str, str]) -> None:
    words = {"subject": "fox", "color": "red", "position": "left", "size": "small"} | wrong
    with pytest.raises(ValueError, match="known: ") as caught:
        Thing(**words)
    assert next(iter(wrong.values())) in str(caught.value)


def test_a_scene_refuses_wrong_backgrounds_seeds_and_numbers_of_things() -> None:
    fox = Thing("fox", "red")
    with pytest.raises(ValueError, match="background 'moon'"):
        Scene((fox,), "moon")
    with pytest.raises(ValueError, match="negative"):
        Scene((fox,), "sky", -1)
    for count in (0, 3):
        with pytest.raises(ValueError, match=f"not {count}"):
            Scene((fox,) * count, "sky")


def test_about_a_tenth_is_held_out_in_every_part_of_the_vocabulary() -> None:
    share = sum(held_out(*words) for words in COMBINATIONS) / len(COMBINATIONS)
    assert 0.08 < share < 0.12
    for subject in SUBJECTS:
        of_subject = [held_out(*words) for words in COMBINATIONS if words[0] == subject]
        assert 0 < sum(of_subject) < len(of_subject) / 4


def test_held_out_is_the_same_in_another_process() -> None:
    code = (
        "import itertools; from scumble.picturebook.scenes import *;"
        "print(''.join(str(int(held_out(*w))) for w in itertools.product(SUBJECTS, COLORS, BACKGROUNDS)))"
    )
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert there.strip() == "".join(str(int(held_out(*words))) for words in COMBINATIONS)


def test_pretraining_scenes_never_hold_a_held_out_combination() -> None:
    rng = random.Random(0)
    for _ in range(4000):
        scene = random_scene(rng)
        assert not any(held_out(thing.subject, thing.color, scene.background) for thing in scene.things)


def test_held_out_scenes_are_all_held_out_and_hold_one_thing() -> None:
    rng = random.Random(1)
    for _ in range(300):
        scene = random_scene(rng, held_out=True)
        (thing,) = scene.things
        assert held_out(thing.subject, thing.color, scene.background)


def test_any_scenes_hold_both_kinds() -> None:
    rng = random.Random(2)
    scenes = [random_scene(rng, things=1, held_out=None) for _ in range(400)]
    kinds = {held_out(scene.things[0].subject, scene.things[0].color, scene.background) for scene in scenes}
    assert kinds == {True, False}


def test_the_number_of_things_follows_the_request() -> None:
    rng = random.Random(3)
    assert all(len(random_scene(rng, things=1).things) == 1 for _ in range(50))
    assert all(len(random_scene(rng, things=2).things) == 2 for _ in range(50))
    pairs = sum(len(random_scene(rng).things) == 2 for _ in range(2000)) / 2000
    assert 0.11 < pairs < 0.19


def test_pairs_are_different_subjects_left_and_right_and_not_big() -> None:
    rng = random.Random(4)
    for _ in range(200):
        first, second = random_scene(rng, things=2).things
        assert first.subject != second.subject
        assert (first.position, second.position) == ("left", "right")
        assert "big" not in (first.size, second.size)


def test_impossible_requests_are_refused() -> None:
    with pytest.raises(ValueError, match="not 3"):
        random_scene(random.Random(0), things=3)
    with pytest.raises(ValueError, match="one thing"):
        random_scene(random.Random(0), things=2, held_out=True)


def test_equal_seeds_give_equal_scenes_and_all_words_are_used() -> None:
    def many(seed: int) -> list[Scene]:
        rng = random.Random(seed)
        return [random_scene(rng) for _ in range(500)]

    scenes = many(5)
    assert scenes == many(5)
    assert scenes != many(6)
    things = [thing for scene in scenes for thing in scene.things]
    assert {thing.subject for thing in things} == set(SUBJECTS)
    assert {thing.color for thing in things} == set(COLORS)
    assert {scene.background for scene in scenes} == set(BACKGROUNDS)
