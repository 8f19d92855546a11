"""Prompts: the same for the same seed, new scenes for the subject, and what can be checked goes with them."""

from __future__ import annotations

from scumble.evaluation.asks import SCENES, THINGS, class_ask, subject_asks, unrelated_asks
from scumble.evaluation.concept import Concept

ZORBIK, NEON = Concept("zorbik creature", class_phrase="creature"), Concept("in neon style")


def test_a_creature_is_put_into_places_sizes_and_backgrounds() -> None:
    asks = subject_asks(ZORBIK, 40, embedded=True)
    assert len({ask.prompt for ask in asks}) == 40
    for ask in asks:
        assert "zorbik creature" in ask.prompt and set(ask.said) == {"background", "position", "size"}
        assert ("on the left" in ask.prompt) == (ask.said["position"] == "left")
        assert ("small" in ask.prompt) == (ask.said["size"] == "small")
    assert {ask.said["background"] for ask in asks} >= {"snow", "room", "sea"}
    assert asks[0].prompt.startswith(("a ", "an "))


def test_the_seed_decides() -> None:
    assert subject_asks(ZORBIK, 5, embedded=True) == subject_asks(ZORBIK, 5, embedded=True)
    assert subject_asks(ZORBIK, 5, embedded=True) != subject_asks(ZORBIK, 5, embedded=True, seed=1)
    assert unrelated_asks(5, embedded=True) == unrelated_asks(5, embedded=True)


def test_scenes_of_training_can_be_left_out() -> None:
    first = subject_asks(ZORBIK, 3, embedded=True)[0].prompt
    assert first not in {ask.prompt for ask in subject_asks(ZORBIK, 3, embedded=True, known={first})}


def test_a_style_is_asked_of_known_things() -> None:
    for ask in subject_asks(NEON, 8, embedded=True):
        assert ask.prompt.endswith(", in neon style") and ask.said["subject"] in ask.prompt
    assert all(ask.prompt.endswith(", in neon style") for ask in subject_asks(NEON, 8, embedded=False))


def test_a_real_base_has_its_own_prompts() -> None:
    asks = subject_asks(Concept("sks dog"), len(SCENES) + 1, embedded=False)
    assert asks[0].prompt == "a sks dog in deep snow" and asks[-1] == asks[0]
    assert all("sks dog" in ask.prompt and "{" not in ask.prompt for ask in asks)
    assert len(set(THINGS)) == 50 and [a.prompt for a in unrelated_asks(50, embedded=False)] == list(THINGS)


def test_unrelated_prompts_of_the_embedded_base_say_what_can_be_checked() -> None:
    for ask in unrelated_asks(6, embedded=True):
        assert set(ask.said) == {"subject", "color", "background", "position", "size"}
        assert ask.said["subject"] in ask.prompt and ask.said["color"] in ask.prompt


def test_the_bare_class() -> None:
    found = class_ask(ZORBIK)
    assert found is not None and found.prompt == "a creature"
    assert class_ask(NEON) is None
