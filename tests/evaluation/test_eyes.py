"""The picturebook's judges know what they are shown, and say no to what they are not."""

from __future__ import annotations

from scumble.evaluation.asks import Ask, said_by
from scumble.evaluation.concept import Concept
from scumble.evaluation.eyes import PicturebookEye, individual, style_of
from scumble.picturebook.creatures import draw_creature
from scumble.picturebook.draw import draw
from scumble.picturebook.scenes import BACKGROUNDS, random_scene
from scumble.rng import Streams

TOBBUN = Concept("x thing", tuple(draw_creature("tobbun", BACKGROUNDS[n], seed=n) for n in range(5)))
SCENES = [random_scene(Streams(5).python("eyes", n), things=1) for n in range(6)]
NEON = Concept("in y style", tuple(draw(scene, 64, "neon") for scene in SCENES))
PLAIN = Concept("z", tuple(draw(scene) for scene in SCENES))


def test_training_pictures_say_what_is_taught() -> None:
    assert (individual(TOBBUN), style_of(NEON)) == ("tobbun", "neon")
    assert (individual(PLAIN), style_of(PLAIN), individual(Concept("w"))) == ("", "", "")


def test_an_individual_is_learned_when_it_is_drawn() -> None:
    pictures = [
        draw_creature("tobbun", "sea", "left", seed=99),
        draw_creature("vumbra", "sea", "left", seed=99),
        PLAIN.pictures[0],
    ]
    (values,) = PicturebookEye().learned(pictures, TOBBUN).values()
    assert values[0] > 0.9 and values[1] < 0.1 and values[2] < 0.1


def test_a_style_is_learned_when_it_is_drawn() -> None:
    pictures = [draw(SCENES[0], 64, "neon"), draw(SCENES[0], 64, "woodcut"), draw(SCENES[0])]
    (values,) = PicturebookEye().learned(pictures, NEON).values()
    assert values.tolist() == [1, 0, 0]


def test_anything_else_is_compared_by_features() -> None:
    values = PicturebookEye().learned([PLAIN.pictures[0], PLAIN.pictures[1]], PLAIN)["likeness"]
    assert ((values >= 0) & (values <= 1.0001)).all()


def test_what_was_asked_is_read() -> None:
    eye = PicturebookEye()
    asks = [Ask("", {"background": "snow", "position": "left", "size": "big"})] * 2
    drawn = [
        draw_creature("zorbik", "snow", "left", "big", 7),
        draw_creature("zorbik", "room", "right", "small", 7),
    ]
    found = eye.obeys(drawn, asks)
    assert {question: values.tolist() for question, values in found.items()} == {
        "background": [1, 0],
        "position": [1, 0],
        "size": [1, 0],
    }
    known = eye.obeys([draw(scene) for scene in SCENES], [Ask("", said_by(scene)) for scene in SCENES])
    assert len(known) == 5 and all(values.mean() > 0.8 for values in known.values())
