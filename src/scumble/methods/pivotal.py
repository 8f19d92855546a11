"""Pivotal tuning: first a word by textual inversion, then an adapter around that pivot.

Sources: Roich et al. 2021, "Pivotal Tuning for Latent-based Editing of Real Images" (for GANs): invert, then tune the
generator around the inverted point; cloneofsimo's LoRA brought it to diffusion. The word finds what of the subject the
base can say already; the adapter adds the rest, and needs to move less far.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, cast

from pydantic import Field, model_validator

from scumble.data.problems import Problem
from scumble.data.woven import Embeddable, Later, Onward
from scumble.errors import ConfigError
from scumble.methods.method import Ingredients
from scumble.methods.parts import injected, planned, trainables
from scumble.methods.prior import Prior, PriorSettings, check_prior, too_long
from scumble.methods.text_encoder import TextEncoderSettings, phases, with_text_encoder
from scumble.methods.words import WordSettings, check_words, new_words
from scumble.models.text import Words
from scumble.settings import Settings
from scumble.training.objective import DenoisingObjective
from scumble.training.optimizers import OptimizerSettings
from scumble.training.plan import Phase, Plan, nothing
from scumble.training.schedules import ScheduleSettings

if TYPE_CHECKING:
    from scumble.adapters.adapter import Adapter
    from scumble.data.record import Batches
    from scumble.data.settings import DataSettings

TOKENS = "tokens"
"""What the words are called among the things that train."""


class InversionOptimizerSettings(OptimizerSettings):
    """How words are moved: each step by a few per cent of what the table's numbers spread over."""

    learning_rate: float = Field(default=1e-3, gt=0)
    """Learning rate at the schedule's top. For prodigy it multiplies the estimated rate: use 1.0."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay (Loshchilov & Hutter, 2019). norm_pull holds the words' lengths without it."""


class PivotalSettings(WordSettings, TextEncoderSettings, PriorSettings):
    """Which words are taught, for how long alone, what becomes of them while the adapter trains, and how the class
    is kept meanwhile."""

    inversion_steps: int = Field(ge=0)
    """Steps in which the words train alone; the rest of train.steps tunes the adapter. 0 trains both from the start."""
    inversion_optimizer: InversionOptimizerSettings = InversionOptimizerSettings()
    """How the words are moved meanwhile; train.optimizer moves the adapter."""
    inversion_schedule: ScheduleSettings = ScheduleSettings()
    """How the words' learning rate changes meanwhile; train.schedule is the adapter's."""
    joint: bool = False
    """Train the words on while the adapter is tuned, at token_learning_rate. Off: they stay what they became."""
    token_learning_rate: float | None = Field(None, gt=0)
    """The words' own rate while the adapter is tuned. Unset: a tenth of the inversion's."""

    @model_validator(mode="after")
    def _the_words_train(self) -> PivotalSettings:
        if not self.inversion_steps and not self.joint:
            raise ValueError(
                "inversion_steps = 0 with joint = false would never train the words: give inversion_steps, or set "
                "joint = true"
            )
        if self.token_learning_rate is not None and not self.joint:
            raise ValueError(
                f"token_learning_rate = {self.token_learning_rate:g} has no effect with joint = false, where the words "
                "rest while the adapter is tuned"
            )
        if self.joint and self.text_encoder_until < 1:
            raise ValueError(
                f"joint = true trains the words to the end, and text_encoder_until = {self.text_encoder_until:g} ends "
                "that of the text encoder that reads them. Leave one out"
            )
        changed = {"inversion_optimizer", "inversion_schedule"} & self.model_fields_set
        if not self.inversion_steps and any(
            getattr(self, name) != type(self).model_fields[name].default for name in changed
        ):
            raise ValueError(f"{', '.join(sorted(changed))}: no effect with inversion_steps = 0")
        return self


