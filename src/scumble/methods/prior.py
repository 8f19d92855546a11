"""The prior: while a subject is learned, its class is kept as the base knows it.

Source: Ruiz et al. 2023, "DreamBooth: Fine Tuning Text-to-Image Diffusion Models for Subject-Driven Generation",
equation 2: mean(instance) + lambda * mean(prior). The prior's half is taught by class pictures, as in the paper, or
without any picture by what the base answers to the class prompt where the adapter is off. There the class prompt
should say all that a caption says but the subject, or an adapter learns to tell the two by the rest of the caption, and
changes whatever else is not the class prompt (docs/methods.md).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, cast

from pydantic import AfterValidator, Field, model_validator

from scumble.data.captions import to_check
from scumble.data.images import open_upright
from scumble.data.parallel import in_order
from scumble.data.problems import Problem, Refused
from scumble.data.record import Record
from scumble.data.settings import DataSettings, PathText
from scumble.data.sources import look, open_dataset, pictures_in
from scumble.data.woven import Embeddable, Woven
from scumble.errors import DataError
from scumble.methods.method import Ingredients
from scumble.methods.prior_prediction import PriorPrediction, readings
from scumble.models.text import Words
from scumble.rng import Streams
from scumble.settings import Settings
from scumble.training.objective import DenoisingObjective

if TYPE_CHECKING:
    from scumble.adapters.adapter import Adapter
    from scumble.data.record import Batches
    from scumble.models.family import Conditioning

CLASS_COUNT = 100
"""Class pictures that are drawn where neither a number nor a folder is given."""
_DRAWN = ("class_count", "class_images", "class_seed", "class_steps", "class_guidance", "class_batch")
"""Settings that only class pictures have."""


def _not_blank(prompt: str) -> str:
    if not prompt.strip():
        raise ValueError("the prompt is blank. Write one, or leave the setting out.")
    return prompt


Prompt = Annotated[str, AfterValidator(_not_blank)]
"""A prompt that says something."""


class PriorSettings(Settings):
    """How the class of a subject is kept."""

    class_prompt: Prompt | None = None
    """The same without the rare word: "a photo of a dog". Where `subject` is given: what stands in its place, "dog"."""
    subject: Prompt | None = None
    """What captions call the subject: "sks dog". With prior = "prediction", class_prompt then stands in its place,
    caption by caption: "sks dog on a beach" is held to what the base makes of "dog on a beach". Unset: class_prompt is
    the whole prompt, whatever a caption says."""
    prior: Literal["none", "images", "prediction"] = "none"
    """How the class is kept. "images": class pictures train beside the subject's. "prediction": no class picture; the
    adapter is held to what the bare base answers to the class prompt; drop some captions beside it
    (data.caption_dropout = 0.1), or guidance may burn the subject's colours. "none": it is not."""
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
    def _prior_has_an_effect(self) -> PriorSettings:
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
        if self.subject is not None and self.prior != "prediction":
            raise ValueError(
                f'subject = {self.subject!r} has no effect with prior = "{self.prior}": captions are changed for '
                'prior = "prediction" alone. Set that, or remove the setting.'
            )
        if (
            self.subject is not None
            and self.class_prompt is not None
            and _says(self.class_prompt, self.subject)
        ):
            raise ValueError(
                f"class_prompt = {self.class_prompt!r} says the subject, {self.subject!r}: the class would be held to "
                'what the subject becomes. Give what stands in its place, e.g. class_prompt = "dog" for subject = '
                '"sks dog".'
            )
        if self.prior == "images" and self.class_prompt is None and self.class_images is None:
            raise ValueError(
                'prior = "images" needs class pictures, or a class_prompt that the base can draw them from. '
                'Give class_images = "folder/", or class_prompt = "a photo of a dog".'
            )
        return self

    def class_caption(self, caption: str) -> str:
        """The prompt that the prior asks, where a picture is asked for with `caption`: `class_prompt` in the subject's
        place, or alone where there is none, as in a caption that was dropped for guidance."""
        said = self.class_prompt or ""
        if self.subject is None or not _says(caption, self.subject):
            return said
        return _as_words(self.subject).sub(lambda _: said, caption)


def _says(caption: str, phrase: str) -> bool:
    return _as_words(phrase).search(caption) is not None


def _as_words(phrase: str) -> re.Pattern[str]:
    """`phrase` as whole words, in capitals or not."""
    return re.compile(rf"(?<!\w){re.escape(phrase.strip())}(?!\w)", re.IGNORECASE)


class Prior:
    """The prior of one run: what it puts beside the subject's pictures, and into the loss."""

    def __init__(self, ingredients: Ingredients, options: PriorSettings, *, text_embeddings: bool) -> None:
        """To be made before the base is adapted: it draws the class pictures that are missing, and reads the class
        prompt. `text_embeddings`: whether the class pictures bring their captions as embeddings.
        """
        self._ingredients, self._options = ingredients, options
        self._beside: Batches | None = None
        self._kept: Mapping[str, Conditioning] = {}
        self.told: dict[str, object] = {"prior": options.prior}
        """What a person is told before the start."""
        if options.prior == "images":
            self._beside = _class_batches(ingredients, options, text_embeddings)
            if self._beside is not None:
                self.told["class pictures"] = self._beside.samples
        elif options.prior == "prediction":
            captions = ingredients.captions() if options.subject is not None else ()
            prompts = _class_captions(options, captions or [""])
            self._kept = readings(ingredients.base, prompts)

    def beside(self, batches: Batches) -> Batches:
        """The subject's batches, with class pictures in turn where there are some."""
        if self._beside is None:
            return batches
        first, second = cast(Embeddable, batches), cast(Embeddable, self._beside)
        return Woven(first, second, weight=self._options.prior_weight)

    def objective(self, adapter: Adapter, among: Sequence[str] | None) -> DenoisingObjective:
        """The loss of a phase in which the roots `among` may train; None is all."""
        base, settings = self._ingredients.base, self._ingredients.train.objective
        if not self._kept:
            return DenoisingObjective(base, self._ingredients.streams, settings, among=among)
        return PriorPrediction(
            base,
            adapter,
            self._ingredients.streams,
            settings,
            prompt=self._options.class_caption,
            kept=self._kept,
            weight=self._options.prior_weight,
            among=among,
        )


