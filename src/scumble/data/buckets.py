"""Buckets: the shapes that pictures are trained in, and the shape that crops a given picture least."""

from __future__ import annotations

from fractions import Fraction
from functools import lru_cache

from scumble.data.images import Size
from scumble.data.settings import DataSettings
from scumble.errors import DataError

LONGEST = 2
"""The longer side of a bucket is at most this many resolutions, the shorter at least 1 / this."""


@lru_cache(maxsize=64)
def shapes(resolution: int, step: int) -> tuple[Size, ...]:
    """All (height, width) with sides that are multiples of `step`, between resolution / 2 and 2 resolution,
    and an area as near to resolution² as fits without exceeding it. The square comes with them."""
    found = {(resolution, resolution)}
    for side in range(-(-resolution // (LONGEST * step)) * step, LONGEST * resolution + 1, step):
        other = resolution * resolution // side // step * step
        if resolution <= LONGEST * other and other <= LONGEST * resolution:
            found |= {(side, other), (other, side)}
    return tuple(sorted(found))


def kept(size: Size, shape: Size) -> Fraction:
    """The part of a picture of `size` that stays when it is resized to cover `shape` and cropped, in (0,
    1]."""
    across, down = shape[0] * size[1], shape[1] * size[0]
    return Fraction(min(across, down), max(across, down))


@lru_cache(maxsize=1 << 14)
def choose(size: Size, among: tuple[Size, ...]) -> Size:
    """The shape of minimum crop for a picture of `size`; among equals, the one that resizes it least."""

    def order(shape: Size) -> tuple[Fraction, Fraction, Size]:
        scale = max(Fraction(shape[0], size[0]), Fraction(shape[1], size[1]))
        return -kept(size, shape), max(scale, 1 / scale), shape

    return min(among, key=order)


def target_shapes(settings: DataSettings, *, resolution: int, size_multiple: int) -> tuple[Size, ...]:
    """The shapes that these settings train in.

    `resolution` and `size_multiple` are the base's; the settings' own resolution goes first.

    Raises:
        DataError: the resolution or bucket step is not a multiple of what the base needs.
    """
    side = settings.resolution or resolution
    if side % size_multiple:
        below, above = side // size_multiple * size_multiple, -(-side // size_multiple) * size_multiple
        near = f"{below} or {above}" if below else f"{above}"
        raise DataError(
            f"resolution {side} is not a multiple of {size_multiple}, which this base needs. "
            f"Try resolution {near}."
        )
    if not settings.buckets:
        return ((side, side),)
    step = settings.bucket_step or size_multiple
    if step % size_multiple or side % step:
        raise DataError(
            f"bucket_step {step} must be a multiple of {size_multiple}, which this base needs, and divide "
            f"the resolution {side}. Leave it out for {size_multiple}."
        )
    return shapes(side, step)


def too_small(size: Size, target: Size, scale: float) -> str:
    """The words for a picture that has to be enlarged."""
    return (
        f"is {size[1]}x{size[0]} pixels (width x height) and would be enlarged {scale:.2f}x to fill "
        f"{target[1]}x{target[0]}. Use a larger picture or a smaller resolution."
    )
