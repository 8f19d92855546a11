"""Measure: the pictures of base and adapter become four answers: learned, obeys, broke, copied.

Legend: P prompts, S seeds. Every number has an interval over prompts and seeds, and stands beside the base's own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
from PIL import Image

from scumble.evaluation.asks import Ask
from scumble.evaluation.bootstrap import Estimate, estimate, estimate_pairs
from scumble.evaluation.concept import Concept, square
from scumble.evaluation.eyes import Eye, Values

SIDE = 64
"""Pixels: pictures are reduced to this side before they are compared pixel by pixel."""

SUBJECT, CLASS, UNRELATED = "subject", "class", "unrelated"
"""The groups of pictures that are drawn."""


@dataclass(frozen=True)
class Group:
    """P prompts with S pictures each, from the same seeds."""

    asks: Sequence[Ask]
    seeds: Sequence[int]
    pictures: Sequence[Image.Image]
    """Prompt by prompt: the picture of prompt p and seed s is number p * S + s."""

    @property
    def each(self) -> list[Ask]:
        """The ask of each picture."""
        return [ask for ask in self.asks for _ in self.seeds]

    def table(self, values: Values) -> Values:
        """(P * S,) -> (P, S)."""
        return np.asarray(values, dtype=np.float64).reshape(len(self.asks), len(self.seeds))


@dataclass(frozen=True)
class Measured:
    """One number of the adapter's, beside the base's where it has one."""

    section: str
    """learned, obeys, broke or copied."""
    name: str
    adapter: Estimate
    base: Estimate | None = None
    unit: str = "share"
    """"share" (0 to 1), "cosine", or "levels" (root mean square of 0..255)."""
    about: str = ""
    """What it says, in a sentence."""


@dataclass(frozen=True)
class Scores:
    """All that was measured of one adapter file."""

    measures: Sequence[Measured]
    learned: float | None
    """What checkpoints are compared by, each in [0, 1]; None where there is no judge or no picture."""
    obeys: float | None
    kept: float | None
    nearest: Sequence[tuple[int, float]] = ()
    """Of each picture of the subject: the nearest training picture's number, and its distance in levels."""
    drift: Sequence[float] = field(default=())
    """Of each unrelated picture: how far it moved from the base's, in levels."""

    @property
    def overall(self) -> float | None:
        """The harmonic mean of learned, obeys and kept: a checkpoint that fails in one of them is no good."""
        parts = [self.learned, self.obeys, self.kept]
        known = [part for part in parts if part is not None]
        if self.learned is None or len(known) < 2:
            return None
        return 0.0 if min(known) <= 0 else len(known) / sum(1 / part for part in known)

    def of(self, section: str) -> list[Measured]:
        """The measures of a section."""
        return [measured for measured in self.measures if measured.section == section]


