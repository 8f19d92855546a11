"""Eyes: what looks at pictures and says how like the concept they are, and whether they show what was asked.

An eye answers with one number a picture, so that means and intervals are computed in one place for all eyes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from scumble.evaluation.asks import Ask
from scumble.evaluation.concept import Concept
from scumble.picturebook import identity, oracle

Values: TypeAlias = NDArray[np.float64]
"""One number a picture, in the pictures' order."""

ENOUGH = 0.6
"""Share of the training pictures that must be seen as one individual, or in one style, to know it is that."""


class Eye(Protocol):
    """Looks at pictures. The first entry of each answer is the one that a checkpoint is chosen by."""

    name: str
    """Who looks, for people."""
    shares: bool
    """Whether `obeys` answers with shares of 0 to 1; else with numbers that only compare with the base's."""

    def learned(self, pictures: Sequence[Image.Image], concept: Concept) -> Mapping[str, Values]:
        """Measure -> how like the concept each picture is; 1 is the same, 0 and below nothing alike."""

    def obeys(self, pictures: Sequence[Image.Image], asks: Sequence[Ask]) -> Mapping[str, Values]:
        """Measure -> how well each picture shows what its prompt asks."""

    def likeness(self, pictures: Sequence[Image.Image], others: Sequence[Image.Image]) -> Values | None:
        """How alike picture and other are, pair by pair, at most 1; None when this eye can't say."""


class PicturebookEye:
    """The embedded base's judges: the oracle for words and styles, `identity` for individuals."""

    name = "the picturebook's oracle"
    shares = True

    def learned(self, pictures: Sequence[Image.Image], concept: Concept) -> Mapping[str, Values]:
        """An individual's or a style's share of being recognised; for anything else the cosine of features."""
        who = individual(concept)
        if who:
            return {f"seen as {who}": np.array([seen.likeness[who] for seen in identity.read(pictures)])}
        style = style_of(concept)
        if style:
            return {f"in {style} style": np.array([float(r.style == style) for r in oracle.read(pictures)])}
        cosine = identity.features(pictures) @ identity.features(concept.pictures).T
        return {"likeness": cosine.mean(1).clamp(min=0).double().numpy()}

    def obeys(self, pictures: Sequence[Image.Image], asks: Sequence[Ask]) -> Mapping[str, Values]:
        """Question -> 1 where the picture shows the word that was asked for.

        What is said of a known subject is read by the oracle; of an individual, by `identity`.
        """
        found: dict[str, Values] = {}
        readings: Sequence[oracle.Reading | identity.Sighting]
        ordinary = any({"subject", "color"} & set(ask.said) for ask in asks)
        readings = oracle.read(pictures) if ordinary else identity.read(pictures)
        questions = dict.fromkeys(question for ask in asks for question in ask.said)
        for question in questions:
            found[question] = np.array(
                [
                    float(getattr(r, question) == ask.said.get(question))
                    for r, ask in zip(readings, asks, strict=True)
                ]
            )
        return found

    def likeness(self, pictures: Sequence[Image.Image], others: Sequence[Image.Image]) -> Values | None:
        """None: its judges look for what they know, not for any likeness."""
        return None


class ModelEye:
    """CLIP, DINO or both, as people have them on their disks, through transformers.

    learned: the mean cosine between a picture's embedding and those of the training pictures (CLIP-I and DINO of
    Ruiz et al., "DreamBooth", 2023, section 4.1); obeys: the cosine between picture and prompt (CLIP-T, there too).
    """

    shares = False

    def __init__(self, clip: str | None = None, dino: str | None = None, *, device: object = "cpu") -> None:
        """Folders, or Hub ids of models in the local cache.

        Raises:
            ModelError: a model isn't on this machine, or is of another kind.
        """
        from scumble.evaluation.vision import Clip, Dino

        self._clip = Clip(clip, device) if clip else None
        self._dino = Dino(dino, device) if dino else None
        self._known: tuple[Concept, dict[str, Values]] | None = None
        self.name = " and ".join(
            f"{word} ({source})" for word, source in (("DINO", dino), ("CLIP", clip)) if source
        )

    def learned(self, pictures: Sequence[Image.Image], concept: Concept) -> Mapping[str, Values]:
        """DINO first: it tells individuals apart where CLIP sees the class."""
        if not concept.pictures:
            return {}
        models = {"DINO": self._dino, "CLIP-I": self._clip}
        if self._known is None or self._known[0] is not concept:
            rows = {word: model.images(concept.pictures) for word, model in models.items() if model}
            self._known = concept, rows
        return {
            word: (model.images(pictures) @ self._known[1][word].T).mean(1)
            for word, model in models.items()
            if model is not None
        }

    def obeys(self, pictures: Sequence[Image.Image], asks: Sequence[Ask]) -> Mapping[str, Values]:
        """CLIP-T, where there is a CLIP."""
        if self._clip is None:
            return {}
        return {
            "CLIP-T": (self._clip.images(pictures) * self._clip.texts([ask.prompt for ask in asks])).sum(1)
        }

    def likeness(self, pictures: Sequence[Image.Image], others: Sequence[Image.Image]) -> Values | None:
        """The cosine by DINO, or by CLIP where there is no DINO."""
        model = self._dino or self._clip
        assert model is not None, "an eye without a model"
        return (model.images(pictures) * model.images(others)).sum(1)


def individual(concept: Concept) -> str:
    """Which of the invented individuals the training pictures show; empty for none."""
    if not concept.pictures:
        return ""
    names = [seen.name for seen in identity.read(concept.pictures)]
    best = max(set(names), key=names.count)
    return best if best != identity.NOBODY and names.count(best) >= ENOUGH * len(names) else ""


def style_of(concept: Concept) -> str:
    """Which of the picturebook's styles the training pictures are drawn in; empty for none and for plain ones."""
    if not concept.pictures:
        return ""
    names = [reading.style for reading in oracle.read(concept.pictures)]
    best = max(set(names), key=names.count)
    return best if best != "plain" and names.count(best) >= ENOUGH * len(names) else ""
