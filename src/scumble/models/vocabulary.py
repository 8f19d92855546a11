"""Vocabulary: a tokenizer's words, and placeholders that come for a while and leave without a trace.

A placeholder of n vectors is n tokens, `<fox>`, `<fox>_1`, ..., as in diffusers; in a prompt it is spelled
once. While placeholders are lent, the tokenizer works with a copy of what it keeps its words in; when the last
one leaves, it has the very object back.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterable, Mapping
from typing import Any

from scumble.errors import AdapterError

_ALL: weakref.WeakKeyDictionary[Any, Vocabulary] = weakref.WeakKeyDictionary()
_KEPT = 8
"""Sets of placeholders whose copies are kept: a session switches between a few."""


class Vocabulary:
    """The words of one tokenizer. Use `vocabulary_of`: there is one for each tokenizer.

    Laws: after every `add` was undone by `remove`, in any order, the tokenizer is as it was, to the identity of
    what it holds its words in; ids of placeholders never move while they are lent; prompts without a
    placeholder have the ids that they have without any lent.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = weakref.ref(tokenizer)
        self._own: dict[str, Any] | None = None
        """What the tokenizer keeps its words in; None while nothing is lent."""
        self._lent: list[tuple[str, int]] = []
        """(placeholder, vectors), in the order of their ids; "" where one has left before a later one."""
        self._copies: dict[tuple[str, ...], dict[str, Any]] = {}

    @property
    def placeholders(self) -> dict[str, int]:
        """placeholder -> vectors, of those that are lent now."""
        return {name: count for name, count in self._lent if name}

    @property
    def end(self) -> int | None:
        """The id that ends every prompt."""
        found: int | None = self._words().eos_token_id
        return found

    def check(self, placeholders: Mapping[str, int]) -> None:
        """Whether these could be added.

        Raises:
            AdapterError: one is a word already, is lent already, can't be told from another, or can't be a
                token.
        """
        known: dict[str, int] = self._words().get_vocab()
        there = {token.lower() for name, count in self._lent if name for token in spelled(name, count)}
        new: dict[str, str] = {}
        for name, count in placeholders.items():
            if not name or any(letter.isspace() for letter in name):
                raise AdapterError(
                    f"A placeholder is one word without blanks, not {name!r}. Try {'<fox>'!r}."
                )
            for token in spelled(name, count):
                if token.lower() in there:
                    raise AdapterError(
                        f"The placeholder {name!r} is in use already: another adapter brings it with it. Unload "
                        "that one first; two adapters can't teach one word."
                    )
                # tokens are found inside words too, so a part of a word would change that word
                word = next((word for word in known if token.lower() in word.lower()), None)
                if word is not None:
                    raise AdapterError(
                        f"The placeholder {name!r} is in the vocabulary already (token {known[word]}, {word!r}): "
                        f"its meaning would be lost. Choose a word that is not, e.g. {f'<{name}>'!r}."
                    )
                if token.lower() in new:
                    raise AdapterError(
                        f"{token!r} would be a vector of both {new[token.lower()]!r} and {name!r}: choose other "
                        "names."
                    )
                new[token.lower()] = name
        everyone = {*(name for name, _ in self._lent if name), *placeholders}
        for name in everyone:
            inside = [other for other in everyone if other != name and name in other]
            if inside:
                raise AdapterError(
                    f"The placeholder {name!r} is a part of {inside[0]!r}: a prompt could mean either."
                )

    def add(self, placeholders: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
        """Lend ids to placeholders (each with its number of vectors): placeholder -> ids.

        Raises:
            AdapterError: see `check`. Nothing was changed.
        """
        self.check(placeholders)
        self._lent += placeholders.items()
        self._apply()
        words = self._words()
        return {
            name: tuple(words.convert_tokens_to_ids(spelled(name, count)))
            for name, count in placeholders.items()
        }

    def remove(self, placeholders: Iterable[str]) -> None:
        """Take the ids back.

        Raises:
            AdapterError: one is not lent.
        """
        gone = set(placeholders)
        missing = gone - set(self.placeholders)
        if missing:
            raise AdapterError(f"The placeholder {min(missing)!r} is not in the vocabulary.")
        self._lent = [("" if name in gone else name, count) for name, count in self._lent]
        while self._lent and not self._lent[-1][0]:
            self._lent.pop()
        self._apply()

    def expand(self, prompt: str) -> str:
        """`prompt` with every placeholder of n vectors spelled as its n tokens, as diffusers does."""
        for name, count in self._lent:
            if name and count > 1 and name in prompt:
                prompt = prompt.replace(name, " ".join(spelled(name, count)))
        return prompt

    def pieces(self, text: str) -> tuple[list[str], list[int]]:
        """(tokens, ids) of `text`, without the special ones at start and end."""
        tokens = list(self._words().tokenize(text))
        return tokens, list(self._words().convert_tokens_to_ids(tokens))

    def _words(self) -> Any:
        tokenizer = self._tokenizer()
        assert tokenizer is not None, "the tokenizer is gone"
        return tokenizer

    def _apply(self) -> None:
        tokenizer = self._words()
        if self._own is None:
            self._own = _store(tokenizer)
        if not self._lent:
            _put(tokenizer, self._own)
            self._own = None
            self._copies.clear()
            return
        tokens = tuple(
            token
            for name, count in self._lent
            # a noncharacter keeps the place of one that left: no prompt contains it
            for token in spelled(name or "\ufdd0", count)
        )
        # two gaps must not have one name
        tokens = tuple(f"{token}{n}" if token[0] == "\ufdd0" else token for n, token in enumerate(tokens))
        if tokens not in self._copies:
            if len(self._copies) >= _KEPT:
                del self._copies[next(iter(self._copies))]
            _put(tokenizer, _copied(tokenizer, self._own))
            tokenizer.add_tokens(list(tokens))
            self._copies[tokens] = _store(tokenizer)
        _put(tokenizer, self._copies[tokens])


def vocabulary_of(tokenizer: Any) -> Vocabulary:
    """The one Vocabulary of this tokenizer, which all who use the tokenizer share."""
    if tokenizer not in _ALL:
        _ALL[tokenizer] = Vocabulary(tokenizer)
    return _ALL[tokenizer]


def spelled(placeholder: str, vectors: int) -> list[str]:
    """The tokens of a placeholder: itself, then `<it>_1`, `<it>_2`, ..."""
    return [placeholder, *(f"{placeholder}_{number}" for number in range(1, vectors))]


def _store(tokenizer: Any) -> dict[str, Any]:
    """What the tokenizer keeps its words in: its backend, or (those written in Python) all its attributes."""
    if hasattr(tokenizer, "_tokenizer"):
        return {"_tokenizer": tokenizer._tokenizer}
    return dict(tokenizer.__dict__)


def _copied(tokenizer: Any, store: Mapping[str, Any]) -> dict[str, Any]:
    _put(tokenizer, store)
    return copy.deepcopy(dict(store)) if "_tokenizer" in store else dict(copy.deepcopy(tokenizer).__dict__)


def _put(tokenizer: Any, store: Mapping[str, Any]) -> None:
    if "_tokenizer" not in store:
        tokenizer.__dict__.clear()
    tokenizer.__dict__.update(store)
