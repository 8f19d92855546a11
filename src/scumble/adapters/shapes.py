"""Shapes: what a layer's tensors tell of the weight that they change. Nothing here needs torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from scumble.adapters.names import BIAS, INPUT_FORMS, INPUTS, OUTPUTS, apart, triangle_size
from scumble.adapters.state import LayerPath, LayerState

if TYPE_CHECKING:
    from torch import Tensor

_WHOLE = ("loha", "lokr", "full")
"""Families whose change is in their tensors whole, if no length is learned beside."""


def is_whole(state: LayerState) -> bool:
    """Whether the change to the weight is told by the tensors alone, of a family that is no thin product."""
    return state.family in _WHOLE and not {INPUTS, OUTPUTS} & state.tensors.keys()


def whole_shape(path: LayerPath, state: LayerState) -> tuple[int, ...] | None:
    """The shape of the weight, where the change is told by the tensors alone. None where it isn't, or where what they
    hold flat may be a convolution's kernel, which a name tells only for some layers."""
    shape = weight_shape(state) if is_whole(state) else None
    kernel = path.rpartition(".")[2].startswith(("conv", "proj_")) and state.family != "full"
    return None if shape is None or 0 in shape or (kernel and len(shape) == 2) else shape


def weight_shape(state: LayerState) -> tuple[int, ...] | None:
    """(out, in[, k, k]) of the weight that a layer's tensors change, kernels flattened into `in` where the tensors
    hold them so; None where the tensors contradict each other, or are of a family that does not tell."""
    t = state.tensors
    try:
        match state.family:
            case "lora" | "dora":
                return (t["up"].shape[0], *t["down"].shape[1:])
            case "loha":
                first, second = (_product(t, f"w{n}_a", f"w{n}_b", f"t{n}") for n in (1, 2))
                return first if first == second else None
            case "lokr":
                a, c = t["w1"].shape if "w1" in t else _product(t, "w1_a", "w1_b", "")
                b, d, *kernel = t["w2"].shape if "w2" in t else _product(t, "w2_a", "w2_b", "t2")
                return (a * b, c * d, *kernel)
            case "glora":
                return _glora_shape(*(tuple(t[name].shape) for name in ("a1", "a2", "b1", "b2")))
            case "full":
                return tuple(t["diff"].shape) if "diff" in t else (len(t[BIAS]), 0)
            case "ia3":
                ((name, factors),) = apart(state)[0].tensors.items()
                number = factors.numel()
                return (0, number) if name.startswith("input_") else (number, 0)
            case "oft" | "boft":
                return _turned_shape(state.family, t)
    except (KeyError, ValueError, IndexError):
        return None
    return None


def _product(t: Mapping[str, Tensor], a: str, b: str, core: str) -> tuple[int, ...]:
    """Shape of a @ b, or of the core multiplied by both.

    Raises:
        ValueError: the shapes do not go together.
    """
    left, right = t[a], t[b]
    right_rank, inner = right.shape[0], math.prod(right.shape[1:])
    if core not in t:
        if left.ndim != 2 or left.shape[1] != right_rank:
            raise ValueError
        return left.shape[0], inner
    if left.ndim != 2 or t[core].ndim != 4 or tuple(t[core].shape[:2]) != (left.shape[0], right_rank):
        raise ValueError
    return left.shape[1], inner, *t[core].shape[2:]


def _glora_shape(
    a1: Sequence[int], a2: Sequence[int], b1: Sequence[int], b2: Sequence[int]
) -> tuple[int, ...] | None:
    """Shape of W from those of the factors in W a1 @ a2 + b1 @ b2; None where they contradict each other."""
    thin = math.prod((*a1[2:], *a2[2:], *b1[2:])) == 1
    agree = a1[:2] == a2[:2][::-1] and a2[:2] == b2[:2] and b1[1] == b2[0]
    return (b1[0], *b2[1:]) if thin and agree else None


def _turned_shape(family: str, t: Mapping[str, Tensor]) -> tuple[int, int] | None:
    """(out, 0) where outputs turn, (0, in * k * k) where inputs do; None where the tensors contradict each other. One
    block that all share tells neither."""
    form = next((name for name in INPUT_FORMS if name in t), None)
    if form is not None:
        number, size = t[form].shape[0], triangle_size(t[form].shape[1])
        return (0, number * size if number > 1 else 0) if t[form].ndim == 2 and size else None
    number, size, other = t["blocks"].shape[-3:]
    wrong = size != other or t["blocks"].ndim != (4 if family == "boft" else 3)
    if wrong or ("rescale" in t and t["rescale"].numel() != number * size):
        return None
    return number * size, 0