class Pivotal:
    """Two phases or more: the words, then the adapter around them."""

    name = "pivotal"
    settings = PivotalSettings
    needs_pictures = True
    trains_text = True

    def check(
        self, options: Settings, data: DataSettings | None, words: Sequence[Words]
    ) -> Sequence[Problem]:
        """See `method.Checks`."""
        assert isinstance(options, PivotalSettings)
        return [
            *check_words(options, "pivotal", data, words),
            *too_long("pivotal.class_prompt", options.class_prompt, words),
            *check_prior(options, data, "pivotal", words),
            *_taught_in_class(options),
        ]

    def plan(self, ingredients: Ingredients) -> Plan:
        """See `Method`.

        Raises:
            AdapterError: a placeholder is in the vocabulary already.
            ConfigError: a word to start from is several tokens, or no step is left for the adapter.
        """
        options, train = ingredients.options, ingredients.train
        assert isinstance(options, PivotalSettings)
        tuning = train.steps - options.inversion_steps
        if tuning < 1:
            raise ConfigError(
                f"pivotal.inversion_steps = {options.inversion_steps} leaves none of the {train.steps} steps of "
                "train.steps for the adapter. Raise train.steps: it counts both."
            )
        ingredients = with_text_encoder(ingredients, options)
        base, streams = ingredients.base, ingredients.streams
        prior = Prior(ingredients, options, text_embeddings=False)
        rows = new_words(ingredients, options)
        adapter = injected(ingredients)
        adapter.tokens = rows
        # what embeds captions once must not drop anything; the loop switches what trains
        adapter.train(False)
        groups = trainables(adapter, ingredients.learning_rates)
        words_alone = tuple(replace(group, learning_rate=None) for group in groups if group.name == TOKENS)

        def keep_norms() -> None:
            rows.bound_norms(options.norm_pull, options.norm_limit)

        inversion = Phase(
            name="inversion",
            trainables=words_alone,
            batches=ingredients.pictures,
            objective=DenoisingObjective(base, streams, train.objective),
            steps=options.inversion_steps,
            optimizer=options.inversion_optimizer,
            schedule=options.inversion_schedule,
            after_step=keep_norms,
        )
        told = {
            "method": self.name,
            "words": ", ".join(options.placeholders),
            "steps of inversion and tuning": f"{options.inversion_steps} + {tuning}",
            **prior.told,
        }
        course = (
            *([inversion] if options.inversion_steps else []),
            *_tuning(ingredients, options, adapter, prior, tuning, keep_norms),
        )
        return planned(ingredients, adapter, course, told)


def _tuning(
    ingredients: Ingredients,
    options: PivotalSettings,
    adapter: Adapter,
    prior: Prior,
    steps: int,
    keep_norms: object,
) -> Iterator[Phase]:
    """The phases after the pivot."""
    base, train = ingredients.base, ingredients.train
    batches = cast("Embeddable", prior.beside(ingredients.pictures))
    rates = dict(ingredients.learning_rates)
    if options.joint:
        rates[TOKENS] = options.token_learning_rate or options.inversion_optimizer.learning_rate / 10
    first = options.inversion_steps * train.accumulate
    reads = any(path.partition(".")[0] in base.vocabularies for path in adapter.deltas)
    later: Batches = Later(batches, first)
    if not options.joint and not reads:
        later = Onward(batches, first)  # nothing moves the text any more: it is embedded once
    for phase in phases(
        replace(ingredients, learning_rates=rates, train=train.model_copy(update={"steps": steps})),
        options,
        adapter,
        later,
        lambda among: prior.objective(adapter, among),
    ):
        yield replace(
            phase,
            name=phase.name.replace("adapter", "tuning", 1),
            trainables=tuple(group for group in phase.trainables if options.joint or group.name != TOKENS),
            after_step=keep_norms if options.joint else nothing,  # type: ignore[arg-type]
        )


def _taught_in_class(options: PivotalSettings) -> Iterator[Problem]:
    """A class prompt that speaks of the subject itself."""
    said = (options.class_prompt or "").split()
    for word in options.placeholders:
        if word in said:
            text = (
                f"{options.class_prompt!r} says the new word {word!r}: the class would be held to what the subject "
                'becomes. Call the class by a word that the base knows, as in "a photo of a dog".'
            )
            yield Problem("class prompt", "pivotal.class_prompt", text)


pivotal = Pivotal()
