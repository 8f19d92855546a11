"""Asks: what is drawn to judge an adapter: the subject in new scenes, the bare class, and unrelated things.

The prompts are a function of the concept and a seed, so that checkpoints, methods and machines are asked the same.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from scumble.evaluation.concept import Concept
from scumble.picturebook import scenes
from scumble.picturebook.captions import (
    BACKGROUND_PHRASES,
    POSITION_PHRASES,
    SIZE_WORDS,
    caption,
    joined,
    with_article,
)
from scumble.rng import Streams

SCENES = (
    "{} in deep snow", "{} on a sandy beach", "{} at night under the stars", "{} in a green meadow",
    "{} in a kitchen", "{} on the moon", "{} in a busy street", "{} under water", "{} in the desert",
    "{} on a wooden table", "{} in front of a castle", "{} in a library", "a tiny {bare} in a wide field",
    "a huge {bare} that fills the picture", "{} on the left side of the picture", "{} on the right side of the picture",
    "{} seen from above", "{} in heavy rain", "{} in autumn leaves", "{} in a shop window", "{} on a mountain top",
    "{} beside a red bicycle", "{} behind a fence", "{} in the fog",
)  # fmt: skip
"""Where a subject of a real base is put."""

THINGS = (
    "a lighthouse on a cliff", "two cups of coffee on a table", "an old steam train", "a bowl of red apples",
    "a city skyline at dusk", "a snowy mountain", "a sailing boat", "a field of sunflowers", "a wooden chair",
    "a hot air balloon", "a stack of books", "a forest path in autumn", "a stone bridge over a river",
    "an astronaut on the moon", "a red sports car", "a bicycle against a wall", "a grand piano", "a desert at noon",
    "a waterfall in the jungle", "a medieval castle", "a plate of spaghetti", "a night sky with stars",
    "an owl on a branch", "a street market", "a windmill", "a glass of water", "a tulip in a vase",
    "a tropical beach", "a library with tall shelves", "a horse in a meadow", "a portrait of an old man",
    "a violin on a sofa", "a rainy street with umbrellas", "a slice of chocolate cake", "a fishing village",
    "a campfire at night", "a polar bear on ice", "a greenhouse full of plants", "a rocket at launch",
    "a pair of leather shoes", "an empty theatre", "a kitchen with copper pans", "a butterfly on a flower",
    "a tractor in a field", "a subway station", "a chess board", "a child with a kite", "a frozen lake",
    "a lemon cut in half", "a clock tower",
)  # fmt: skip
"""What has nothing to do with a real base's subject: 50 prompts."""


@dataclass(frozen=True)
class Ask:
    """One prompt, and what can be checked in its picture."""

    prompt: str
    said: Mapping[str, str] = field(default_factory=dict)
    """Question ("background", "position", "size", "subject", "color") -> the word that was asked for."""


def subject_asks(
    concept: Concept, count: int, *, embedded: bool, seed: int = 0, known: Collection[str] = ()
) -> list[Ask]:
    """`count` prompts that put the concept into scenes, all different as long as there are enough.

    `known`: prompts to leave out, because training has shown those very scenes.
    """
    if not embedded:
        return [_real(concept, number) for number in range(count)]
    asks: list[Ask] = []
    for number in range(100 * count):
        if len(asks) == count:
            break
        rng = Streams(seed).python("evaluation scene", number)
        scene = scenes.random_scene(rng, things=1, held_out=True)
        if concept.is_style:
            phrase = concept.phrase if concept.phrase[0] in "," else f", {concept.phrase}"
            ask = Ask(caption(scene) + phrase, said_by(scene))
        else:
            thing = scene.things[0]
            size = "".join(f"{word} " for word in SIZE_WORDS[thing.size][:1])
            place = "" if thing.position == "center" else POSITION_PHRASES[thing.position][0]
            words = joined(
                with_article(size + concept.phrase), place, BACKGROUND_PHRASES[scene.background][0]
            )
            said = said_by(scene)
            ask = Ask(words, {question: said[question] for question in ("background", "position", "size")})
        if ask.prompt not in known and ask.prompt not in {other.prompt for other in asks}:
            asks.append(ask)
    return [asks[number % len(asks)] for number in range(count)] if asks else []


def unrelated_asks(count: int, *, embedded: bool, seed: int = 0) -> list[Ask]:
    """`count` prompts that have nothing to do with the concept."""
    if not embedded:
        return [Ask(THINGS[number % len(THINGS)]) for number in range(count)]
    drawn = [
        scenes.random_scene(Streams(seed).python("evaluation unrelated", number), things=1)
        for number in range(count)
    ]
    return [Ask(caption(scene), said_by(scene)) for scene in drawn]


def class_ask(concept: Concept) -> Ask | None:
    """The bare class, "a dog" after training on *this* dog; None where the class has no word."""
    return Ask(with_article(concept.class_phrase)) if concept.class_phrase else None


def said_by(scene: scenes.Scene) -> dict[str, str]:
    """What a scene of one thing says, question by question."""
    thing = scene.things[0]
    return {
        "subject": thing.subject,
        "color": thing.color,
        "background": scene.background,
        "position": thing.position,
        "size": thing.size,
    }


def _real(concept: Concept, number: int) -> Ask:
    if concept.is_style:
        return Ask(f"{THINGS[number % len(THINGS)]}, {concept.phrase.lstrip(', ')}")
    template = SCENES[number % len(SCENES)]
    return Ask(template.format(with_article(concept.phrase), bare=concept.phrase))
