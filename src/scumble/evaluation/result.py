"""Result: what an evaluation was told and found, as values, and as the JSON that is written of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from scumble.evaluation.asks import Ask
from scumble.evaluation.concept import Concept
from scumble.evaluation.measure import Scores
from scumble.settings import Settings

NUMBERS, PAGE = "evaluation.json", "evaluation.html"


class EvaluationSettings(Settings):
    """How much is drawn, and how."""

    pictures: int = Field(24, ge=2)
    """Pictures of the subject in new scenes."""
    seeds: int = Field(2, ge=1)
    """Seeds of each scene; the scenes are pictures / seeds."""
    unrelated: int = Field(50, ge=0)
    """Prompts that have nothing to do with the subject, one picture each; 0 leaves drift out."""
    steps: int = Field(25, ge=1)
    """Denoising steps a picture."""
    guidance: float | None = Field(None, ge=0)
    """Classifier-free guidance; 1 or less turns it off. Unset: the base's own, usually 7.5."""
    seed: int = Field(0, ge=0, lt=2**31)
    """Decides prompts, noise and intervals."""
    resamples: int = Field(1000, ge=100)
    """Resamples of the bootstrap."""


@dataclass(frozen=True)
class Candidate:
    """One adapter file that is evaluated."""

    file: Path
    label: str
    """"step 500", or the file's name."""
    step: int | None = None


@dataclass(frozen=True)
class Judged:
    """A candidate with its scores."""

    candidate: Candidate
    scores: Scores
    pictures: dict[str, list[Path]]
    """Group -> the adapter's pictures, relative to the evaluation's folder."""


@dataclass(frozen=True)
class Evaluation:
    """What was found, and where it is written."""

    folder: Path
    base: str
    concept: Concept
    eye: str
    """Who judged; empty for nobody."""
    judged: Sequence[Judged]
    recommended: Judged | None
    """The best of several by `Scores.overall`; None for a single file, or where nobody can judge."""
    asks: dict[str, list[Ask]]
    seeds: dict[str, list[int]]
    base_pictures: dict[str, list[Path]]
    training: dict[int, Path]
    """Number -> the training pictures that are nearest to some picture, copied beside the page."""
    settings: EvaluationSettings
    notes: tuple[str, ...]

    @property
    def page(self) -> Path:
        return self.folder / PAGE

    @property
    def numbers(self) -> Path:
        return self.folder / NUMBERS


def summary(found: Evaluation) -> dict[str, dict[str, Any]]:
    """Section -> measure -> value and interval, of the recommended adapter or the last one."""
    scores = (found.recommended or found.judged[-1]).scores
    return {
        section: {measured.name: measured.adapter.as_json() for measured in scores.of(section)}
        for section in ("learned", "obeys", "broke", "copied")
        if scores.of(section)
    }


def as_json(found: Evaluation) -> dict[str, Any]:
    """Everything measured, as plain JSON values."""
    return {
        "base": found.base,
        "subject": found.concept.phrase,
        "class": found.concept.class_phrase,
        "judge": found.eye,
        "settings": found.settings.model_dump(mode="json"),
        "recommended": found.recommended.candidate.label if found.recommended else None,
        "notes": list(found.notes),
        "prompts": {name: [ask.prompt for ask in asks] for name, asks in found.asks.items()},
        "adapters": [
            {
                "label": one.candidate.label,
                "step": one.candidate.step,
                "file": str(one.candidate.file),
                "learned": _rounded(one.scores.learned),
                "obeys": _rounded(one.scores.obeys),
                "kept": _rounded(one.scores.kept),
                "overall": _rounded(one.scores.overall),
                "measures": [
                    {
                        "section": m.section,
                        "name": m.name,
                        "unit": m.unit,
                        "adapter": m.adapter.as_json(),
                        "base": m.base.as_json() if m.base else None,
                    }
                    for m in one.scores.measures
                ],
                "nearest": [[number, round(far, 3)] for number, far in one.scores.nearest],
                "drift": [round(value, 3) for value in one.scores.drift],
            }
            for one in found.judged
        ],
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 5)
