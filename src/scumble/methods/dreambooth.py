"""DreamBooth: a few pictures of one subject, a rare word for it, and its class kept as the base knows it.

Source: Ruiz et al. 2023, "DreamBooth: Fine Tuning Text-to-Image Diffusion Models for Subject-Driven Generation",
equation 2: mean(instance) + lambda * mean(prior). The prior's half is taught by class pictures, as in the paper, or
without any picture by what the base answers to the class prompt where the adapter is off.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

import torch
from pydantic import Field, model_validator
from torch import Tensor

from scumble.data.problems import Problem
from scumble.data.settings import DataSettings, PathText
from scumble.data.sources import pictures_in
from scumble.data.woven import Embeddable, Woven
from scumble.errors import ConfigError
from scumble.methods.method import Ingredients
from scumble.methods.parts import injected, planned
from scumble.methods.text_encoder import TextEncoderSettings, phases, text_roots, texts_of, with_text_encoder
from scumble.models.text import Words
from scumble.rng import Streams
from scumble.settings import Settings
from scumble.training.objective import (
    DenoisingObjective,
    ObjectiveSettings,
    compared,
    denoising_loss,
    with_guidance,
)
from scumble.training.plan import Plan

if TYPE_CHECKING:
    from scumble.adapters.adapter import Adapter
    from scumble.data.record import Batch, Batches
    from scumble.models.family import BaseModel, Conditioning

CLASS_COUNT = 100
"""Class pictures that are drawn where neither a number nor a folder is given."""
_DRAWN = ("class_count", "class_images", "class_seed", "class_steps", "class_guidance", "class_batch")
"""Settings that only class pictures have."""


class DreamBoothSettings(TextEncoderSettings):
    """What the subject is called, and how its class is kept."""

    instance_prompt: str | None = Field(None, min_length=1)
    """The caption of every picture, with a rare word for the subject: "a photo of sks dog". Unset: the dataset's own
    captions."""
    class_prompt: str | None = Field(None, min_length=1)
    """The same without the rare word: "a photo of a dog"."""
    prior: Literal["none", "images", "prediction"] = "none"
    """How the class is kept. "images": class pictures train beside the subject's. "prediction": no class picture; the
    adapter is held to what the bare base answers to the class prompt. "none": it is not."""
    prior_weight: float = Field(1.0, gt=0)
    """Lambda: how much the prior counts beside the subject."""
    class_images: PathText | None = None
    """Folder of class pictures. Where class_prompt is given, it is their caption, and the base draws those that are
    missing into this folder. Unset: the base draws all, into the cache."""
    class_count: int | None = Field(None, ge=1)
    """Class pictures, at least. Unset: as many as there are in class_images, or else 100."""
    class_seed: int = Field(0, ge=0, lt=2**63)
    """Seed of the first class picture that is drawn; the n-th uses class_seed + n."""
    class_steps: int = Field(25, ge=1)
    """Denoising steps of a drawn class picture."""
    class_guidance: float | None = Field(None, ge=0)
    """Classifier-free guidance of a drawn class picture. Unset: the base's own, usually 7.5."""
    class_batch: int = Field(4, ge=1)
    """Class pictures drawn at once."""

    @model_validator(mode="after")
    def _settings_have_an_effect(self) -> DreamBoothSettings:
        if self.prior != "images":
            # run.toml writes every setting out, those that nobody touched too
            usual = {name: type(self).model_fields[name].default for name in _DRAWN}
            idle = [name for name in _DRAWN if getattr(self, name) != usual[name]]
            if idle:
                raise ValueError(
                    f'{", ".join(idle)}: class pictures have no effect with prior = "{self.prior}". '
                    'Set prior = "images", or remove the setting.'
                )
        if self.prior == "none" and "prior_weight" in self.model_fields_set and self.prior_weight != 1:
            raise ValueError(
                f'prior_weight = {self.prior_weight:g} has no effect with prior = "none". '
                'Set prior = "images" or prior = "prediction".'
            )
        if self.prior == "prediction" and self.class_prompt is None:
            raise ValueError(
                'prior = "prediction" compares what adapter and base answer to the class prompt, and class_prompt is '
                'not set. Give it, e.g. class_prompt = "a photo of a dog".'
            )
        if self.prior == "images" and self.class_prompt is None and self.class_images is None:
            raise ValueError(
                'prior = "images" needs class pictures, or a class_prompt that the base can draw them from. '
                'Give class_images = "folder/", or class_prompt = "a photo of a dog".'
            )
        return self

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


