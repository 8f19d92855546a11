"""Text: prompts to token ids, and what is lost of a prompt that is too long."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from scumble.models.vocabulary import Vocabulary, vocabulary_of


@dataclass(frozen=True)
class Truncation:
    """A prompt that does not fit the text encoder's window."""

    prompt: str
    tokens: int
    """With the two special tokens."""
    limit: int
    lost: str
    """The end of the prompt, which the denoiser will not see."""

    def __str__(self) -> str:
        return f"{self.tokens} tokens of {self.limit}, lost: {self.lost!r}"


class Words:
    """A CLIP tokenizer and its window of (usually) 77 tokens, start and end included.

    A prompt that is longer keeps its first 75 tokens; `truncated` says which prompts those are. Placeholders
    of several vectors count as that many tokens.
    """

    vocabulary: Vocabulary
    """Where placeholders come in and leave."""

    def __init__(self, tokenizer: Any, window: int) -> None:
        """`window`: positions of the text encoder."""
        self.tokenizer = tokenizer
        # a tokenizer saved without a limit claims 10^30; the text encoder's positions decide then
        self.limit = min(window, int(tokenizer.model_max_length))
        self.vocabulary = vocabulary_of(tokenizer)

    def ids(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """(B prompts) -> (token ids (B, limit), attention mask (B, limit)), padded and truncated to the
        window."""
        batch = self.tokenizer(
            [self.vocabulary.expand(prompt) for prompt in prompts],
            padding="max_length",
            max_length=self.limit,
            truncation=True,
            return_tensors="pt",
        )
        return batch.input_ids, batch.attention_mask

    def counts(self, prompts: Sequence[str]) -> list[int]:
        """Tokens of each prompt without truncation, special tokens included."""
        return [len(ids) for ids in self._full(prompts)]

    def truncated(self, prompts: Sequence[str]) -> list[Truncation]:
        """The prompts that don't fit, each with what is lost of it, in order."""
        return [
            Truncation(prompt, len(ids), self.limit, self.tokenizer.decode(ids[self.limit - 1 : -1]).strip())
            for prompt, ids in zip(prompts, self._full(prompts), strict=True)
            if len(ids) > self.limit
        ]

    def alike(self, one: str, other: str) -> bool:
        """Whether both prompts are the same tokens as far as they are read."""
        first, second = (ids[: self.limit - 1] for ids in self._full([one, other]))
        return first == second

    def _full(self, prompts: Sequence[str]) -> list[list[int]]:
        if not prompts:
            return []
        # verbose=False: transformers would warn of the very thing that is being counted
        said = [self.vocabulary.expand(prompt) for prompt in prompts]
        ids: list[list[int]] = self.tokenizer(said, truncation=False, verbose=False).input_ids
        return ids


def byte_symbols() -> dict[int, str]:
    """Every byte -> a printable character, as in GPT-2's byte-level BPE (Radford et al. 2019)."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    table = {byte: chr(byte) for byte in printable}
    others = [byte for byte in range(256) if byte not in table]
    return table | {byte: chr(256 + number) for number, byte in enumerate(others)}
