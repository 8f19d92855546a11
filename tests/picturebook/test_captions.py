"""Captions say what is drawn: always subject and colour, the rest in many words."""

from __future__ import annotations

import random

from scumble.picturebook.captions import BACKGROUND_PHRASES, POSITION_PHRASES, SIZE_WORDS, caption
from scumble.picturebook.scenes import BACKGROUNDS, POSITIONS, SIZES, Scene, Thing, random_scene

FOX = Thing("fox", "red", "left", "small")


def test_the_canonical_form() -> None:
    assert caption(Scene((FOX,), "snow")) == "a small red fox on the left, in a snowy field"
    assert caption(Scene((Thing("umbrella", "orange"),), "beach")) == "an orange umbrella on a sandy beach"
    pair = (FOX, Thing("tree", "blue", "right", "medium"))
    assert (
        caption(Scene(pair, "night"))
        == "a small red fox on the left and a blue tree on the right, at night under the stars"
    )


def test_a_style_is_appended() -> None:
    assert (
        caption(Scene((FOX,), "sea"), style="neon")
        == "a small red fox on the left, on the sea, in neon style"
    )


def test_every_background_has_phrases_of_its_own() -> None:
    assert set(BACKGROUND_PHRASES) == set(BACKGROUNDS)
    assert set(POSITION_PHRASES) == set(POSITIONS)
    assert set(SIZE_WORDS) == set(SIZES)
    phrases = [phrase for words in BACKGROUND_PHRASES.values() for phrase in words]
    assert len(set(phrases)) == len(phrases)
    assert all(len(words) >= 3 for words in BACKGROUND_PHRASES.values())


def test_paraphrases_always_name_subject_color_and_background() -> None:
    rng = random.Random(0)
    for _ in range(800):
        scene = random_scene(rng)
        words = caption(scene, rng)
        for thing in scene.things:
            assert f"{thing.color} {thing.subject}" in words
        assert any(phrase in words for phrase in BACKGROUND_PHRASES[scene.background])
        assert words == words.strip()
        assert "  " not in words
        assert words[0].islower()
        assert ",," not in words


def test_paraphrases_never_say_something_wrong() -> None:
    rng = random.Random(1)
    for _ in range(800):
        scene = random_scene(rng, things=1)
        (thing,) = scene.things
        words = caption(scene, rng)
        for size, synonyms in SIZE_WORDS.items():
            if size != thing.size:
                assert not set(synonyms) & set(words.split())
        for position, phrases in POSITION_PHRASES.items():
            if position != thing.position:
                assert not any(phrase in words for phrase in phrases)


def test_in_pairs_each_thing_keeps_its_own_side() -> None:
    rng = random.Random(2)
    for _ in range(200):
        scene = random_scene(rng, things=2)
        words = caption(scene, rng)
        for thing, other in (scene.things, scene.things[::-1]):
            after = words.split(f"{thing.color} {thing.subject}", 1)[1].split(
                f"{other.color} {other.subject}"
            )[0]
            assert (other.position not in after) or (thing.position in after)


def test_articles_fit() -> None:
    rng = random.Random(3)
    for _ in range(500):
        words = f" {caption(random_scene(rng), rng)}"
        assert " a orange" not in words
        assert " an red" not in words


def test_an_rng_varies_and_repeats() -> None:
    scene = Scene((FOX,), "desert")
    many = [caption(scene, random.Random(seed)) for seed in range(200)]
    assert len(set(many)) > 30
    assert many == [caption(scene, random.Random(seed)) for seed in range(200)]
    said = sum("left" in words for words in many) / len(many)
    assert 0.6 < said < 0.95


def test_a_centered_medium_thing_is_mostly_said_in_few_words() -> None:
    scene = Scene((Thing("cat", "black"),), "room")
    assert caption(scene) == "a black cat in a cozy room"
    said = sum(
        "middle" in words or "center" in words
        for words in (caption(scene, random.Random(s)) for s in range(300))
    )
    assert 10 < said < 90
