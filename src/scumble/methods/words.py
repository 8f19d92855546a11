"""Words: what methods that teach new words share: their settings, templates, first rows and early checks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from pydantic import BeforeValidator, Field, field_validator, model_validator
from torch import Tensor

from scumble.adapters.state import TokenState
from scumble.adapters.tokens import TokenRows, table_of
from scumble.data import captions as spoken
from scumble.data.problems import Problem
from scumble.data.sources import open_dataset
from scumble.errors import AdapterError, ConfigError
from scumble.models.text import Words
from scumble.rng import Streams
from scumble.settings import Settings

if TYPE_CHECKING:
    from scumble.data.settings import DataSettings
    from scumble.methods.method import Ingredients
    from scumble.models.vocabulary import Vocabulary

TEMPLATES: Mapping[str, tuple[str, ...]] = {
    "object": (
        "{caption}",
        "a {caption}",
        "a picture of {caption}",
        "a picture of a {caption}",
        "a photo of one {caption}",
        "a photo that shows the {caption}",
        "a close view of {caption}",
        "a {caption} seen from afar",
        "a {caption} in the middle",
        "a clear shot of the {caption}",
        "a dim photo of a {caption}",
        "a sunny photo of a {caption}",
        "a {caption} and its surroundings",
        "this is the {caption}",
        "a snapshot with a {caption}",
        "the very same {caption} again",
    ),
    "style": (
        "{caption}",
        "in the style of {caption}",
        "a picture in the style of {caption}",
        "a painting by {caption}",
        "a drawing made like {caption}",
        "a scene as {caption} would show it",
        "a small picture in {caption} style",
        "a large picture in {caption} style",
        "a landscape in the manner of {caption}",
        "a portrait in the manner of {caption}",
        "colours and lines of {caption}",
        "a bright work by {caption}",
        "a dark work by {caption}",
        "a sketch after {caption}",
        "another work of {caption}",
    ),
}
"""What is said around the new word: sentences that leave everything else open, so that the word takes it up."""


def _one_or_more(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


Texts = Annotated[tuple[str, ...], BeforeValidator(_one_or_more)]


class WordSettings(Settings):
    """Which words are taught, and from where they start."""

    placeholders: Annotated[Texts, Field(min_length=1)]
    """The new word, or several, e.g. "<fox>". Prompts use them like any other word."""
    vectors: int = Field(1, ge=1, le=64)
    """Embedding vectors of each word. More hold more, and take more of a prompt's 75 tokens."""
    initial: Texts = ()
    """A known word to start each new one from, e.g. "fox": one token, or one for each vector. Unset: noise with the
    mean and spread of the base's own embeddings."""
    learns: Literal["object", "style", "captions"] = "object"
    """What is said of the pictures: object and style put the words into general sentences of their own, captions takes
    the dataset's, which must contain the words."""
    norm_pull: float = Field(0.1, ge=0, le=1)
    """How far each step takes a vector's length to the mean length of the base's embeddings: 0 not at all, 1 all the
    way."""
    norm_limit: float | None = Field(None, gt=0)
    """Vectors longer than this many times that mean are shortened to it after each step. Unset: no limit."""

    @field_validator("placeholders")
    @classmethod
    def _apart(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        twice = [word for number, word in enumerate(value) if word in value[:number]]
        if twice:
            raise ValueError(f"the placeholder {twice[0]!r} is given twice")
        return value

    @model_validator(mode="after")
    def _one_start_each(self) -> WordSettings:
        if self.initial and len(self.initial) != len(self.placeholders):
            raise ValueError(
                f"initial has {len(self.initial)} words and placeholders has {len(self.placeholders)}: give one to "
                "start each from, or none"
            )
        return self

    def shaped(self, data: DataSettings) -> DataSettings:
        """The dataset with the new words in general sentences, or as it is; see `method.ShapesData`."""
        if self.learns == "captions":
            return data
        plain = type(data).model_fields["templates"].default  # which a run's own run.toml writes out
        if data.caption is not None or data.templates != plain:
            name = "caption" if data.caption is not None else "templates"
            raise ConfigError(
                f'learns = "{self.learns}" says sentences of its own of every picture, so data.{name} = '
                f'{getattr(data, name)!r} would have no effect. Remove it, or set learns = "captions".'
            )
        update = {"caption": " ".join(self.placeholders), "templates": TEMPLATES[self.learns]}
        return data.model_copy(update=update)

    @property
    def sizes(self) -> dict[str, int]:
        """placeholder -> number of vectors"""
        return dict.fromkeys(self.placeholders, self.vectors)


def check_words(
    options: WordSettings, section: str, data: DataSettings | None, words: Sequence[Words]
) -> list[Problem]:
    """What is wrong with the words, told from tokenizers and captions alone. `section`: of the settings.

    The placeholders are in `words` afterwards, so that what is counted with these counts them too.
    """
    problems = []
    for one in words:
        try:
            initial_ids(options, one.vocabulary)
        except ConfigError as error:
            problems.append(Problem("initial word", f"{section}.initial", str(error)))
        try:
            one.vocabulary.add(options.sizes)
        except AdapterError as error:
            problems.append(Problem("placeholder", f"{section}.placeholders", str(error)))
    if problems or data is None or not words:
        return list(dict.fromkeys(problems))  # several text encoders may all say the same
    return [*_captions(options, section, data, words)]


def _captions(
    options: WordSettings, section: str, data: DataSettings, words: Sequence[Words]
) -> Iterable[Problem]:
    """Captions that are cut off, and captions without the words."""
    streams = Streams(0)
    without = []
    told: set[str] = set()
    records = open_dataset(data, seed=0).records
    for record in records:
        said = spoken.to_check(record.captions, data, streams)
        if not any(word in caption for caption in record.captions for word in options.placeholders):
            without.append(record.key)
        cut = [lost for one in words for lost in one.truncated([text for text in said if text not in told])]
        told |= set(said)
        if cut:
            worst = max(cut, key=lambda lost: lost.tokens)
            text = (
                f"{worst.prompt[:80]!r} has {worst.tokens} tokens with {options.vectors} for each new word, and the "
                f"base reads {worst.limit}. This would be cut off: {worst.lost!r}. Shorten it, or lower vectors."
            )
            yield Problem("long caption", record.key, text)
    listed = " or ".join(map(repr, options.placeholders))
    if len(without) == len(records):
        text = (
            f"no caption contains {listed}, so nothing would be learned. Write the word into the captions, or set "
            'learns = "object" or learns = "style".'
        )
        yield Problem("no placeholder", f"{section}.placeholders", text)
    elif without:
        text = (
            f"{len(without)} of {len(records)} captions do not contain {listed}, first that of {without[0]}."
        )
        yield Problem("no placeholder", f"{section}.placeholders", text, error=False)


def initial_ids(options: WordSettings, vocabulary: Vocabulary) -> dict[str, list[int]]:
    """placeholder -> the ids of the tokens it starts from, one for each vector; empty where it starts from noise.

    Raises:
        ConfigError: a word to start from is several tokens, where one is needed; they are shown.
    """
    found = {}
    for word, start in zip(options.placeholders, options.initial, strict=False):
        tokens, ids = vocabulary.pieces(start)
        if len(ids) not in {1, options.vectors}:
            pieces = ", ".join(repr(token.removesuffix("</w>")) for token in tokens) or "none"
            wanted = (
                "one" if options.vectors == 1 else f"one, or one for each of the {options.vectors} vectors"
            )
            raise ConfigError(
                f"{start!r}, which {word!r} should start from, is {len(ids)} tokens for this base ({pieces}), and "
                f"{wanted} is needed. Choose a simpler word."
            )
        found[word] = ids * options.vectors if len(ids) == 1 else ids
    return found


@torch.no_grad()
def new_words(ingredients: Ingredients, options: WordSettings) -> TokenRows:
    """Trainable rows for the words, attached to the base.

    Raises:
        ConfigError: see `initial_ids`.
        AdapterError: a placeholder is in the vocabulary already.
    """
    base = ingredients.base
    base.claim(base.vocabularies)
    starts = {root: initial_ids(options, vocabulary) for root, vocabulary in base.vocabularies.items()}
    tokens = {
        word: TokenState(
            {
                root: _first_rows(
                    table_of(base.roots[root]).weight, ids.get(word), options.vectors, at, ingredients
                )
                for root, ids in starts.items()
            }
        )
        for at, word in enumerate(options.placeholders)
    }
    return TokenRows("words", base.roots, base.vocabularies, tokens, trainable=True).attach()


def _first_rows(
    table: Tensor, ids: list[int] | None, vectors: int, position: int, ingredients: Ingredients
) -> Tensor:
    """(vectors, dim) fp32: rows of the table, or noise with its mean and standard deviation in each dimension."""
    if ids is not None:
        return table[ids].float()
    noise = ingredients.streams.normal("new word", [position], (vectors, table.shape[1]))[0].to(table.device)
    return table.float().mean(0) + table.float().std(0) * noise
