"""Text-to-image: pictures and captions train an adapter with the denoising loss. The main job."""

from __future__ import annotations

from scumble.adapters.adapter import Adapter
from scumble.methods.method import Ingredients, NoSettings
from scumble.methods.parts import HeldOutLoss, describe, facts, identity, trainables, verify
from scumble.training.objective import DenoisingObjective
from scumble.training.plan import Phase, Plan


class TextToImage:
    """One phase: the adapter, on pictures with captions."""

    name = "text-to-image"
    settings = NoSettings
    needs_pictures = True
    trains_text = False

    def plan(self, ingredients: Ingredients) -> Plan:
        """See `Method`."""
        base, train, streams = ingredients.base, ingredients.train, ingredients.streams
        assert ingredients.batches is not None
        adapter = Adapter.inject(
            base.roots, ingredients.targets, ingredients.adapter, streams=streams, within=ingredients.within
        )
        base.train_memory(checkpointing=train.gradient_checkpointing)
        metadata = describe(ingredients)
        phase = Phase(
            name="adapter",
            trainables=trainables(adapter, ingredients.learning_rates),
            batches=ingredients.batches,
            objective=DenoisingObjective(base, streams, train.objective),
            steps=train.steps,
            optimizer=train.optimizer,
            schedule=train.schedule,
        )
        return Plan(
            phases=(phase,),
            export=lambda: adapter.state(metadata),
            verify=lambda state: verify(state, base, ingredients.fresh, streams),
            held_out=HeldOutLoss(base, adapter, ingredients.held_out, streams)
            if ingredients.held_out
            else None,
            identity=identity(ingredients),
            facts={"method": self.name, **facts(adapter, ingredients)},
        )


text_to_image = TextToImage()
