"""Kinds: which family a layer's tensors are, told by the endings of their names, and how they become its state.

    lora_down.weight, lora_up.weight [lora_mid.weight]              lora       (pairs.py knows its other endings)
    ... and dora_scale, lora_magnitude_vector or magnitude          dora
    hada_w1_a, hada_w1_b, hada_w2_a, hada_w2_b [hada_t1, hada_t2]   loha
    lokr_w1 or lokr_w1_a, lokr_w1_b; lokr_w2 or lokr_w2_a, ...      lokr
    diff                                                            full
    weight, on_input                                                ia3: only where names are flat
    scumble.<family>.<tensor>                                       any other family: ours alone

Dialects differ in how they call layers. In these endings LyCORIS, peft, ComfyUI and OneTrainer agree, so this
table is the only place that knows them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import cast

import torch
from torch import Tensor

from scumble.adapters.families import FAMILIES
from scumble.adapters.magnitude import INPUTS, OUTPUTS
from scumble.adapters.operate import Layer
from scumble.adapters.state import LayerState
from scumble.errors import FormatError

MAGNITUDES = {"lora_magnitude_vector", "dora_scale", "magnitude"}
"""Parts that hold a magnitude."""

ENDINGS: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"(.+)\.lora_magnitude_vector(?:\.default)?(?:\.weight)?"), "lora_magnitude_vector"),
    *(
        (re.compile(rf"(.+)\.{part}(?:\.default)?"), part)
        for part in (
            *("dora_scale", "magnitude", "diff"),
            *("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"),
            *("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
        )
    ),
)
"""Patterns of whole tensor names -> part. The first group is the layer."""

_OWN = re.compile(r"(.+)\.(scumble\.\w+\.\w+)")
"""The ending of a family that no other tool has files of: an outsider's."""

FLAT_ENDINGS: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"([^.]+)\.on_input"), "on_input"),
    (re.compile(r"([^.]+)\.weight"), "weight"),
)
"""Endings that mean a family only under flat names: `.weight` is anything elsewhere."""


@dataclass(frozen=True)
class Kind:
    """A family as files hold it."""

    family: str
    forms: tuple[tuple[str, ...], ...]
    """The sets of parts that make up a layer, without `alpha` and magnitudes."""
    prefix: str = ""
    """Part -> the family's own name for the tensor: what comes after this."""
    magnitudes: bool = False
    """Whether a magnitude may stand beside the parts."""
    own: bool = False
    """Whether the endings are ours alone; rank and alpha are then in our header entry."""

    def claims(self, parts: Mapping[str, object]) -> bool:
        """Whether any of a layer's parts is this family's."""
        return any(part in parts for form in self.forms for part in form)


KINDS = (
    Kind(
        "loha",
        (
            ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"),
            ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"),
        ),
        prefix="hada_",
        magnitudes=True,
    ),
    Kind(
        "lokr",
        tuple(
            (*small, *large)
            for small in (("lokr_w1",), ("lokr_w1_a", "lokr_w1_b"))
            for large in (
                ("lokr_w2",),
                ("lokr_w2_a", "lokr_w2_b"),
                ("lokr_w2_a", "lokr_w2_b", "lokr_t2"),
            )
        ),
        prefix="lokr_",
        magnitudes=True,
    ),
    Kind("full", (("diff",),)),
    Kind("ia3", (("weight", "on_input"),)),
)
"""Every family but LoRA and DoRA, whose pairs have endings of their own in every dialect."""


def kind_of(parts: Mapping[str, object]) -> Kind | None:
    """The family of a layer with these parts; None for LoRA and DoRA."""
    own = next((part.split(".")[1] for part in parts if part.startswith("scumble.")), None)
    return _own(own) if own else next((kind for kind in KINDS if kind.claims(parts)), None)


def split_ending(name: str, flat: bool = False) -> tuple[str, str]:
    """(layer, part) of a tensor's name; part is empty for others."""
    for pattern, part in (*ENDINGS, *(FLAT_ENDINGS if flat else ())):
        if match := pattern.fullmatch(name):
            return match[1], part
    own = _OWN.fullmatch(name)
    return (own[1], own[2]) if own else (name, "")


def state_of(kind: Kind, spelled: str, parts: Mapping[str, Tensor]) -> LayerState:
    """A layer's state from its parts, at scale 1; `rank` 0 where the tensors do not tell one.

    Raises:
        FormatError: parts are missing or too many, or their shapes contradict each other.
    """
    found = {part: tensor for part, tensor in parts.items() if part != "alpha"}
    extra = {part: found.pop(part) for part in tuple(found) if kind.magnitudes and part in MAGNITUDES}
    if kind.own:
        if kind.family not in FAMILIES or not all(part.startswith(kind.prefix) for part in found):
            raise FormatError(
                f"{spelled!r} is of the adapter family {kind.family!r}, which is not installed here "
                f"(there are {', '.join(FAMILIES)}), or of several. Not applied."
            )
        return LayerState(kind.family, 0, 1.0, {p.removeprefix(kind.prefix): t for p, t in found.items()})
    if tuple(sorted(found)) not in {tuple(sorted(form)) for form in kind.forms}:
        raise FormatError(
            f"The tensors of {spelled!r} are no whole {kind.family}: {', '.join(sorted(found))}. "
            "The file is damaged or was edited. Not applied."
        )
    if not all(tensor.is_floating_point() for part, tensor in found.items() if part != "on_input"):
        raise FormatError(f"The tensors of {spelled!r} are not all floating point. Not applied.")
    tensors = {part.removeprefix(kind.prefix): tensor for part, tensor in found.items()}
    if kind.family == "ia3":
        tensors = _ia3(spelled, tensors)
    state = LayerState(kind.family, 0, 1.0, tensors)
    shape = weight_shape(state)
    if shape is None:
        raise FormatError(
            f"The tensors of {spelled!r} contradict each other: "
            f"{', '.join(f'{part} {tuple(tensor.shape)}' for part, tensor in sorted(found.items()))}. "
            "Not applied."
        )
    rank = _rank(tensors)
    tensors |= magnitude(spelled, extra, shape)
    return LayerState(kind.family, rank, float(rank or 1), tensors)


