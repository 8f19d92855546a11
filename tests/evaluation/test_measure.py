"""Measures: what was learned, obeyed, broken and copied shows in them, and only that."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pytest
from PIL import Image

from scumble.evaluation.asks import Ask
from scumble.evaluation.concept import Concept
from scumble.evaluation.eyes import Values
from scumble.evaluation.measure import (
    CLASS,
    SUBJECT,
    UNRELATED,
    Group,
    Scores,
    copy_limit,
    distance,
    measure,
    nearest_training,
)


class RedEye:
    """Knows red from other colours: a judge whose answers can be told beforehand."""

    name = "red"
    shares = True

    def learned(self, pictures: Sequence[Image.Image], concept: Concept) -> Mapping[str, Values]:
        return {"red": np.array([float(p.getpixel((0, 0))[0] > 128) for p in pictures])}  # type: ignore[index]

    def obeys(self, pictures: Sequence[Image.Image], asks: Sequence[Ask]) -> Mapping[str, Values]:
        right = [
            float((p.getpixel((0, 0))[2] > 128) == (ask.said["blue"] == "yes"))  # type: ignore[index]
            for p, ask in zip(pictures, asks, strict=True)
        ]
        return {"blue": np.array(right)}

    def likeness(self, pictures: Sequence[Image.Image], others: Sequence[Image.Image]) -> Values | None:
        return None


def plain(color: str) -> Image.Image:
    return Image.new("RGB", (16, 16), color)


def group(colors: Sequence[str], seeds: int = 1, blue: str = "no") -> Group:
    asks = [Ask(f"prompt {n}", {"blue": blue}) for n in range(len(colors) // seeds)]
    return Group(asks, list(range(seeds)), [plain(color) for color in colors])


def judged(
    adapter: dict[str, Group], base: dict[str, Group], training: Sequence[str] = ("red", "black")
) -> Scores:
    concept = Concept("red thing", tuple(plain(c) for c in training), tuple(training), "thing")
    return measure(base, adapter, concept, RedEye(), resamples=100)


def test_what_is_learned_obeyed_and_kept() -> None:
    scores = judged(
        {SUBJECT: group(["red", "red", "red", "green"], 2), UNRELATED: group(["blue", "red"], blue="yes")},
        {SUBJECT: group(["green"] * 4, 2), UNRELATED: group(["blue", "blue"], blue="yes")},
    )
    assert (scores.learned, scores.obeys, scores.kept) == (0.75, 1.0, 0.5)
    assert scores.overall == pytest.approx(3 / (1 / 0.75 + 1 + 2))
    (learned,) = scores.of("learned")
    assert learned.base is not None and learned.base.value == 0 and learned.adapter.high <= 1
    drift = next(m for m in scores.of("broke") if m.name == "drift")
    assert drift.adapter.value == pytest.approx(np.sqrt(255**2 * 2 / 3) / 2)
    assert scores.drift[0] == 0 and scores.drift[1] > 200


def test_what_fails_in_one_way_is_no_good() -> None:
    same = {SUBJECT: group(["green", "green"]), UNRELATED: group(["blue"], blue="yes")}
    assert judged(same, same).overall == 0.0


def test_a_class_that_became_the_subject_shows() -> None:
    subject = group(["red", "red"])
    before = {
        SUBJECT: subject,
        CLASS: Group([Ask("a thing")], [0, 1, 2], [plain(c) for c in ("red", "lime", "blue")]),
    }
    after = {SUBJECT: subject, CLASS: Group([Ask("a thing")], [0, 1, 2], [plain("red")] * 3)}
    found = {m.name: m for m in judged(after, before).of("broke")}
    collapse, diversity = found["class red"], found["diversity of the class"]
    assert (
        collapse.adapter.value == 1
        and collapse.base is not None
        and collapse.base.value == pytest.approx(1 / 3)
    )
    assert diversity.adapter.value == 0 and diversity.base is not None and diversity.base.value > 100


def test_copies_are_found() -> None:
    after = {SUBJECT: group(["red", "#fa0505", "#888800", "blue"])}
    scores = judged(after, {SUBJECT: group(["lime"] * 4)})
    copies = next(m for m in scores.of("copied") if m.name == "copies")
    assert copies.adapter.value == 0.5 and copies.base is not None and copies.base.value == 0
    assert [number for number, _ in scores.nearest][:2] == [0, 0] and scores.nearest[0][1] == 0


def test_a_mirrored_training_picture_is_a_copy() -> None:
    picture = plain("white")
    picture.paste("black", (0, 0, 5, 16))
    mirrored = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    assert distance(picture, mirrored) > 50
    assert nearest_training(mirrored, [plain("green"), picture]) == (1, 0.0)


def test_the_limit_of_a_copy_is_half_of_what_training_pictures_are_apart() -> None:
    assert copy_limit([plain("#000000"), plain("#0a0a0a")]) == pytest.approx(5)
    assert copy_limit([plain("red")]) is None


def test_without_a_judge_pixels_are_compared() -> None:
    groups = {SUBJECT: group(["red", "blue"]), UNRELATED: group(["lime"])}
    scores = measure(groups, groups, Concept("x", (plain("red"),), ("red",)), None, resamples=100)
    assert (scores.learned, scores.obeys, scores.kept, scores.overall) == (None, None, None, None)
    assert {m.section for m in scores.measures} == {"broke", "copied"}


def test_without_training_pictures_there_is_no_overall() -> None:
    groups = {SUBJECT: group(["red", "blue"]), UNRELATED: group(["lime"])}
    scores = measure(groups, groups, Concept("x"), RedEye(), resamples=100)
    assert scores.learned is None and scores.overall is None and not scores.nearest and scores.obeys == 0.5
