"""Text-to-image: pictures and captions train an adapter with the denoising loss. The main job."""

from __future__ import annotations

from scumble.methods.method import Ingredients
from scumble.methods.parts import injected, planned
from scumble.methods.text_encoder import TextEncoderSettings, phases, with_text_encoder
from scumble.training.objective import DenoisingObjective
from scumble.training.plan import Plan


class TextToImageSettings(TextEncoderSettings):
    """What pictures with captions may be told besides: the text encoder."""


class TextToImage:
    """The adapter, on pictures with captions."""

    name = "text-to-image"
    settings = TextToImageSettings
    needs_pictures = True
    trains_text = False

    def plan(self, ingredients: Ingredients) -> Plan:
        """See `Method`."""
        options = ingredients.options
        options = options if isinstance(options, TextToImageSettings) else TextToImageSettings()
        ingredients = with_text_encoder(ingredients, options)
        base, streams, settings = ingredients.base, ingredients.streams, ingredients.train.objective
        adapter = injected(ingredients)
        course = phases(
            ingredients,
            options,
            adapter,
            ingredients.pictures,
            lambda among: DenoisingObjective(base, streams, settings, among=among),
        )
        return planned(ingredients, adapter, course, {"method": self.name})


text_to_image = TextToImage()
