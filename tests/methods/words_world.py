"""A world to teach words in: batches whose captions contain them, on a tiny base."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from scumble.adapters.lora import LoraSettings
from scumble.data.record import Batch
from scumble.methods.method import METHODS, Ingredients
from scumble.models import FAMILIES
from scumble.models.family import BaseModel
from scumble.rng import Streams
from scumble.training.plan import Plan
from scumble.training.settings import TrainSettings
from tests.training.world import LatentBatches


class WordBatches(LatentBatches):
    """Latents whose captions say `word`."""

    def __init__(
        self, base: BaseModel, batch_size: int, samples: int = 7, seed: int = 0, word: str = "<fox>"
    ) -> None:
        super().__init__(base, batch_size, samples, seed, cached_text=False)
        self.captions = [f"{word} number {n}" for n in range(samples)]


def words_plan(
    method: str,
    train: TrainSettings,
    *,
    family: str = "sd1",
    word: str = "<fox>",
    held_out: bool = False,
    targets: str | tuple[str, ...] = "attention",
    adapter: LoraSettings | None = None,
    ingredients: Mapping[str, Any] | None = None,
    **options: Any,
) -> tuple[Plan, BaseModel]:
    """A plan of a method that teaches words, on a tiny base, and the base. `ingredients`: more of them."""
    base = FAMILIES.get(family).tiny(0)
    found = METHODS.get(method)
    strangers = WordBatches(base, 2, 4, seed=9, word=word)
    pictures: list[Batch] = [strangers.batch([0, 1]), strangers.batch([2, 3])] if held_out else []
    given = Ingredients(
        base=base,
        fresh=lambda: FAMILIES.get(family).tiny(0),
        adapter=adapter or LoraSettings(rank=2),
        targets=targets,
        batches=WordBatches(base, train.batch, word=word),
        train=train,
        streams=Streams(train.seed),
        held_out=pictures,
        options=found.settings.model_validate({"placeholders": (word,), **options}),
        **(ingredients or {}),
    )
    return found.plan(given), base
