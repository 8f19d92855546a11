"""Cuts: which parts of a picture a run may show, mirroring aside, known before it starts."""

from __future__ import annotations

from scumble.data.images import Geometry, Measured, Size, center, crops
from scumble.data.settings import DataSettings
from scumble.rng import Streams


def bounded(
    picture: Measured, target: Size, settings: DataSettings, streams: Streams
) -> tuple[Geometry, ...] | None:
    """All cuts of a picture that may be shown; None when each visit has its own (see `anew`).

    Random crops are drawn by (seed, content), so that a picture keeps its crops when others come and go.
    """
    middle = center(picture.size, target)
    if settings.center_crop or middle.resized == target:
        return (middle,)
    if settings.crop_variants == 0:
        return None
    draws = [streams.number(f"data.crop/{picture.content}", draw) for draw in range(settings.crop_variants)]
    return crops(picture.size, target, draws)


def anew(picture: Measured, target: Size, streams: Streams, position: int) -> Geometry:
    """The cut of the visit at `position`, where cuts are not bounded."""
    (cut,) = crops(picture.size, target, [streams.number("data.crop", position)])
    return cut