def measure(
    base: Mapping[str, Group],
    adapter: Mapping[str, Group],
    concept: Concept,
    eye: Eye | None,
    *,
    resamples: int,
    seed: int = 0,
) -> Scores:
    """Compare the adapter's pictures with the base's of the same prompts and seeds.

    Groups that were not drawn are left out, and so is what needs a judge where `eye` is None.
    """
    interval = partial(estimate, resamples=resamples, seed=seed)
    interval_of_pairs = partial(estimate_pairs, resamples=resamples, seed=seed)
    found: list[Measured] = []

    def both(section: str, name: str, group: str, mine: Values, theirs: Values, **words: str) -> Measured:
        measured = Measured(
            section,
            name,
            interval(adapter[group].table(mine)),
            interval(base[group].table(theirs)),
            **words,
        )
        found.append(measured)
        return measured

    unit = "share" if eye is not None and eye.shares else "cosine"
    learned = obeys = kept = None
    subject, before = adapter[SUBJECT], base[SUBJECT]
    if eye is not None:
        if concept.pictures:
            theirs = eye.learned(before.pictures, concept)
            for name, mine in eye.learned(subject.pictures, concept).items():
                likeness = both("learned", name, SUBJECT, mine, theirs[name], unit=unit)
                learned = max(0.0, likeness.adapter.value) if learned is None else learned
        theirs, asked = eye.obeys(before.pictures, before.each), []
        for name, mine in eye.obeys(subject.pictures, subject.each).items():
            asked.append(both("obeys", name, SUBJECT, mine, theirs[name], unit=unit))
        obeys = _score(asked, eye.shares)
    drift: Values = np.zeros(0)
    if UNRELATED in adapter:
        other, still = adapter[UNRELATED], base[UNRELATED]
        drift = np.array([distance(a, b) for a, b in zip(other.pictures, still.pictures, strict=True)])
        found.append(
            Measured(
                "broke",
                "drift",
                interval(other.table(drift)),
                unit="levels",
                about="how far pictures of unrelated prompts moved from the base's",
            )
        )
        if eye is not None:
            alike = eye.likeness(other.pictures, still.pictures)
            if alike is not None:
                found.append(
                    Measured("broke", "likeness", interval(other.table(alike)), unit="cosine",
                        about="how alike unrelated pictures still are to the base's")
                )  # fmt: skip
            now, then = (eye.obeys(group.pictures, group.each) for group in (other, still))
            if now:
                shown = both(
                    "broke",
                    "unrelated prompts obeyed",
                    UNRELATED,
                    np.mean(list(now.values()), axis=0),
                    np.mean(list(then.values()), axis=0),
                    unit=unit,
                    about="what unrelated pictures still show of what was asked",
                )
                kept = _score([shown], shares=False)
            elif alike is not None:
                kept = max(0.0, float(alike.mean()))
    if CLASS in adapter and len(adapter[CLASS].pictures) > 1:
        found.append(
            Measured(
                "broke",
                "diversity of the class",
                interval_of_pairs(_apart(adapter[CLASS].pictures)),
                interval_of_pairs(_apart(base[CLASS].pictures)),
                unit="levels",
                about=f"how far pictures of {adapter[CLASS].asks[0].prompt!r} are from each other",
            )
        )
        if eye is not None and concept.pictures and not concept.is_style:
            name, mine = next(iter(eye.learned(adapter[CLASS].pictures, concept).items()))
            both(
                "broke",
                f"class {name}",
                CLASS,
                mine,
                eye.learned(base[CLASS].pictures, concept)[name],
                unit=unit,
                about="the class became the subject where this is high",
            )
    nearest: list[tuple[int, float]] = []
    if concept.pictures:
        known = np.stack([_small(picture) for picture in concept.pictures])
        nearest = [_nearest(picture, known) for picture in subject.pictures]
        away = np.array([far for _, far in nearest])
        theirs_away = np.array([_nearest(picture, known)[1] for picture in before.pictures])
        both(
            "copied",
            "distance to the nearest training picture",
            SUBJECT,
            away,
            theirs_away,
            unit="levels",
            about="small is memory, not learning",
        )
        limit = copy_limit(concept.pictures)
        if limit is not None:
            both(
                "copied",
                "copies",
                SUBJECT,
                (away < limit).astype(float),
                (theirs_away < limit).astype(float),
                about=f"pictures within {limit:.0f} levels of a training picture: half of what the training "
                "pictures are apart",
            )
    return Scores(found, learned, obeys, kept, nearest, drift.tolist())


def distance(one: Image.Image, other: Image.Image) -> float:
    """Root mean square of the difference of two pictures, reduced to 64x64, in levels (0..255)."""
    return float(np.sqrt(np.square(_small(one) - _small(other)).mean()))


def nearest_training(picture: Image.Image, training: Sequence[Image.Image]) -> tuple[int, float]:
    """(number, distance) of the training picture that is nearest, as it is or mirrored."""
    return _nearest(picture, np.stack([_small(one) for one in training]))


def _nearest(picture: Image.Image, known: Values, but: int | None = None) -> tuple[int, float]:
    """`known` (N, 64, 64, 3): training pictures, reduced. `but`: the one that is left out."""
    small = _small(picture)
    far = np.minimum(*(np.sqrt(np.square(known - one).mean((1, 2, 3))) for one in (small, small[:, ::-1])))
    if but is not None:
        far[but] = np.inf
    number = int(far.argmin())
    return number, float(far[number])


def copy_limit(training: Sequence[Image.Image]) -> float | None:
    """Half the median distance from a training picture to its nearest neighbour; None for a single picture."""
    if len(training) < 2:
        return None
    known = np.stack([_small(picture) for picture in training])
    apart = [_nearest(one, known, but=n)[1] for n, one in enumerate(training)]
    return float(np.median(apart)) / 2


def _score(measures: Sequence[Measured], shares: bool) -> float | None:
    """The mean of shares; else the mean of what is left of the base's numbers, at most 1."""
    if not measures:
        return None
    if shares:
        return float(np.mean([m.adapter.value for m in measures]))
    parts = [
        min(1.0, max(0.0, m.adapter.value / m.base.value))
        for m in measures
        if m.base is not None and m.base.value > 0
    ]
    return float(np.mean(parts)) if parts else None


def _apart(pictures: Sequence[Image.Image]) -> Values:
    small = np.stack([_small(picture) for picture in pictures])
    return np.array([[np.sqrt(np.square(a - b).mean()) for b in small] for a in small])


def _small(picture: Image.Image) -> Values:
    side = (SIDE, SIDE)
    shown = square(picture).convert("RGB")
    if shown.size != side:
        shown = shown.resize(side, Image.Resampling.BOX if shown.width > SIDE else Image.Resampling.BICUBIC)
    return np.asarray(shown, dtype=np.float64)
