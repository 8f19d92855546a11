"""split: pictures kept out of training for the held-out loss, without a leak between the two."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from scumble.data.duplicates import look_of, near_pairs
from scumble.data.images import measure, open_upright
from scumble.data.parallel import in_order
from scumble.data.sources import Dataset
from scumble.errors import DataError
from scumble.rng import Streams


@dataclass(frozen=True)
class Split:
    """A dataset in two."""

    train: Dataset
    held_out: Dataset
    notes: tuple[str, ...] = ()
    """Near duplicates that ended on both sides."""


def split(dataset: Dataset, held_out: float, seed: int, *, workers: int = 4) -> Split:
    """`held_out` pictures (a fraction below 1, at least one picture; or a count) apart from the rest, by
    seed.

    Pictures with the same bytes stay together, so that no picture that is trained on is held out. The choice
    depends on (seed, content): it stays when files are renamed.

    Raises:
        DataError: nothing would be left to train on; or a picture can't be read.
    """
    total = len(dataset)
    if held_out <= 0:
        return Split(dataset, dataset.only(()))
    wanted = max(1, round(held_out * total)) if held_out < 1 else int(held_out)
    measured = list(in_order(measure, dataset.records, workers))
    groups: dict[str, list[int]] = {}
    for index, picture in enumerate(measured):
        groups.setdefault(picture.content, []).append(index)
    streams = Streams(seed)
    order: Sequence[str] = sorted(
        groups, key=lambda content: (streams.number(f"data.held out/{content}"), content)
    )
    apart: list[int] = []
    for content in order:
        if len(apart) + len(groups[content]) <= wanted:
            apart += groups[content]
    if not apart or len(apart) >= total:
        raise DataError(
            f"held_out = {held_out:g} of {total} pictures ({len(groups)} different ones) leaves nothing "
            "on one side. "
            "Set a smaller number, or 0."
        )
    outside = set(apart)
    looks = list(in_order(lambda record: look_of(open_upright(record)), dataset.records, workers))
    notes = tuple(
        f"{dataset.records[one].key} and {dataset.records[other].key} look alike; "
        "one is held out, one is trained on."
        for one, other in near_pairs(looks)
        if (one in outside) != (other in outside)
    )
    rest = [index for index in range(total) if index not in outside]
    return Split(dataset.only(rest), dataset.only(sorted(outside)), notes)
