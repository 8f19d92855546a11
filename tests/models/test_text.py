"""Words: ids, counts, and what is lost of a prompt that is too long."""

from __future__ import annotations

import logging

import pytest
import torch

from scumble.models.text import Words
from scumble.models.tiny import tiny_tokenizer


@pytest.fixture(scope="module")
def words() -> Words:
    return Words(tiny_tokenizer(), 77)


def test_ids_fill_the_window(words: Words) -> None:
    ids, mask = words.ids(["a fox", ""])
    assert ids.shape == mask.shape == (2, 77)
    start, end = words.tokenizer.bos_token_id, words.tokenizer.eos_token_id
    assert (ids[:, 0] == start).all() and ids[1, 1:].eq(end).all()
    assert mask.sum(1).tolist() == [len("afox") + 2, 2]


def test_any_string_can_be_encoded(words: Words) -> None:
    for text in ("東京 🦊", "ﷺ\u200d\x07", "naïve café", "<|endoftext|>"):
        ids = words.tokenizer(text).input_ids
        assert ids[0] == words.tokenizer.bos_token_id and max(ids) < len(words.tokenizer)
    assert (
        words.tokenizer.decode(words.tokenizer("the naïve fox").input_ids, skip_special_tokens=True).strip()
        == "the naïve fox"
    )


def test_truncation_says_what_is_lost(words: Words, caplog: pytest.LogCaptureFixture) -> None:
    long = "x" * 80 + " lost"
    with caplog.at_level(logging.WARNING):
        found = words.truncated(["short", long])
        counts = words.counts(["short", long])
    assert counts == [7, 86] and [t.prompt for t in found] == [long]
    (it,) = found
    assert (it.tokens, it.limit) == (86, 77) and it.lost == "xxxxx lost"
    assert str(it) == "86 tokens of 77, lost: 'xxxxx lost'"
    assert not caplog.records
    kept = words.ids([long])[0]
    assert words.tokenizer.decode(kept[0, 1:-1]).strip() == "x" * 75


def test_exactly_full_is_not_truncated(words: Words) -> None:
    assert words.truncated(["x" * 75]) == [] and words.truncated(["x" * 76]) != []
    assert words.truncated([]) == [] and words.counts([]) == []


def test_a_tokenizer_without_a_limit_takes_the_text_encoders() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = int(1e30)
    ids, _ = Words(tokenizer, 77).ids(["x" * 200])
    assert ids.shape == (1, 77) and torch.equal(ids[0, -1:], torch.tensor([tokenizer.eos_token_id]))
