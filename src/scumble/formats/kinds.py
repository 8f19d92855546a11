"""Kinds: which family a layer's tensors are, told by the endings of their names, and how they become its state.

    lora_down.weight, lora_up.weight [lora_mid.weight]              lora       (pairs.py knows its other endings)
    ... and dora_scale, lora_magnitude_vector or magnitude          dora
    hada_w1_a, hada_w1_b, hada_w2_a, hada_w2_b [hada_t1, hada_t2]   loha
    lokr_w1 or lokr_w1_a, lokr_w1_b; lokr_w2 or lokr_w2_a, ...      lokr
    diff, or on a normalisation w_norm                              full
    a1.weight, a2.weight, b1.weight, b2.weight                      glora
    oft_blocks [rescale], oft_R.weight [oft_R.scaled_oft]           oft; boft where oft_blocks has four dimensions
    weight, on_input                                                ia3: only where names are flat
    scumble.<family>.<tensor>                                       any other family: ours alone
    diff_b, b_norm                                                  a change to the bias, beside any family or alone
    lora_up.bias                                                    one that is scaled with LoRA's factors

Dialects differ in how they call layers. In these endings LyCORIS, peft, ComfyUI and OneTrainer agree, so this
table is the only place that knows them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

from scumble.adapters.families import FAMILIES
from scumble.adapters.names import BIAS, INPUT_FORMS, INPUTS, OUTPUTS, UP_BIAS, apart, triangle_size
from scumble.adapters.shapes import weight_shape
from scumble.adapters.state import LayerState
from scumble.errors import FormatError

if TYPE_CHECKING:
    from torch import Tensor

    from scumble.adapters.operate import Layer

LIMITED = frozenset({"oft", "boft"})
"""Families whose alpha is a limit, where 0 means none, and no scale."""

_MARKS = frozenset({"on_input", "scaled_oft"})
"""Parts that are a sign and no floating-point numbers."""

MAGNITUDES = {"lora_magnitude_vector", "dora_scale", "magnitude"}
"""Parts that hold a magnitude."""

ENDINGS: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"(.+)\.lora_magnitude_vector(?:\.default)?(?:\.weight)?"), "lora_magnitude_vector"),
    *(
        (re.compile(rf"(.+)\.{part}(?:\.default)?"), part)
        for part in (
            *("dora_scale", "magnitude", "diff", "diff_b", "w_norm", "b_norm", "oft_blocks", "rescale"),
            *("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"),
            *("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
        )
    ),
    (re.compile(r"(.+)\.lora_(?:B|up)(?:\.default)?\.bias"), "up_bias"),
    (re.compile(r"(.+)\.lora(?:_linear_layer)?\.up\.bias"), "up_bias"),
    (re.compile(r"(.+)\.oft_R(?:\.default)?\.weight"), "oft_R"),
    (re.compile(r"(.+)\.oft_R\.scaled_oft"), "scaled_oft"),
    (re.compile(r"(.+)\.ia3_l(?:\.default)?"), "ia3_l"),
    *((re.compile(rf"(.+)\.{name}\.weight"), f"{name}.weight") for name in ("a1", "a2", "b1", "b2")),
)
"""Patterns of whole tensor names -> part. The first group is the layer."""

BIASES = {"diff_b": BIAS, "b_norm": BIAS, "up_bias": UP_BIAS}
"""Parts that change a layer's bias -> our names for them."""

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
    names: Mapping[str, str] = field(default_factory=dict)
    """Part -> the family's own name for the tensor, where it is another."""
    reads_weight: bool = False
    """Whether the change depends on the base's weights, though its tensors tell their whole shape."""
    own: bool = False
    """Whether the endings are ours alone; rank and alpha are then in our header entry."""


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
    Kind(
        "glora",
        (("a1.weight", "a2.weight", "b1.weight", "b2.weight"),),
        names={f"{name}.weight": name for name in ("a1", "a2", "b1", "b2")},
        reads_weight=True,
    ),
    Kind("full", (("diff",), ("w_norm",))),
    Kind(
        "oft",
        (
            *(("oft_blocks",), ("oft_blocks", "rescale"), ("oft_R",), ("oft_R", "scaled_oft")),
            *(("triangles",), ("series",)),  # made of peft's one name
        ),
        names={"oft_blocks": "blocks", "oft_R": "weight_series"},
    ),
    Kind("boft", (("oft_blocks",), ("oft_blocks", "rescale")), names={"oft_blocks": "blocks"}),
    # the second and third are made of peft's one name
    Kind("ia3", (("weight", "on_input"), ("multipliers",), ("input_multipliers",))),
)
"""Every family but LoRA and DoRA, whose pairs have endings of their own in every dialect."""

_BY_PART = {
    part: number for number, kind in reversed([*enumerate(KINDS)]) for form in kind.forms for part in form
}
"""Part -> the first kind that claims it."""

_FULL = next(kind for kind in KINDS if kind.family == "full")


