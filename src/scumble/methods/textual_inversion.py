"""Textual inversion: a new word is learned from a few pictures; nothing of the base moves.

Source: Gal et al. 2022, "An Image is Worth One Word", equation 2: the embedding of the word is what minimises the
denoising loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from scumble.adapters.adapter import Adapter
from scumble.data.problems import Problem
from scumble.formats.embedding import EMBEDDING_NAME
from scumble.methods.method import Ingredients
from scumble.methods.parts import planned, trainables
from scumble.methods.words import WordSettings, check_words, new_words
from scumble.models.text import Words
from scumble.settings import Settings
from scumble.training.objective import DenoisingObjective
from scumble.training.plan import Phase, Plan

if TYPE_CHECKING:
    from scumble.data.settings import DataSettings


class TextualInversionSettings(WordSettings):
    """Which words are taught, and from where they start."""


class TextualInversion:
    """One phase: the rows of the new words."""

    name = "textual-inversion"
    settings = TextualInversionSettings
    needs_pictures = True
    trains_text = True
    trains_layers = False
    file_name = EMBEDDING_NAME

    def check(
        self, options: Settings, data: DataSettings | None, words: Sequence[Words]
    ) -> Sequence[Problem]:
        """See `method.Checks`."""
        assert isinstance(options, TextualInversionSettings)
        return check_words(options, "textual_inversion", data, words)

    def plan(self, ingredients: Ingredients) -> Plan:
        """See `Method`.

        Raises:
            AdapterError: a placeholder is in the vocabulary already.
            ConfigError: a word to start from is several tokens.
        """
        options, train, base = ingredients.options, ingredients.train, ingredients.base
        assert isinstance(options, TextualInversionSettings)
        rows = new_words(ingredients, options)
        taught = Adapter("words", base.roots, {}, tokens=rows).attach()
        base.train_memory(checkpointing=train.gradient_checkpointing)
        phase = Phase(
            name="inversion",
            trainables=trainables(taught, ingredients.learning_rates),
            batches=ingredients.pictures,
            objective=DenoisingObjective(base, ingredients.streams, train.objective),
            steps=train.steps,
            optimizer=train.optimizer,
            schedule=train.schedule,
            after_step=lambda: rows.bound_norms(options.norm_pull, options.norm_limit),
        )
        told = {"method": self.name, "words": ", ".join(options.placeholders)}
        return planned(ingredients, taught, [phase], told)


textual_inversion = TextualInversion()