def class_data(options: DreamBoothSettings, data: DataSettings, folder: Path | str) -> DataSettings:
    """How the class pictures in `folder` are shown: in the form of the subject's, every one, with the class prompt, or
    where there is none with captions of their own."""
    own = DataSettings(images=str(folder))
    plain = ["split", "dataset_config", "max_samples", "held_out", "repeats", "masks", "templates"]
    plain += ["shuffle_tags", "keep_tags", "allow_upscale"]
    return data.model_copy(
        update={
            "images": own.images,
            "caption": options.class_prompt,
            **{name: getattr(own, name) for name in plain},
        }
    )


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
        problems = [*_too_long(options, words), *_without_identifier(options)]
        if options.prior != "images":
            return problems
        if data is not None and data.buckets:
            text = (
                'trains pictures in several shapes, and prior = "images" pairs each with a class picture of the same '
                'shape. Set buckets = false, or prior = "prediction", which needs no class pictures.'
            )
            problems.append(Problem("buckets", "data.buckets", text))
        if options.class_images is None:
            return problems
        place = Path(options.class_images).expanduser()
        if place.exists() and not place.is_dir():
            problems.append(Problem("class pictures", options.class_images, "is a file, not a folder."))
        elif options.class_prompt is None:
            found = len(pictures_in(place)) if place.is_dir() else 0
            if found < (options.class_count or 1):
                text = (
                    f"holds {found} pictures, class_count asks for {options.class_count or 1}, and without a "
                    "class_prompt the base can't draw the missing ones. Add pictures, lower class_count, or give "
                    "class_prompt."
                )
                problems.append(Problem("class pictures", options.class_images, text))
        return problems

    def plan(self, ingredients: Ingredients) -> Plan:
        """See `Method`. Draws the missing class pictures first."""
        options = ingredients.options
        options = options if isinstance(options, DreamBoothSettings) else DreamBoothSettings()
        ingredients = with_text_encoder(ingredients, options)
        base, train, streams = ingredients.base, ingredients.train, ingredients.streams
        batches = ingredients.pictures
        told: dict[str, object] = {"method": self.name, "prior": options.prior}
        if options.prior == "images" and (beside := _class_batches(ingredients, options)) is not None:
            batches = Woven(cast(Embeddable, batches), cast(Embeddable, beside), weight=options.prior_weight)
            told["class pictures"] = beside.samples
        kept: Conditioning | None = None
        if options.prior == "prediction":
            with torch.no_grad():
                kept = base.encode_prompts([options.class_prompt or ""])
        adapter = injected(ingredients)

        def objective(among: Sequence[str] | None) -> DenoisingObjective:
            if kept is None:
                return DenoisingObjective(base, streams, train.objective, among=among)
            return PriorPrediction(
                base,
                adapter,
                streams,
                train.objective,
                prompt=options.class_prompt or "",
                kept=kept,
                weight=options.prior_weight,
                among=among,
            )

        return planned(ingredients, adapter, phases(ingredients, options, adapter, batches, objective), told)


def _too_long(options: DreamBoothSettings, words: Sequence[Words]) -> Iterable[Problem]:
    """Prompts that the base would not read to the end, each with what is cut off."""
    for name in ("instance_prompt", "class_prompt"):
        prompt = getattr(options, name)
        cut = [lost for one in words for lost in one.truncated([prompt] if prompt else [])]
        if cut:
            worst = max(cut, key=lambda lost: len(lost.lost))
            text = (
                f"has {worst.tokens} tokens and the base reads {worst.limit}. This would be cut off: {worst.lost!r}. "
                "Shorten the prompt."
            )
            yield Problem("long prompt", f"dreambooth.{name}", text)


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


