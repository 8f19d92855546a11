"""DreamBooth: a few pictures of one subject, a rare word for it, and its class kept as the base knows it.

Source: Ruiz et al. 2023, "DreamBooth: Fine Tuning Text-to-Image Diffusion Models for Subject-Driven Generation". How
the class is kept is the prior's (`methods.prior`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from scumble.data.problems import Problem
from scumble.data.settings import DataSettings
from scumble.errors import ConfigError
from scumble.methods.method import Ingredients
from scumble.methods.parts import injected, planned
from scumble.methods.prior import Prior, PriorSettings, Prompt, check_prior, too_long
from scumble.methods.text_encoder import TextEncoderSettings, phases, texts_of, with_text_encoder
from scumble.models.text import Words
from scumble.settings import Settings
from scumble.training.plan import Plan


class DreamBoothSettings(TextEncoderSettings, PriorSettings):
    """What the subject is called, and how its class is kept."""

    instance_prompt: Prompt | None = None
    """The caption of every picture, with a rare word for the subject: "a photo of sks dog". Unset: the dataset's own
    captions."""

    def shaped(self, data: DataSettings) -> DataSettings:
        """The dataset with the instance prompt as every picture's caption; see `method.ShapesData`."""
        if self.instance_prompt is None:
            return data
        if data.caption is not None and data.caption != self.instance_prompt:
            raise ConfigError(
                f"data.caption is {data.caption!r} and dreambooth.instance_prompt is {self.instance_prompt!r}: both "
                "are the caption of every picture. Remove one."
            )
        return data.model_copy(update={"caption": self.instance_prompt})


class DreamBooth:
    """The adapter, on pictures of a subject and on what the base makes of its class."""

    name = "dreambooth"
    settings = DreamBoothSettings
    needs_pictures = True
    trains_text = False

    def check(
        self, options: Settings, data: DataSettings | None, words: Sequence[Words]
    ) -> Sequence[Problem]:
        """See `method.Checks`."""
        assert isinstance(options, DreamBoothSettings)
        return [
            *too_long("dreambooth.instance_prompt", options.instance_prompt, words),
            *too_long("dreambooth.class_prompt", options.class_prompt, words),
            *_without_identifier(options),
            *check_prior(options, data, "dreambooth", words),
        ]

    def plan(self, ingredients: Ingredients) -> Plan:
        """See `Method`. Draws the missing class pictures first."""
        options = ingredients.options
        options = options if isinstance(options, DreamBoothSettings) else DreamBoothSettings()
        ingredients = with_text_encoder(ingredients, options)
        prior = Prior(ingredients, options, text_embeddings=not texts_of(ingredients))
        adapter = injected(ingredients)
        course = phases(
            ingredients,
            options,
            adapter,
            prior.beside(ingredients.pictures),
            lambda among: prior.objective(adapter, among),
        )
        return planned(ingredients, adapter, course, {"method": self.name, **prior.told})


def _without_identifier(options: DreamBoothSettings) -> Iterable[Problem]:
    """An instance prompt that says nothing which the class prompt does not say."""
    if options.instance_prompt is None or options.class_prompt is None:
        return
    mine, others = (
        {word.strip(".,;:!?'\"()").casefold() for word in prompt.split()}
        for prompt in (options.instance_prompt, options.class_prompt)
    )
    if not mine - others:
        text = (
            f"{options.instance_prompt!r} has no word that class_prompt {options.class_prompt!r} lacks: the subject "
            "would be learned as what every member of its class looks like. Put a rare word into it, as in "
            '"a photo of sks dog".'
        )
        yield Problem("no identifier", "dreambooth.instance_prompt", text, error=False)


dreambooth = DreamBooth()