def kind_of(parts: Iterable[str]) -> Kind | None:
    """The family of a layer with these parts; None for LoRA and DoRA."""
    return _kind_of(frozenset(parts))


@lru_cache(maxsize=1024)
def _kind_of(parts: frozenset[str]) -> Kind | None:
    own = next((part.split(".")[1] for part in parts if part.startswith("scumble.")), None)
    if own:
        return _own(own)
    claims = [_BY_PART[part] for part in parts if part in _BY_PART]
    if claims:
        return KINDS[min(claims)]
    alone = BIASES.keys() & parts and not {"down", "up"} & parts
    return _FULL if alone else None


@lru_cache(maxsize=2**15)
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
    sides = {part: found.pop(part) for part in tuple(found) if part in BIASES}
    if kind.own:
        if kind.family not in FAMILIES or not all(part.startswith(kind.prefix) for part in found):
            raise FormatError(
                f"{spelled!r} is of the adapter family {kind.family!r}, which is not installed here "
                f"(there are {', '.join(FAMILIES)}), or of several. Not applied."
            )
        return LayerState(kind.family, 0, 1.0, {p.removeprefix(kind.prefix): t for p, t in found.items()})
    alone = kind is _FULL and sides and not found
    if not alone and tuple(sorted(found)) not in {tuple(sorted(form)) for form in kind.forms}:
        raise FormatError(
            f"The tensors of {spelled!r} are no whole {kind.family}: {', '.join(sorted(found))}. "
            "The file is damaged or was edited. Not applied."
        )
    if not all(tensor.is_floating_point() for part, tensor in found.items() if part not in _MARKS):
        raise FormatError(f"The tensors of {spelled!r} are not all floating point. Not applied.")
    tensors = {kind.names.get(part, part.removeprefix(kind.prefix)): tensor for part, tensor in found.items()}
    family, alpha = kind.family, None
    if family == "ia3":
        tensors = _ia3(spelled, tensors)
    if family == "full":
        tensors = {"diff": next(iter(tensors.values()))} if tensors else {}
    if family == "oft":
        family, tensors = _rotation(tensors)
        alpha = 0.0  # no limit
    if alone:
        tensors = bias_tensors(spelled, sides, None)
    state = LayerState(family, 0, 1.0, tensors)
    shape = weight_shape(state)
    if shape is None:
        raise FormatError(
            f"The tensors of {spelled!r} contradict each other: "
            f"{', '.join(f'{part} {tuple(tensor.shape)}' for part, tensor in sorted(found.items()))}. "
            "Not applied."
        )
    rank = _rank(tensors)
    tensors |= magnitude(spelled, extra, shape)
    if not alone:
        tensors |= bias_tensors(spelled, sides, shape[0])
    return LayerState(family, rank, float(rank or 1) if alpha is None else alpha, tensors)


def bias_tensors(spelled: str, parts: Mapping[str, Tensor], out: int | None) -> dict[str, Tensor]:
    """The changes to the bias among a layer's parts under our names, (out,); empty when there are none.

    Raises:
        FormatError: there are two, or it is no number for each of `out` outputs (None: however many there are).
    """
    found = {part: tensor for part, tensor in parts.items() if part in BIASES}
    if not found:
        return {}
    tensors = {BIASES[part]: tensor.flatten() for part, tensor in found.items()}
    wrong = any(
        not tensor.is_floating_point() or (out or tensor.numel()) != tensor.numel()
        for tensor in found.values()
    )
    if wrong or len(tensors) < len(found):
        shapes = ", ".join(f"{part} {tuple(tensor.shape)}" for part, tensor in sorted(found.items()))
        raise FormatError(
            f"The change to the bias of {spelled!r} should be one number for each "
            f"{f'of {out} outputs' if out else 'output'}: {shapes}. Not applied."
        )
    return tensors


def magnitude(spelled: str, parts: Mapping[str, Tensor], shape: Sequence[int]) -> dict[str, Tensor]:
    """The magnitude among a layer's parts under the family's own name, flat; empty when there is none.

    peft's is one number an output, `dora_scale` (out, 1...) or, of older tools, (1, in, ...).

    Raises:
        FormatError: there are two, or it is of another length than the weight's sides.
    """
    found = {part: tensor for part, tensor in parts.items() if part in MAGNITUDES}
    if not found:
        return {}
    if len(found) > 1:
        raise FormatError(
            f"{spelled!r} has two magnitudes, {' and '.join(sorted(found))}, where a layer has one. The file is "
            "damaged or was edited. Not applied."
        )
    part, tensor = next(iter(found.items()))
    by_input = part == "dora_scale" and tensor.ndim > 1 and tensor.shape[0] == 1 and shape[0] != 1
    side = shape[1] if by_input else shape[0]
    if not tensor.is_floating_point() or (not by_input and tensor.numel() != side):
        raise FormatError(
            f"{part} of {spelled!r} has shape {tuple(tensor.shape)}; expected one number for each of {side} "
            f"{'inputs' if by_input else 'outputs'}. Not applied."
        )
    return {INPUTS if by_input else OUTPUTS: tensor.flatten()}


