"""Vocabulary: what may be a placeholder, and the tokenizer that it borrows."""

from __future__ import annotations

import gc

import pytest

from scumble.errors import AdapterError
from scumble.models.text import Words
from scumble.models.tiny import tiny_tokenizer
from scumble.models.vocabulary import vocabulary_of


def test_all_who_use_a_tokenizer_share_its_vocabulary() -> None:
    tokenizer = tiny_tokenizer()
    assert vocabulary_of(tokenizer) is vocabulary_of(tokenizer) is Words(tokenizer, 77).vocabulary
    assert vocabulary_of(tokenizer) is not vocabulary_of(tiny_tokenizer())


@pytest.mark.parametrize(
    ("placeholders", "said"),
    [
        ({"the": 1}, r"'the' is in the vocabulary already \(token \d+, 'the</w>'\).*'<the>'"),
        ({"THE": 1}, "in the vocabulary already"),
        ({"nd": 1}, "in the vocabulary already"),  # a part of "and" would change "and"
        ({"a fox": 1}, "one word without blanks"),
        ({"": 1}, "one word without blanks"),
        ({"<f>": 2, "<f>_1": 1}, "'<f>_1' would be a vector of both"),
        ({"<Fox>": 1, "<fox>": 1}, "'<fox>' would be a vector of both"),
        ({"*fox": 1, "*foxes": 1}, r"'\*fox' is a part of '\*foxes'"),
    ],
)
def test_what_can_not_be_a_placeholder_is_refused(placeholders: dict[str, int], said: str) -> None:
    tokenizer = tiny_tokenizer()
    backend, size = tokenizer._tokenizer, len(tokenizer)
    with pytest.raises(AdapterError, match=said):
        vocabulary_of(tokenizer).add(placeholders)
    assert tokenizer._tokenizer is backend and len(tokenizer) == size


def test_a_gap_keeps_later_ids_where_they_are() -> None:
    tokenizer = tiny_tokenizer()
    words, backend, size = vocabulary_of(tokenizer), tokenizer._tokenizer, len(tokenizer)
    first, second = words.add({"<a1>": 2})["<a1>"], words.add({"<b2>": 1})["<b2>"]
    assert (first, second) == ((size, size + 1), (size + 2,))
    words.remove(["<a1>"])
    assert tokenizer("<b2>").input_ids[1:-1] == list(second)
    assert words.add({"<a1>": 1})["<a1>"] == (size + 3,)
    assert words.placeholders == {"<b2>": 1, "<a1>": 1}
    words.remove(["<a1>", "<b2>"])
    assert tokenizer._tokenizer is backend and len(tokenizer) == size
    with pytest.raises(AdapterError, match="not in the vocabulary"):
        words.remove(["<a1>"])


def test_it_dies_with_its_tokenizer() -> None:
    from scumble.models import vocabulary

    gc.collect()
    before = len(vocabulary._ALL)
    tokenizer = tiny_tokenizer()
    vocabulary_of(tokenizer).add({"<a1>": 1})
    assert len(vocabulary._ALL) == before + 1
    del tokenizer
    gc.collect()
    assert len(vocabulary._ALL) == before


def test_a_tokenizer_without_a_backend_is_borrowed_and_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """As those written in Python are: what they know lies in their attributes."""

    class Slow:
        def __init__(self) -> None:
            self.words = {"the</w>": 0}

        def get_vocab(self) -> dict[str, int]:
            return dict(self.words)

        def add_tokens(self, tokens: list[str]) -> None:
            self.words |= {token: len(self.words) + n for n, token in enumerate(tokens)}

        def convert_tokens_to_ids(self, tokens: list[str]) -> list[int]:
            return [self.words[token] for token in tokens]

    tokenizer = Slow()
    own = tokenizer.words
    vocabulary = vocabulary_of(tokenizer)
    assert vocabulary.add({"<a1>": 2}) == {"<a1>": (1, 2)} and own == {"the</w>": 0}
    vocabulary.remove(["<a1>"])
    assert tokenizer.words is own and vars(tokenizer) == {"words": {"the</w>": 0}}
