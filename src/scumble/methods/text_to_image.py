"""Text-to-image: pictures and captions train an adapter with the denoising loss. The main job."""

from __future__ import annotations

from scumble.adapters.adapter import Adapter
from scumble.methods.method import Ingredients
from scumble.methods.parts import HeldOutLoss, describe, facts, identity, verify
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
        base, train, streams = ingredients.base, ingredients.train, ingredients.streams
        assert ingredients.batches is not None
        adapter = Adapter.inject(
            base.roots, ingredients.targets, ingredients.adapter, streams=streams, within=ingredients.within
        )
        base.train_memory(checkpointing=train.gradient_checkpointing)
        metadata = describe(ingredients)
        return Plan(
            phases=phases(
                ingredients,
                options,
                adapter,
                ingredients.batches,
                lambda among: DenoisingObjective(base, streams, train.objective, among=among),
            ),
            export=lambda: adapter.state(metadata),
            verify=lambda state: verify(state, base, ingredients.fresh, streams),
            held_out=HeldOutLoss(base, adapter, ingredients.held_out, streams)
            if ingredients.held_out
            else None,
            identity=identity(ingredients),
            facts={"method": self.name, **facts(adapter, ingredients)},
        )


text_to_image = TextToImage()
