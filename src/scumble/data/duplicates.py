"""Near duplicates: pictures that look the same though their bytes differ.

Two looks must agree: the difference hash (dHash, 64 bits; which of two neighbours is brighter in a 9x8 grey
thumbnail) within 4 bits, and the colours of a 16x16 thumbnail everywhere. The hash alone takes any two
figures on white paper for one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

BITS = 4
"""Largest Hamming distance of two hashes."""
SHADES = 48
"""Largest difference of two thumbnails at any place, of 255."""
_ROWS = 64
_ONES = np.array([number.bit_count() for number in range(256)], dtype=np.uint8)


@dataclass(frozen=True)
class Look:
    """What a picture looks like from afar."""

    bits: int
    """dHash, 64 bits"""
    thumbnail: np.ndarray
    """(16, 16, 3) int16"""


def look_of(image: Image.Image) -> Look:
    """The look of an upright RGB picture."""
    small = image.convert("L").resize((9, 8), Image.Resampling.BOX)
    grey = np.asarray(small, dtype=np.int16)
    bits = np.packbits((grey[:, 1:] > grey[:, :-1]).flatten())
    thumbnail = np.asarray(image.resize((16, 16), Image.Resampling.BOX), dtype=np.int16)
    return Look(int.from_bytes(bits.tobytes(), "big"), thumbnail)


def near_pairs(looks: Sequence[Look]) -> list[tuple[int, int]]:
    """All pairs (i, j), i < j, of pictures that look alike."""
    if len(looks) < 2:
        return []
    bits = np.array([look.bits for look in looks], dtype=np.uint64)
    pairs = []
    for start in range(0, len(bits), _ROWS):
        differ = bits[start : start + _ROWS, None] ^ bits[None, :]
        distance = _ONES[differ.view(np.uint8).reshape(*differ.shape, 8)].sum(axis=-1)
        for row, other in zip(*np.nonzero(distance <= BITS), strict=True):
            one = start + int(row)
            if one < other:
                difference = np.abs(looks[one].thumbnail - looks[other].thumbnail).max()
                if difference <= SHADES:
                    pairs.append((one, int(other)))
    return pairs
