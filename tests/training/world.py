"""A world to train in, small enough for tests: random latents on a tiny base, and a listening sink."""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy
from pathlib import Path
from typing import Any, TypeVar

import torch

from scumble.adapters.lora import LoraSettings
from scumble.data.record import Batch
from scumble.data.settings import DataSettings
from scumble.methods.method import METHODS, Ingredients
from scumble.models import FAMILIES
from scumble.models.family import BaseModel, Conditioning, Frame
from scumble.rng import Streams
from scumble.training.events import Event
from scumble.training.plan import Plan
from scumble.training.settings import TrainSettings

E = TypeVar("E")


class LatentBatches:
    """Batches (see its law in `data.record`) over random latents and one embedding a picture, in memory."""

    def __init__(
        self,
        base: BaseModel,
        batch_size: int = 2,
        samples: int = 6,
        seed: int = 0,
        *,
        cached_text: bool = True,
        poison: dict[int, float] | None = None,
        masks: bool = False,
    ) -> None:
        """`poison`: position -> a number put into that sample's latents. `masks`: each picture has one, of another
        area, the first an empty one."""
        self.batch_size, self.samples, self.seed = batch_size, samples, seed
        self.fingerprint = f"latents-{samples}-{seed}"
        self.poison = poison or {}
        self.captions = [f"picture {n}" for n in range(samples)]
        streams = Streams(seed)
        self.latents = streams.normal("latents", range(samples), (base.latent_channels, 4, 4))
        shown = (base.shown_channels, 4, 4)
        self.shown = streams.normal("shown", range(samples), shown) if base.shown_channels else None
        areas = torch.arange(samples).view(-1, 1, 1, 1) / samples
        inside = streams.normal("masks", range(samples), (1, 4, 4)) < torch.special.ndtri(areas)
        self.masks = inside.float() if masks else None
        self.base = base
        self.text = self.embedded() if cached_text else None

    @torch.no_grad()
    def embedded(self) -> Conditioning:
        """The captions as the text encoder reads them now."""
        return self.base.encode_prompts(self.captions)

    def with_text_embeddings(self) -> LatentBatches:
        """The same order, with embeddings by the text encoder as it is now."""
        other = copy(self)
        other.text = self.embedded()
        return other

    def start(self, number: int, *, process: int = 0, processes: int = 1) -> Iterator[Batch]:
        while True:
            first = (number * processes + process) * self.batch_size
            yield self.batch(list(range(first, first + self.batch_size)))
            number += 1

    def batch(self, positions: list[int]) -> Batch:
        rows = []
        for position in positions:
            order = list(range(self.samples))
            epoch, index = divmod(position, self.samples)
            Streams(self.seed).python("order", epoch).shuffle(order)
            rows.append(order[index])
        latents = self.latents[rows].clone()
        for row, position in enumerate(positions):
            if position in self.poison:
                latents[row, 0, 0, 0] = self.poison[position]
        return Batch(
            latents=latents,
            conditioning=None if self.text is None else self.text[torch.tensor(rows)],
            captions=tuple(self.captions[row] for row in rows),
            frame=Frame.plain(len(rows), 8, 8),
            weight=torch.ones(len(rows)),
            keys=tuple(f"{row}.png" for row in rows),
            positions=tuple(positions),
            shown=None if self.shown is None else self.shown[rows],
            mask=None if self.masks is None else self.masks[rows],
        )


class Listener:
    """A sink that remembers."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.closed = 0

    def handle(self, event: Event) -> None:
        self.events.append(event)

    def close(self) -> None:
        self.closed += 1

    def all(self, kind: type[E]) -> list[E]:
        return [event for event in self.events if isinstance(event, kind)]


def make_plan(
    train: TrainSettings,
    *,
    family: str = "sd1",
    adapter: LoraSettings | None = None,
    held_out: bool = False,
    samples: int = 6,
    poison: dict[int, float] | None = None,
    masks: bool = False,
    targets: str | tuple[str, ...] = "attention",
    method: str = "text-to-image",
    options: dict[str, Any] | None = None,
    draw: Any = lambda *_, **__: Path("class pictures"),
    **others: Any,
) -> tuple[Plan, BaseModel]:
    """A plan of a method that trains on pictures, on a tiny base, and the base. `options`: the method's own."""
    base = FAMILIES.get(family).tiny(0)
    told = METHODS.get(method).settings(**(options or {}))
    cached = isinstance(targets, str) and not getattr(told, "train_text_encoder", False)
    cached = cached and not METHODS.get(method).trains_text
    batches = LatentBatches(base, train.batch, samples, cached_text=cached, poison=poison, masks=masks)
    strangers = LatentBatches(base, 2, 4, seed=9, cached_text=cached)
    ingredients = Ingredients(
        base=base,
        fresh=lambda: FAMILIES.get(family).tiny(0),
        adapter=adapter or LoraSettings(rank=2),
        targets=targets,
        batches=batches,
        train=train,
        streams=Streams(train.seed),
        held_out=[strangers.batch([0, 1]), strangers.batch([2, 3])] if held_out else [],
        options=told,
        data=DataSettings(images="pictures"),
        draw=draw,
        open_batches=lambda data, *, batch_size, text_embeddings: LatentBatches(
            base, batch_size, 5, seed=3, cached_text=text_embeddings
        ),
        **others,
    )
    return METHODS.get(method).plan(ingredients), base


def bytes_of(path: Path | None) -> bytes:
    """The file's bytes."""
    assert path is not None
    return path.read_bytes()
