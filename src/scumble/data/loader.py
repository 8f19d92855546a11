"""Loader: records as encoded batches, in an order and a form that are functions of (seed, position) alone.

Which picture, crop, mirroring and caption a visit shows is decided by its position in the run; latents and
text embeddings are then looked up by what they were made from. Nothing is paired by the order in which it was
computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import replace
from functools import cached_property
from itertools import count

import torch
from PIL import Image
from torch import Tensor

from scumble.data import cache as caches
from scumble.data import captions as words
from scumble.data import cuts, holes, masks
from scumble.data.buckets import choose, target_shapes, too_small
from scumble.data.cache import Cache
from scumble.data.images import (
    Geometry,
    Measured,
    Size,
    center,
    cut,
    frame,
    measure,
    mirrored,
    open_upright,
    to_tensor,
)
from scumble.data.order import Order, Visit
from scumble.data.parallel import in_order
from scumble.data.problems import Problem, Refused, raise_all
from scumble.data.record import Batch, Record, Sample
from scumble.data.settings import NOT_SHOWN, DataSettings
from scumble.data.sources import Dataset
from scumble.data.together import ALONE, Together, complete
from scumble.errors import DataError, ModelError
from scumble.models.family import BaseModel, Conditioning
from scumble.models.shortage import telling
from scumble.rng import Streams

Progress = Callable[[int, int, str], None]
"""Told (done, total, what) while pictures and captions are encoded; what is "pictures" or "captions"."""


def no_progress(done: int, total: int, what: str) -> None:
    """Tells nobody."""


_NEEDS_LESS = (
    "Each is encoded alone, so that no smaller batch would help. What needs less: train.precision = "
    '"bf16", train.quantization = "int8", on a GPU train.offload = "blocks" (the denoiser waits in host memory '
    "meanwhile), or a smaller data.resolution. What is encoded already is found again where data.cache is set."
)


class Loader:
    """The `Batches` of a dataset: see their laws in `data.record`.

    Latents are the mean of the encoder's posterior, not samples of it, so that they can be kept.
    Every latent and embedding is computed alone, never in a batch, so that its bits do not depend on its
    neighbours. Batches are on the CPU, in fp32 latents and the text encoder's own dtype.
    """

    def __init__(
        self,
        dataset: Dataset,
        base: BaseModel,
        settings: DataSettings,
        *,
        batch_size: int,
        seed: int,
        text_embeddings: bool = True,
        weights: Sequence[float] | None = None,
        cache: Cache | None = None,
    ) -> None:
        """Reads the size and content hash of every picture; encodes nothing yet (see `prepare`).

        `text_embeddings` False leaves `Batch.conditioning` None, for a text encoder that trains. `weights`:
        the loss weight of each record (default 1). `cache` None opens the one in the settings.

        Raises:
            DataError: the dataset is empty, pictures can't be read or are too small (all are listed), or the
                resolution does not fit the base.
        """
        if not len(dataset):
            raise DataError(f"{dataset.source}: there is no picture to train on.")
        self.batch_size = batch_size
        self.dataset = dataset
        self.settings = settings
        self.cache = cache if cache is not None else Cache(settings.cache)
        self._base = base
        self._streams = Streams(seed)
        self._text_embeddings = text_embeddings
        self._weights = [1.0] * len(dataset) if weights is None else [float(weight) for weight in weights]
        if len(self._weights) != len(dataset):
            raise DataError(f"{len(self._weights)} weights were given for {len(dataset)} pictures.")
        self._measured, self._masks = _measure_all(dataset, settings.workers)
        shapes = target_shapes(settings, resolution=base.resolution, size_multiple=base.size_multiple)
        self._targets = [choose(picture.size, shapes) for picture in self._measured]
        self._refuse_small()
        self._cuts = [
            cuts.bounded(picture, target, settings, self._streams)
            for picture, target in zip(self._measured, self._targets, strict=True)
        ]
        """Of each record, all that may be shown, none mirrored; None when each visit has its own cut."""
        self._image_key = caches.image_encoder_fingerprint(base)
        self._text_key = caches.text_encoder_fingerprint(base) if text_embeddings else ""
        groups: dict[Size, list[int]] = {target: [] for target in sorted(set(self._targets))}
        for index, record in enumerate(dataset.records):
            groups[self._targets[index]] += [index] * record.repeats
        self.groups = {size: tuple(entries) for size, entries in groups.items()}
        """Size -> records of that size, a repeated one several times."""
        self._order = Order(self.groups, batch_size, seed)
        self.samples = sum(map(len, self.groups.values()))

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over pictures, captions, repeats, sizes, weights, and the settings that decide what is
        shown.

        Where the pictures lie, how the files are called, and batch size are not in it.
        """
        pictures = [
            [picture.content, list(record.captions), record.repeats, list(target), weight]
            for picture, record, target, weight in zip(
                self._measured, self.dataset.records, self._targets, self._weights, strict=True
            )
        ]
        shown = self.settings.model_dump(mode="json", exclude=set(NOT_SHOWN))
        return caches.key(pictures, shown, *([self._masks] if any(self._masks) else []))

    @property
    def needs_image_encoder(self) -> bool:
        """Whether the image encoder works during training, after `prepare()`: crops are not bounded, for some
        picture, or the base is shown pictures with a hole of each visit's own."""
        drawn = bool(self._base.shown_channels) and any(
            record.mask is None for record in self.dataset.records
        )
        return drawn or any(found is None for found in self._cuts)

    @property
    def needs_text_encoder(self) -> bool:
        """Whether the text encoder works during training, after `prepare()`: it trains, or tag orders are not
        bounded."""
        return not self._text_embeddings or words.every(("",), self.settings, self._streams) is None

    @property
    def captions(self) -> tuple[str, ...]:
        """All that pictures may be shown with, sorted; empty where tag orders are not bounded."""
        said: set[str] = set()
        for record in self.dataset.records:
            said.update(words.every(record.captions, self.settings, self._streams) or ())
        return tuple(sorted(said))

    # -- what a visit shows ----------------------------------------------------------------------------------

    def sample(self, visit: Visit) -> Sample:
        """What the visit shows, and with which words. Opens nothing."""
        record = self.dataset.records[visit.entry]
        caption = words.spoken(record.captions, self.settings, self._streams, visit.position)
        variant = self.geometry(visit).variant
        return Sample(visit.entry, visit.position, record.key, caption, variant)

    def geometry(self, visit: Visit) -> Geometry:
        """How the visit cuts its picture."""
        found = self._cuts[visit.entry]
        if found is None:
            picture, target = self._measured[visit.entry], self._targets[visit.entry]
            chosen = cuts.anew(picture, target, self._streams, visit.position)
        else:
            chosen = found[self._streams.number("data.crop", visit.position) % len(found)]
        flip = self.settings.random_flip and self._streams.number("data.flip", visit.position) % 2
        return mirrored(chosen) if flip else chosen

    def _variants(self, index: int) -> tuple[Geometry, ...]:
        bounded = self._cuts[index] or ()
        return bounded + (tuple(map(mirrored, bounded)) if self.settings.random_flip else ())

    # -- encoding --------------------------------------------------------------------------------------------

    def prepare(
        self,
        *,
        first: int = 0,
        visits: int | None = None,
        progress: Progress = no_progress,
        together: Together = ALONE,
    ) -> None:
        """Encode what the run shows, so that training takes it from the cache.

        `visits` None encodes every variant; a number only what the samples from position `first` on show,
        over all processes. What is not prepared is encoded when it comes.

        `together`: processes that prepare the same. Each picture and caption is encoded by one of them, once, and
        handed to those who share no disk with it; `progress` tells of this process's part.

        Raises:
            DataError: a picture can't be read any more, or its latents are not finite; the text names it.
        """
        needed, said = self._everything() if visits is None else self._shown(first, visits)
        self._prepare_images(needed, progress, together)
        if not self.needs_text_encoder:
            self._prepare_texts(said, progress, together)
            self._base.release()

    def _everything(self) -> tuple[dict[int, tuple[Geometry, ...]], list[str]]:
        needed = {index: self._variants(index) for index in range(len(self.dataset))}
        return needed, list(self.captions)

    def _shown(self, first: int, visits: int) -> tuple[dict[int, tuple[Geometry, ...]], list[str]]:
        needed: dict[int, dict[str, Geometry]] = {}
        said: set[str] = set()
        last = first + visits
        for number in range(first // self.batch_size, -(-last // self.batch_size)):
            for visit in self._order.batch(number)[1]:
                said.add(self.sample(visit).caption)
                if self._cuts[visit.entry] is not None:
                    geometry = self.geometry(visit)
                    needed.setdefault(visit.entry, {})[geometry.variant] = geometry
        return {index: tuple(found.values()) for index, found in sorted(needed.items())}, sorted(said)

    def _prepare_images(
        self, needed: dict[int, tuple[Geometry, ...]], progress: Progress, together: Together
    ) -> None:
        # pictures of the same bytes have the same key, and are encoded once
        wanted = {
            self._latent_key(index, geometry): (index, geometry)
            for index, geometries in needed.items()
            for geometry in geometries
        }

        def make(names: Sequence[str]) -> None:
            missing: dict[int, list[Geometry]] = {}
            for index, geometry in (wanted[name] for name in names):
                missing.setdefault(index, []).append(geometry)

            def pixels(index: int) -> tuple[int, list[Tensor]]:
                image = self._open(index)
                return index, [self._pixels(image, geometry) for geometry in missing[index]]

            done = 0
            for index, tensors in in_order(pixels, missing, self.settings.workers):
                for geometry, tensor in zip(missing[index], tensors, strict=True):
                    self._keep_latents(index, geometry, tensor)
                    done += 1
                    progress(done, len(names), "pictures")

        abouts = {name: self._about(*where) for name, where in wanted.items()}
        complete(list(wanted), caches.shelf(self.cache, abouts), make, together)

    def _prepare_texts(self, said: Sequence[str], progress: Progress, together: Together) -> None:
        wanted = {self._caption_key(caption): caption for caption in said}

        def make(names: Sequence[str]) -> None:
            for done, name in enumerate(names, 1):
                self._embedding(wanted[name])
                progress(done, len(names), "captions")

        abouts = {name: self._about_text(caption) for name, caption in wanted.items()}
        complete(list(wanted), caches.shelf(self.cache, abouts), make, together)

    def _open(self, index: int) -> Image.Image:
        record = self.dataset.records[index]
        image = open_upright(record)
        if measure(record) != self._measured[index]:  # else its pixels would be kept under another's name
            raise DataError(f"{record.key} changed since it was first read. Start again.")
        return image

    def _pixels(self, image: Image.Image, geometry: Geometry) -> Tensor:
        return to_tensor(cut(image, geometry, self.settings.interpolation))

    def _latent_key(self, index: int, geometry: Geometry) -> str:
        resize = self.settings.interpolation
        return caches.key("latents", self._measured[index].content, geometry.variant, resize, self._image_key)

    def _caption_key(self, caption: str) -> str:
        return caches.key("text", caption, self._text_key)

    def _encode(self, index: int, pixels: Tensor, hole: Tensor | None = None) -> Tensor:
        """Latents of a cut of a picture; with a hole, what the base is shown of it."""
        key, device = self.dataset.records[index].key, self._base.device
        height, width = pixels.shape[-2:]
        rows = pixels[None].to(device)
        try:
            with telling(f"{key} was encoded at {width}x{height} pixels", _NEEDS_LESS), torch.no_grad():
                found = (
                    self._base.encode_images(rows, None)
                    if hole is None
                    else self._base.show(rows, hole[None].to(device))
                )
        except ModelError as error:  # the base knows rows, not names
            raise DataError(f"{key}: {error}") from error
        latents = found[0].to("cpu", torch.float32)
        caches.finite_or_name(latents, key, self._base.dtype_of("vae"))
        return latents

    def _keep_latents(self, index: int, geometry: Geometry, pixels: Tensor) -> Tensor:
        latents = self._encode(index, pixels)
        about = self._about(index, geometry)
        self.cache.put(self._latent_key(index, geometry), {"latents": latents}, about=about)
        return latents

    def _about(self, index: int, geometry: Geometry) -> str:
        return f"latents of {self.dataset.records[index].key}, {geometry.variant}, by {self._base.name}"

    def _about_text(self, caption: str) -> str:
        return f"text embedding of {caption!r}, by {self._base.name}"

    def _latents(self, visit: Visit) -> Tensor:
        index, geometry = visit.entry, self.geometry(visit)
        if self._cuts[index] is None:
            return self._encode(index, self._pixels(self._open(index), geometry))
        found = self.cache.get(self._latent_key(index, geometry))
        if found is not None:
            return found["latents"]
        return self._keep_latents(index, geometry, self._pixels(self._open(index), geometry))

    def _mask(self, visit: Visit) -> Tensor | None:
        index, geometry = visit.entry, self.geometry(visit)
        record = self.dataset.records[index]
        if record.mask is None:
            return None
        name = caches.key("mask on black", self._masks[index], geometry.variant, self._base.latent_factor)
        bounded = self._cuts[index] is not None
        if bounded and (found := self.cache.get(name)) is not None:
            return found["mask"]
        self._refuse_changed_mask(index)
        mask = masks.weights(masks.opened(record.mask), geometry, self._base.latent_factor)
        if bounded:
            self.cache.put(name, {"mask": mask}, about=f"{record.mask.key}, {geometry.variant}")
        return mask

    def _shown_beside(self, visit: Visit) -> Tensor | None:
        """(K, h, w) of a base that is shown pictures with holes: the hole is the picture's mask, else one of the
        visit's own."""
        if not self._base.shown_channels:
            return None
        index, geometry = visit.entry, self.geometry(visit)
        mask = self.dataset.records[index].mask
        kept = mask is not None and self._cuts[index] is not None
        name = caches.key("shown, mask on black", self._latent_key(index, geometry), self._masks[index])
        if kept and (found := self.cache.get(name)) is not None:
            return found["shown"]
        if mask is None:
            hole = holes.random(geometry.target, self._streams, visit.position)
        else:
            self._refuse_changed_mask(index)
            hole = masks.weights(masks.opened(mask), geometry, 1)
        shown = self._encode(index, self._pixels(self._open(index), geometry), hole)
        if kept:
            about = (
                f"{self.dataset.records[index].key} with its hole, {geometry.variant}, by {self._base.name}"
            )
            self.cache.put(name, {"shown": shown}, about=about)
        return shown

    def _refuse_changed_mask(self, index: int) -> None:
        record = self.dataset.records[index]
        if masks.measured(record, self._measured[index]) != self._masks[index]:
            assert record.mask is not None
            raise DataError(f"{record.mask.key} changed since it was first read. Start again.")

    def _embedding(self, caption: str) -> Conditioning:
        name = self._caption_key(caption)
        found = self.cache.get(name)
        if found is not None:
            return caches.to_conditioning(found)
        with telling(f"the caption {caption!r} was encoded", _NEEDS_LESS), torch.no_grad():
            conditioning = self._base.encode_prompts([caption]).to("cpu")
        for tensor in caches.to_tensors(conditioning).values():
            caches.finite_or_name(tensor, f"caption {caption!r}", tensor.dtype)
        # where tag orders are not bounded, a folder would grow without end
        if not self.needs_text_encoder:
            self.cache.put(name, caches.to_tensors(conditioning), about=self._about_text(caption))
        return conditioning

    # -- batches ---------------------------------------------------------------------------------------------

    def start(self, number: int, *, process: int = 0, processes: int = 1) -> Iterator[Batch]:
        """Micro-batches of this process from its `number`-th on: its m-th is the run's m * processes +
        process."""
        for mine in count(number):
            yield self.batch(mine * processes + process)

    def batch(self, number: int) -> Batch:
        """The `number`-th micro-batch of the run, over all processes."""
        return self._batch(self._order.batch(number)[1])

    def _batch(self, visits: Sequence[Visit]) -> Batch:
        samples = [self.sample(visit) for visit in visits]
        captions = tuple(sample.caption for sample in samples)
        conditioning = None
        if self._text_embeddings:
            conditioning = Conditioning.cat([self._embedding(caption) for caption in captions])
        counts = [mask for visit in visits if (mask := self._mask(visit)) is not None]
        shown = [one for visit in visits if (one := self._shown_beside(visit)) is not None]
        return Batch(
            latents=torch.stack([self._latents(visit) for visit in visits]),
            mask=torch.stack(counts) if counts else None,
            shown=torch.stack(shown) if shown else None,
            conditioning=conditioning,
            captions=captions,
            frame=frame([self.geometry(visit) for visit in visits]),
            weight=torch.tensor([self._weights[visit.entry] for visit in visits]),
            keys=tuple(sample.key for sample in samples),
            positions=tuple(visit.position for visit in visits),
        )

    def with_text_embeddings(self) -> Loader:
        """The same order, whose batches carry embeddings by the text encoder as it is now, adapters included: for
        what is trained after the text encoder came to rest."""
        other = copy(self)
        other._text_embeddings = True
        other._text_key = caches.text_encoder_fingerprint(self._base)
        return other

    def once(self, batch_size: int | None = None) -> Iterator[Batch]:
        """Every picture once, group by group; positions are the indices of the records. The last batch of a
        group may be smaller."""
        step = batch_size or self.batch_size
        for entries in self.groups.values():
            each = sorted(set(entries))
            for first in range(0, len(each), step):
                yield self._batch([Visit(index, index) for index in each[first : first + step]])

    # -- before ----------------------------------------------------------------------------------------------

    def _refuse_small(self) -> None:
        if self.settings.allow_upscale:
            return
        problems = []
        for record, picture, target in zip(self.dataset.records, self._measured, self._targets, strict=True):
            scale = center(picture.size, target).scale
            if scale > 1:
                problems.append(Problem("too small", record.key, too_small(picture.size, target, scale)))
        raise_all(problems, self.dataset.source)


def _measure_all(dataset: Dataset, workers: int) -> tuple[list[Measured], list[str]]:
    """Content and size of every picture, and the content of its mask, "" where it has none."""

    def one(record: Record) -> tuple[Measured, str] | Refused:
        try:
            picture = measure(record)
            return picture, masks.measured(record, picture)
        except Refused as error:
            return error

    found = list(in_order(one, dataset.records, workers))
    problems = [
        Problem(result.kind, record.key, str(result).removeprefix(f"{record.key}: "))
        for record, result in zip(dataset.records, found, strict=True)
        if isinstance(result, Refused)
    ]
    raise_all(problems, dataset.source)
    good = [result for result in found if not isinstance(result, Refused)]
    return [picture for picture, _ in good], [mask for _, mask in good]


def still(settings: DataSettings) -> DataSettings:
    """The same settings without anything that differs from visit to visit: for held-out pictures."""
    changes = {
        "center_crop": True,
        "random_flip": False,
        "shuffle_tags": False,
        "keep_tags": 0,
        "caption_dropout": 0.0,
        "templates": settings.templates[:1],
    }
    return settings.model_copy(update=changes)


def still_batches(
    dataset: Dataset,
    base: BaseModel,
    settings: DataSettings,
    *,
    batch_size: int,
    text_embeddings: bool = True,
    cache: Cache | None = None,
    progress: Progress = no_progress,
    together: Together = ALONE,
) -> list[Batch]:
    """Every picture once, cut in the middle, with its first caption in the first template: for the held-out
    loss. `text_embeddings` as in `Loader`, `together` as in its `prepare`.

    Raises:
        DataError: as `Loader`.
    """
    first = replace(dataset, records=tuple(replace(r, captions=r.captions[:1]) for r in dataset.records))
    loader = Loader(
        first,
        base,
        still(settings),
        batch_size=batch_size,
        seed=0,
        text_embeddings=text_embeddings,
        cache=cache,
    )
    loader.prepare(progress=progress, together=together)
    return list(loader.once())