def fit_tensors(state: LayerState, weight: Sequence[int]) -> LayerState | None:
    """`state` for a weight of this shape, its tensors reshaped where only kernels were written otherwise; None when
    it does not fit."""
    if len(weight) < 2 and state.family != "full":  # a normalisation
        return None
    state, sides = apart(state)
    if any(tensor.shape[0] != weight[0] for tensor in sides.values()):
        return None
    import torch

    base = cast("Layer", SimpleNamespace(weight=torch.empty(tuple(weight), device="meta")))
    tensors = {}
    for name, expected in FAMILIES.get(state.family).expected_shapes(base, state).items():
        tensor = state.tensors.get(name)
        if tensor is None or tensor.shape[:1] != expected[:1] or tensor.numel() != math.prod(expected):
            return None
        tensors[name] = tensor.reshape(expected)
    return replace(state, tensors={**tensors, **sides}) if tensors.keys() == state.tensors.keys() else None


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
        import torch

        on_input = "input_factors" in state.tensors
        return {
            "weight": state.tensors["input_factors" if on_input else "factors"],
            "on_input": torch.tensor(int(on_input)),
        }
    if kind is _FULL:
        diff = state.tensors.get("diff")
        return {} if diff is None else {"diff" if diff.ndim > 1 else "w_norm": diff}
    spelled = {name: {"oft_R": "oft_R.weight"}.get(part, part) for part, name in kind.names.items()}
    tensors = state.tensors if kind.own else apart(state)[0].tensors
    names = [name for name in tensors if kind.own or name not in (OUTPUTS, INPUTS)]
    if kind.names:
        return {spelled.get(name, name): tensors[name] for name in names}
    return {kind.prefix + name: tensors[name] for name in names}


def bias_parts(state: LayerState) -> dict[str, Tensor]:
    """The inverse of `bias_tensors`."""
    diff = state.tensors.get("diff")
    norm = diff is not None and diff.ndim == 1
    names = {BIAS: "b_norm" if norm else "diff_b", UP_BIAS: "lora_up.bias"}
    return {names[name]: tensor for name, tensor in state.tensors.items() if name in names}


def is_own(family: str) -> bool:
    """Whether no other tool has files of a family: its endings are ours."""
    return family not in ("lora", "dora", *(kind.family for kind in KINDS))


def has_alpha(family: str) -> bool:
    """Whether files of a family have an alpha: where some form of it has a rank, or a limit."""
    if family in LIMITED:
        return True
    forms = next((kind.forms for kind in KINDS if kind.family == family), None)
    return forms is None or any(_has_rank(part.removesuffix(".weight")) for form in forms for part in form)


def reads_weight(family: str) -> bool:
    """Whether a change depends on the base's weights, though its tensors tell their whole shape."""
    return any(kind.reads_weight for kind in KINDS if kind.family == family)


def told_rank(state: LayerState) -> int:
    """The rank that a layer's tensors tell; 0 where they tell none."""
    return _rank(state.tensors)


def _own(family: str) -> Kind:
    return Kind(family, (), prefix=f"scumble.{family}.", own=True)


def _has_rank(name: str) -> bool:
    """Whether a tensor's rows are the rank: a factor on the input side."""
    return name.endswith("_b") or name in ("down", "a2", "b2")


def _rank(tensors: Mapping[str, Tensor]) -> int:
    """The rows of the factors on the input side, which must agree, or the size of the blocks that turn; 0 where there
    is none."""
    if "blocks" in tensors:
        return tensors["blocks"].shape[-1]
    form = next((name for name in INPUT_FORMS if name in tensors), None)
    if form is not None:
        return triangle_size(tensors[form].shape[-1])
    ranks = {tensor.shape[0] for name, tensor in tensors.items() if _has_rank(name)}
    return ranks.pop() if len(ranks) == 1 else 0


def _rotation(tensors: Mapping[str, Tensor]) -> tuple[str, dict[str, Tensor]]:
    """The family of blocks that turn, and its tensors."""
    tensors = dict(tensors)
    if (
        tensors.pop("scaled_oft", None) is not None
    ):  # OneTrainer's learning rates are for numbers of this size
        import torch

        numbers = tensors["weight_series"]
        wide = numbers.to(torch.promote_types(numbers.dtype, torch.float32))
        size = triangle_size(numbers.shape[-1]) if numbers.ndim == 2 else 0
        tensors["weight_series"] = wide / (2 * math.sqrt(max(1, size - 1)))
    blocks = tensors.get("blocks")
    return "boft" if blocks is not None and blocks.ndim == 4 else "oft", tensors


def _ia3(spelled: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    if "on_input" not in tensors:
        return dict(tensors)
    if tensors["on_input"].numel() != 1:
        raise FormatError(f"on_input of {spelled!r} should be one number. Not applied.")
    return {"input_factors" if bool(tensors["on_input"]) else "factors": tensors["weight"].flatten()}
