"""Concept: what a run was to teach: its pictures, how words call it, and what class of things it belongs to."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from scumble.errors import ConfigError

ARTICLES = ("a", "an", "the")
MEDIA = (
    "photo",
    "photograph",
    "picture",
    "painting",
    "drawing",
    "illustration",
    "image",
    "rendering",
    "depiction",
)
_LETTER = r"[^\s,.;:!?]"
"""Of a word, as captions are taken apart."""


@dataclass(frozen=True)
class Concept:
    """What a run was to teach."""

    phrase: str
    """How words call it, without an article: "zorbik creature", "sks dog", "in blueprint style"."""
    pictures: tuple[Image.Image, ...] = ()
    """The training pictures, square; empty for what was learned without pictures."""
    keys: tuple[str, ...] = ()
    """What the training pictures are called."""
    class_phrase: str = ""
    """What class it belongs to, "creature" or "dog"; empty where none is known."""

    @property
    def is_style(self) -> bool:
        """Whether it says how a picture looks rather than what is in it."""
        words = self.phrase.split()
        return words[0] in ("in", "by") or words[-1] in ("style", "styles")


def find_phrase(captions: Sequence[str], learned: Sequence[str] = ()) -> str:
    """What all captions call it: the longest run of words that each of them has, without articles and "photo of".

    `learned`: words that the adapter itself brings; where the captions share none of them, they are what it is called.

    Raises:
        ConfigError: they share no word.
    """
    lists = [
        _without_medium(re.findall(f"{_LETTER}+", caption.lower()))
        for caption in dict.fromkeys(captions)
        if caption.strip()
    ]
    best: list[str] = []
    if lists:
        shortest = min(lists, key=len)
        texts = [f" {' '.join(words)} " for words in lists]
        for start in range(len(shortest)):
            for end in range(len(shortest), start + len(best), -1):
                run = _bare(shortest[start:end])
                if len(run) > len(best) and all(f" {' '.join(run)} " in text for text in texts):
                    best = run
    if learned and not set(learned) & set(best):
        return " ".join(learned)
    if not best:
        raise ConfigError(
            "The captions of the training pictures share no words, so it isn't known what the adapter's subject is "
            'called. Say it with --subject, e.g. --subject "sks dog" or --subject "in woodcut style".'
        )
    return " ".join(best)


def without(caption: str, words: Sequence[str]) -> str:
    """A caption without these words: new ones that another file brings."""
    kept = caption
    for word in words:
        kept = re.sub(rf"(?<!{_LETTER}){re.escape(word)}(?!{_LETTER})", "", kept)
    return kept


def _without_medium(words: list[str]) -> list[str]:
    """What follows "a photo of"."""
    for number, word in enumerate(words[:5]):
        if word == "of" and any(medium in words[:number] for medium in MEDIA):
            return words[number + 1 :]
    return words


def _bare(words: list[str]) -> list[str]:
    """Without articles in front, and without small words that dangle behind."""
    while words and words[0] in ARTICLES:
        words = words[1:]
    while words and words[-1] in (*ARTICLES, "in", "on", "at", "of", "with", "and"):
        words = words[:-1]
    return words


def class_of(phrase: str) -> str:
    """The class that a phrase ends in: "dog" of "sks dog"; empty for a single word, which may be the name itself."""
    words = phrase.split()
    return words[-1] if len(words) > 1 and words[0] not in ("in", "by") else ""


def square(picture: Image.Image) -> Image.Image:
    """The middle of a picture, as training cuts it."""
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    return picture.crop((left, top, left + side, top + side))
