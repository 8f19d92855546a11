"""The text encoder beside the denoiser: its layers, rank and learning rate, and when it comes to rest.

While it trains, captions go to the objective as words. Once it rests, they are embedded again, by what it has become,
and kept: the denoiser trains on with cached embeddings.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, cast

from pydantic import Field
from torch import nn

from scumble.adapters.adapter import Adapter
from scumble.adapters.targets import resolve
from scumble.data.woven import Embeddable, Onward
from scumble.errors import ConfigError
from scumble.methods.method import Ingredients
from scumble.methods.parts import trainables
from scumble.settings import Settings
from scumble.training.plan import Phase, Stretch

if TYPE_CHECKING:
    from scumble.data.record import Batches
    from scumble.models.family import BaseModel

TARGETS = "attention"
"""The preset of each text encoder that `train_text_encoder` adds."""

Objective = Callable[[Sequence[str] | None], nn.Module]
"""The roots that may train (None is all) -> the objective of a phase."""


class TextEncoderSettings(Settings):
    """Whether and how the text encoder is adapted too."""

    train_text_encoder: bool = False
    """Adapt the attention layers of the text encoder as well, saved in the same file. Other layers of it can be named
    in adapter.targets instead, e.g. "text_encoder.attention+mlp"."""
    text_encoder_learning_rate: float | None = Field(None, gt=0)
    """Its own learning rate at the schedule's top. Unset: the denoiser's. A tenth to a half of that is usual."""
    text_encoder_rank: int | None = Field(None, ge=1)
    """Its own rank. Unset: the adapter's. Ranks by layer are adapter.rank_pattern's."""
    text_encoder_until: float = Field(1.0, gt=0, le=1)
    """The part of the steps after which it rests, and the denoiser trains on alone: 0.5 is after half of them."""


def text_roots(base: BaseModel) -> tuple[str, ...]:
    """The base's text encoders, by name."""
    return tuple(base.roots)[1:]


def with_text_encoder(ingredients: Ingredients, options: TextEncoderSettings) -> Ingredients:
    """The ingredients with the text encoder's layers, ranks and learning rates as `options` say.

    Raises:
        ConfigError: an option has no effect, because the text encoder is not adapted.
        NoLayerMatches: a target matches no layer.
    """
    targets = ingredients.targets
    if options.train_text_encoder:
        targets = (
            *((targets,) if isinstance(targets, str) else targets),
            *(f"{root}.{TARGETS}" for root in ingredients.base.teachable),
        )
    ingredients = replace(ingredients, targets=targets)
    texts = texts_of(ingredients)
    unset = TextEncoderSettings()
    for name in ("text_encoder_learning_rate", "text_encoder_rank", "text_encoder_until"):
        value = getattr(options, name)
        if not texts and value != getattr(unset, name):
            raise ConfigError(
                f"{name} = {value:g} has no effect: the text encoder is not adapted. "
                "Set train_text_encoder = true, or name its layers in adapter.targets."
            )
    if options.text_encoder_until < 1 and _trained(ingredients) == set(texts):
        raise ConfigError(
            f"text_encoder_until = {options.text_encoder_until:g} would leave nothing to train after it: "
            "adapter.targets name layers of the text encoder only. Add the denoiser's, or leave it out."
        )
    adapter, rates = ingredients.adapter, dict(ingredients.learning_rates)
    if options.text_encoder_rank is not None:
        own = {f"{root}.*": options.text_encoder_rank for root in texts}
        adapter = adapter.model_copy(update={"rank_pattern": {**adapter.rank_pattern, **own}})
    if options.text_encoder_learning_rate is not None:
        rates |= dict.fromkeys(texts, options.text_encoder_learning_rate)
    return replace(ingredients, adapter=adapter, learning_rates=rates)


def texts_of(ingredients: Ingredients) -> tuple[str, ...]:
    """The text encoders that the targets name layers of."""
    trained = _trained(ingredients)
    return tuple(root for root in text_roots(ingredients.base) if root in trained)


def _trained(ingredients: Ingredients) -> set[str]:
    layers = resolve(ingredients.base.roots, ingredients.targets, within=ingredients.within).layers
    return {path.partition(".")[0] for path in layers}


def phases(
    ingredients: Ingredients,
    options: TextEncoderSettings,
    adapter: Adapter,
    batches: Batches,
    objective: Objective,
) -> tuple[Phase, ...]:
    """One phase for the whole adapter; two stretches of one course where the text encoder comes to rest on the way.

    In the second it gets no gradient and stays bit for bit what it was at the end of the first.
    """
    train = ingredients.train
    groups = trainables(adapter, ingredients.learning_rates)
    whole = Phase(
        name="adapter",
        trainables=groups,
        batches=batches,
        objective=objective(None),
        steps=train.steps,
        optimizer=train.optimizer,
        schedule=train.schedule,
    )
    first = max(1, round(options.text_encoder_until * train.steps))
    if first >= train.steps or options.text_encoder_until == 1:
        return (whole,)
    texts = text_roots(ingredients.base)
    others = tuple(group for group in groups if group.name not in texts)
    # its dropout must be off when it embeds in the second stretch, also in a run that is resumed there
    adapter.train(False)
    return (
        replace(whole, steps=first, stretch=Stretch(0, train.steps)),
        replace(
            whole,
            name="adapter, text encoder at rest",
            trainables=others,
            batches=Onward(cast(Embeddable, batches), first * train.accumulate),
            objective=objective([group.name for group in others]),
            steps=train.steps - first,
            stretch=Stretch(first, train.steps),
        ),
    )
