"""Captions: a small grammar that says a scene in words, plainly or with paraphrases.

Colours and subjects always keep their one word; sizes, places, backgrounds and the opening vary.
"""

from __future__ import annotations

import random

from scumble.picturebook.scenes import Scene, Thing

#: The first phrase is the canonical one.
BACKGROUND_PHRASES: dict[str, tuple[str, ...]] = {
    "sky": ("in the blue sky", "up in the sky", "among the clouds", "in a sky with clouds"),
    "night": ("at night under the stars", "at night", "under a starry sky", "in the moonlight"),
    "meadow": ("in a green meadow", "in a meadow", "on the grass", "in a meadow with flowers"),
    "beach": ("on a sandy beach", "on the beach", "on the sand by the water", "at the beach"),
    "sea": ("on the sea", "in the sea", "on the waves", "in the deep water"),
    "snow": ("in a snowy field", "in the snow", "on a snowy day", "in the falling snow"),
    "room": ("in a cozy room", "in a room", "inside the house on a rug", "in a room with a window"),
    "desert": ("in the desert", "in a hot desert", "among the dunes", "in a desert with cactus"),
}
SIZE_WORDS: dict[str, tuple[str, ...]] = {
    "small": ("small", "little", "tiny"),
    "medium": (),
    "big": ("big", "large", "huge"),
}
POSITION_PHRASES: dict[str, tuple[str, ...]] = {
    "left": ("on the left", "on the left side", "at the left"),
    "center": ("in the middle", "in the center"),
    "right": ("on the right", "on the right side", "at the right"),
}
OPENINGS: tuple[str, ...] = (
    "a picture of ",
    "a drawing of ",
    "a picture book page with ",
    "an illustration of ",
)
#: How often each freedom is taken when an rng is given.
OPENING_SHARE = 0.3
SIZE_SHARE = 0.8
POSITION_SHARE = 0.8
CENTER_SHARE = 0.15
BACKGROUND_FIRST_SHARE = 0.15
OTHER_WORD_SHARE = 0.5


def _choice(words: tuple[str, ...], rng: random.Random | None) -> str:
    if rng is None or rng.random() >= OTHER_WORD_SHARE:
        return words[0]
    return rng.choice(words)


def with_article(words: str) -> str:
    """The words after "a" or "an"."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def thing_phrase(thing: Thing, rng: random.Random | None = None) -> str:
    """ "a small red fox": article, size (medium is never said), colour, subject."""
    words = [thing.color, thing.subject]
    sizes = SIZE_WORDS[thing.size]
    if sizes and (rng is None or rng.random() < SIZE_SHARE):
        words.insert(0, _choice(sizes, rng))
    phrase = with_article(" ".join(words))
    if rng is not None and rng.random() < 0.08:
        return "the " + phrase.split(" ", 1)[1]
    return phrase


def background_phrase(background: str, rng: random.Random | None = None) -> str:
    """Where the scene is: the canonical phrase, or any of its paraphrases."""
    return _choice(BACKGROUND_PHRASES[background], rng)


def position_phrase(position: str, rng: random.Random | None = None) -> str:
    """ "on the left", or "" where the place is left unsaid (the centre mostly is)."""
    if rng is None:
        return "" if position == "center" else POSITION_PHRASES[position][0]
    share = CENTER_SHARE if position == "center" else POSITION_SHARE
    return _choice(POSITION_PHRASES[position], rng) if rng.random() < share else ""


def style_phrase(style: str) -> str:
    """ ", in blueprint style" for a style, "" for plain pictures."""
    return "" if style == "plain" else f", in {style} style"


def joined(phrase: str, position: str, background: str, *, background_first: bool = False) -> str:
    """A thing, its place ("" leaves it out) and its background in one sentence."""
    if background_first:
        return f"{background}, {phrase}" + (f" {position}" if position else "")
    return f"{phrase} {position}, {background}" if position else f"{phrase} {background}"


def caption(scene: Scene, rng: random.Random | None = None, style: str = "plain") -> str:
    """The scene in words, in small letters without a full stop.

    rng None gives the canonical form, "a small red fox on the left, in a snowy field"; an rng varies it.
    A style other than "plain" is appended.
    """
    place = background_phrase(scene.background, rng)
    if len(scene.things) == 1:
        only = scene.things[0]
        phrase, position = thing_phrase(only, rng), position_phrase(only.position, rng)
    else:
        order = list(scene.things)
        if rng is not None and rng.random() < 0.3:
            order.reverse()
        # Both places are said or none: half of them would not say which thing is where.
        said = rng is None or rng.random() < POSITION_SHARE
        phrases = []
        for thing in order:
            where = f" {_choice(POSITION_PHRASES[thing.position], rng)}" if said else ""
            phrases.append(thing_phrase(thing, rng) + where)
        phrase, position = " and ".join(phrases), ""
        if said:
            phrase += ","
    if rng is not None and rng.random() < BACKGROUND_FIRST_SHARE:
        words = joined(phrase.rstrip(","), position, place, background_first=True)
    else:
        words = joined(phrase, position, place)
        if rng is not None and rng.random() < OPENING_SHARE:
            words = rng.choice(OPENINGS) + words
    return words + style_phrase(style)