def _class_batches(ingredients: Ingredients, options: DreamBoothSettings) -> Batches | None:
    """Class pictures in the form of the subject's, the missing ones drawn; None where nothing may be drawn."""
    data, place = ingredients.data, options.class_images
    assert data is not None and ingredients.open_batches is not None
    folder = None if place is None else Path(place).expanduser()
    if options.class_prompt is not None:
        if ingredients.draw is None:
            return None
        there = len(pictures_in(folder)) if folder is not None and folder.is_dir() else 0
        folder = ingredients.draw(
            options.class_prompt,
            options.class_count or there or CLASS_COUNT,
            folder=folder,
            seed=options.class_seed,
            steps=options.class_steps,
            guidance=options.class_guidance,
            side=data.resolution,
            batch=options.class_batch,
        )
    assert folder is not None
    return ingredients.open_batches(
        class_data(options, data, folder),
        batch_size=ingredients.pictures.batch_size,
        text_embeddings=not texts_of(ingredients),
    )


class PriorPrediction(DenoisingObjective):
    """The denoising loss, and beside it how far the adapter moves what the base answers to the class prompt.

    A row's loss is instance + weight * prior, so that the mean over rows is mean(instance) + weight * mean(prior). The
    prior compares two answers at the row's own noisy latents x_t: the adapter's, and as its target the bare base's.
    It is measured as the instance's loss is (huber, min-SNR), over the whole picture: masks and the weights of samples
    are about the subject.
    """

    def __init__(
        self,
        base: BaseModel,
        adapter: Adapter,
        streams: Streams,
        settings: ObjectiveSettings | None = None,
        *,
        prompt: str,
        kept: Conditioning,
        weight: float,
        among: Collection[str] | None = None,
    ) -> None:
        """`kept`: the class prompt as the bare base reads it, one row; `weight`: lambda."""
        super().__init__(base, streams, settings, among=among)
        self.adapter, self.prompt, self.kept, self.weight = adapter, prompt, kept, weight
        touched = {path.partition(".")[0] for path in adapter.deltas}
        self.texts = touched & set(text_roots(base))
        """Text encoders that the adapter changes: the class prompt is read anew at each step."""

    def forward(self, batch: Batch) -> Tensor:
        """See `DenoisingObjective`."""
        device = next(self.base.denoiser.parameters()).device
        noise = self.noise(batch.positions, batch.latents.shape[1:]).to(device)
        t = self.timesteps(batch.positions, batch.latents.shape).to(device)
        instance = denoising_loss(self.base, batch, noise, t, self.settings)
        return instance + self.weight * self._prior(batch, noise, t)

    def _prior(self, batch: Batch, noise: Tensor, t: Tensor) -> Tensor:
        """(B,) losses between the adapter's answers to the class prompt and the base's."""
        base, count = self.base, len(batch)
        x0 = batch.latents.to(noise.device, non_blocking=True)
        noisy = base.prediction.noisy(x0, noise, t).to(base.dtype)

        def answer(said: Conditioning) -> Tensor:
            rows = said.map(lambda one: one.expand(count, *one.shape[1:]))
            rows = replace(rows, shown=batch.shown).to(noise.device, base.dtype)
            return base.denoise(noisy, t, with_guidance(rows, self.settings), batch.frame)

        mine = answer(self._read())
        with torch.no_grad(), self.adapter.disabled():
            theirs = answer(self.kept)
        return compared(mine, theirs, None, base.prediction, t, self.settings)

    def _read(self) -> Conditioning:
        """The class prompt as the adapter reads it, one row."""
        if not self.texts:
            return self.kept
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.texts.isdisjoint(self.roots)):
            return self.base.encode_prompts([self.prompt])


dreambooth = DreamBooth()
