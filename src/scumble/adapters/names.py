"""Names: what the tensors are called that several families have, and whose names files must know.

Nothing here needs torch: files are looked at and converted without it.
"""

from __future__ import annotations

import math
import re
from dataclasses import replace
from typing import TYPE_CHECKING

from scumble.adapters.state import LayerState

if TYPE_CHECKING:
    from torch import Tensor

BIAS, UP_BIAS = "bias", "up_bias"
"""Changes to a layer's bias, (out,), beside a family's own tensors; `up_bias` beside LoRA's alone (see `biased.py`)."""
SIDES = frozenset({BIAS, UP_BIAS})

OUTPUTS, INPUTS = "magnitude", "input_magnitude"
"""Lengths that the weight's rows, (out,), or columns, (in,), are given (see `magnitude.py`)."""

INPUT_FORMS = ("triangles", "series", "weight_series")
"""Tensors by which a rotation turns inputs (see `oft.py`)."""

TERMS = 5
"""Of the series that `series` means: I + 2 Q + 2 Q^2 + 2 Q^3 + Q^4, as peft and OneTrainer sum it."""


def apart(state: LayerState) -> tuple[LayerState, dict[str, Tensor]]:
    """The change to the weight, and the tensors that change the bias."""
    sides = {name: tensor for name, tensor in state.tensors.items() if name in SIDES}
    rest = {name: tensor for name, tensor in state.tensors.items() if name not in SIDES}
    return replace(state, tensors=rest), sides


def triangle_size(numbers: int) -> int:
    """b of b (b - 1) / 2 numbers above a diagonal; 0 when there is none."""
    size = (1 + math.isqrt(1 + 8 * numbers)) // 2
    return size if size * (size - 1) // 2 == numbers else 0


def one_word(name: str) -> str:
    """A token's name as prompts spell it, with "_" for blanks: a word has none, names in files may."""
    return re.sub(r"\s", "_", name)