def _class_captions(options: PriorSettings, captions: Iterable[str]) -> list[str]:
    """The distinct prompts that the prior asks for `captions`."""
    return sorted({options.class_caption(caption) for caption in captions})


def check_prior(
    options: PriorSettings, data: DataSettings | None, section: str, words: Sequence[Words]
) -> Iterable[Problem]:
    """What is wrong with the class pictures, or with the captions that the class is to be asked by; told before
    anything is drawn. Decodes the class pictures that are there. `section`: of the settings."""
    if options.subject is not None and data is not None:
        yield from _without_subject(options, data, section, words)
    if options.prior == "prediction" and data is not None and not data.caption_dropout:
        text = (
            'is 0 with prior = "prediction": what the class prompts hold in place, the empty prompt keeps too, and '
            "guidance, which draws away from it, may burn the subject's colours. Set 0.1, or draw with less guidance."
        )
        yield Problem("no caption dropped", "data.caption_dropout", text, error=False)
    if options.prior != "images":
        return
    if data is not None and data.buckets:
        text = (
            'trains pictures in several shapes, and prior = "images" pairs each with a class picture of the same '
            'shape. Set buckets = false, or prior = "prediction", which needs no class pictures.'
        )
        yield Problem("buckets", "data.buckets", text)
    if options.class_images is None:
        return
    place = Path(options.class_images).expanduser()
    if data is not None and place.resolve() == Path(data.images).expanduser().resolve():
        text = (
            "is data.images too: the subject would be kept as its own class. Name a folder with other members of the "
            "class, or leave class_images out and the base draws them from class_prompt."
        )
        yield Problem("class pictures", options.class_images, text)
        return
    if place.exists() and not place.is_dir():
        yield Problem("class pictures", options.class_images, "is a file, not a folder.")
        return
    if options.class_prompt is None:
        found = len(pictures_in(place)) if place.is_dir() else 0
        if found < (options.class_count or 1):
            text = (
                f"holds {found} pictures, class_count asks for {options.class_count or 1}, and without a "
                "class_prompt the base can't draw the missing ones. Add pictures, lower class_count, or give "
                "class_prompt."
            )
            yield Problem("class pictures", options.class_images, text)
            return
    if data is not None and place.is_dir() and pictures_in(place):
        yield from _unusable(class_data(options, data, options.class_images))


def _without_subject(
    options: PriorSettings, data: DataSettings, section: str, words: Sequence[Words]
) -> Iterable[Problem]:
    """Captions in which nothing stands for the class, and class captions that are cut off."""
    assert options.subject is not None
    records = open_dataset(data, seed=0).records
    without = [one for one in records if not any(_says(said, options.subject) for said in one.captions)]
    if records and len(without) == len(records):
        text = (
            f"no caption says {options.subject!r}, so that every one would be held to {options.class_prompt!r} alone. "
            f"The first is {records[0].captions[0][:80]!r}. Give what captions call the subject."
        )
        yield Problem("no subject", f"{section}.subject", text)
        return
    if without:
        text = (
            f"{len(without)} of {len(records)} captions do not say {options.subject!r}, first that of "
            f"{without[0].key}: they are held to {options.class_prompt!r} alone."
        )
        yield Problem("no subject", f"{section}.subject", text, error=False)
    said = (to_check(one.captions, data, Streams(0)) for one in records)
    for prompt in _class_captions(options, chain.from_iterable(said)):
        cut = [*too_long(f"{section}.class_prompt", prompt, words, error=False)]
        yield from cut
        if cut:
            return


def _unusable(shown: DataSettings) -> Iterable[Problem]:
    """Class pictures that can't be trained on, each with its folder; the base may still draw more beside the others."""
    try:
        dataset = look(shown)
    except DataError as error:
        advice = "" if shown.caption else " Or set class_prompt: one prompt for all class pictures."
        yield Problem("class pictures", shown.images, f"{error}{advice}")
        return

    def opened(record: Record) -> Problem | None:
        try:
            open_upright(record)
        except Refused as error:
            return Problem(error.kind, record.key, str(error).removeprefix(f"{record.key}: "))
        return None

    for problem in (*dataset.problems, *in_order(opened, dataset.records, shown.workers)):
        if problem is not None and problem.error:
            yield replace(problem, key=str(Path(shown.images, problem.key)))


def too_long(
    place: str, prompt: str | None, words: Sequence[Words], *, error: bool = True
) -> Iterable[Problem]:
    """A prompt that the base would not read to the end, with what is cut off. `place`: the setting's name."""
    cut = [lost for one in words for lost in one.truncated([prompt] if prompt else [])]
    if cut:
        worst = max(cut, key=lambda lost: len(lost.lost))
        text = (
            f"has {worst.tokens} tokens and the base reads {worst.limit}. This would be cut off: {worst.lost!r}. "
            "Shorten the prompt."
        )
        yield Problem("long prompt", place, text, error=error)


def class_data(options: PriorSettings, data: DataSettings, folder: Path | str) -> DataSettings:
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


def _class_batches(ingredients: Ingredients, options: PriorSettings, text_embeddings: bool) -> Batches | None:
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
        text_embeddings=text_embeddings,
    )