def magnitude(spelled: str, parts: Mapping[str, Tensor], shape: Sequence[int]) -> dict[str, Tensor]:
    """The magnitude among a layer's parts under the family's own name, flat; empty when there is none.

    peft's is one number an output, `dora_scale` (out, 1...) or, of older tools, (1, in, ...).

    Raises:
        FormatError: there are two, or it is of another length than the weight's sides.
    """
    found = {part: tensor for part, tensor in parts.items() if part in MAGNITUDES}
    if not found:
        return {}
    part, tensor = next(iter(found.items()))
    by_input = part == "dora_scale" and tensor.ndim > 1 and tensor.shape[0] == 1 and shape[0] != 1
    side = shape[1] if by_input else shape[0]
    if len(found) > 1 or not tensor.is_floating_point() or (not by_input and tensor.numel() != side):
        raise FormatError(
            f"{part} of {spelled!r} has shape {tuple(tensor.shape)}; expected one number for each of {side} "
            f"{'inputs' if by_input else 'outputs'}. Not applied."
        )
    return {INPUTS if by_input else OUTPUTS: tensor.flatten()}


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
            case "full":
                return tuple(t["diff"].shape)
            case "ia3":
                return (len(t["factors"]), 0) if "factors" in t else (0, len(t["input_factors"]))
    except (KeyError, ValueError, IndexError):
        return None
    return None


def fit_tensors(state: LayerState, weight: Sequence[int]) -> LayerState | None:
    """`state` for a weight of this shape, its tensors reshaped where only kernels were written otherwise; None when
    it does not fit."""
    base = cast(Layer, SimpleNamespace(weight=torch.empty(tuple(weight), device="meta")))
    tensors = {}
    for name, expected in FAMILIES.get(state.family).expected_shapes(base, state).items():
        tensor = state.tensors.get(name)
        if (
            tensor is None
            or tensor.shape[:1] != expected[:1]
            or tensor.numel() != torch.Size(expected).numel()
        ):
            return None
        tensors[name] = tensor.reshape(expected)
    return replace(state, tensors=tensors) if tensors.keys() == state.tensors.keys() else None


def parts_of(state: LayerState) -> dict[str, Tensor]:
    """The inverse of `state_of`, without alpha and magnitude.

    Raises:
        FormatError: the tensors contradict each other.
    """
    kind = next((kind for kind in KINDS if kind.family == state.family), _own(state.family))
    if not kind.own and weight_shape(state) is None:
        shapes = {name: tuple(tensor.shape) for name, tensor in state.tensors.items()}
        raise FormatError(f"A {state.family} layer's tensors contradict each other: {shapes}.")
    if state.family == "ia3":
        on_input = "input_factors" in state.tensors
        return {
            "weight": state.tensors["input_factors" if on_input else "factors"],
            "on_input": torch.tensor(int(on_input)),
        }
    names = (name for name in state.tensors if kind.own or name not in (OUTPUTS, INPUTS))
    return {kind.prefix + name: state.tensors[name] for name in names}


def is_own(family: str) -> bool:
    """Whether no other tool has files of a family: its endings are ours."""
    return family not in ("lora", "dora", *(kind.family for kind in KINDS))


def has_alpha(family: str) -> bool:
    """Whether files of a family have an alpha: where some form of it has a rank."""
    forms = next((kind.forms for kind in KINDS if kind.family == family), None)
    return forms is None or any(part.endswith("_b") for form in forms for part in form)


def told_rank(state: LayerState) -> int:
    """The rank that a layer's tensors tell; 0 where they tell none."""
    return _rank(state.tensors)


def _own(family: str) -> Kind:
    return Kind(family, (), prefix=f"scumble.{family}.", own=True)


def _product(t: Mapping[str, Tensor], a: str, b: str, core: str) -> tuple[int, ...]:
    """Shape of a @ b, or of the core multiplied by both.

    Raises:
        ValueError: the shapes do not go together.
    """
    left, right = t[a], t[b]
    right_rank, inner = right.shape[0], right.shape[1:].numel()
    if core not in t:
        if left.ndim != 2 or left.shape[1] != right_rank:
            raise ValueError
        return left.shape[0], inner
    if left.ndim != 2 or t[core].ndim != 4 or tuple(t[core].shape[:2]) != (left.shape[0], right_rank):
        raise ValueError
    return left.shape[1], inner, *t[core].shape[2:]


def _rank(tensors: Mapping[str, Tensor]) -> int:
    """The rows of the factors on the input side, which must agree; 0 where there is none."""
    ranks = {tensor.shape[0] for name, tensor in tensors.items() if name.endswith("_b") or name == "down"}
    return ranks.pop() if len(ranks) == 1 else 0


def _ia3(spelled: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    if tensors["on_input"].numel() != 1:
        raise FormatError(f"on_input of {spelled!r} should be one number. Not applied.")
    return {"input_factors" if bool(tensors["on_input"]) else "factors": tensors["weight"].flatten()}
