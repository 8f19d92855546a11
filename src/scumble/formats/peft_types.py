"""Types of peft adapters beside LoRA: what the configuration of each says, and the tensors that go with it.

    LOHA  hada_w1_a, ...      rank and alpha by patterns as for LoRA; the field is called `alpha`
    LOKR  lokr_w1, ...        likewise; alpha / r counts for whole matrices too
    IA3   ia3_l               (out, 1) or (1, out, 1, 1): factors of the outputs, their bias among them; (1, in[, 1, 1])
                              of the inputs, on the layers of `feedforward_modules`
    OFT   oft_R.weight        (n, b (b - 1) / 2): turns of the inputs; exact, or by a series of five terms

The configuration holds one value for a whole component, from which peft makes the shapes of a layer's tensors: what it
would not make it can't read, and is not written.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from scumble.adapters.names import INPUTS, OUTPUTS, TERMS, triangle_size
from scumble.adapters.shapes import weight_shape
from scumble.adapters.state import LayerState
from scumble.errors import FormatError
from scumble.formats.kinds import parts_of
from scumble.formats.lora_config import LoraConfig, pattern_fields
from scumble.formats.metadata import LayerFacts, is_number

if TYPE_CHECKING:
    from torch import Tensor

Layers = Mapping[str, LayerState]
"""The layers of one component, without its name."""


@dataclass(frozen=True)
class PeftType:
    """One value of `peft_type`."""

    name: str
    families: tuple[str, ...]
    """The adapter families that it holds."""
    part: Callable[[Mapping[str, Any], str, str, Tensor], str]
    """(configuration, layer's name, part, tensor) -> what the part means in `kinds.py`."""
    facts: Callable[[Mapping[str, Any], str], Callable[[str, int], LayerFacts]]
    """(configuration, its name) -> layer's name and rank -> rank and alpha."""
    obstacle: Callable[[Layers], str | None]
    """Why it can't hold these layers; None when it can."""
    fields: Callable[[Layers], dict[str, Any]]
    """The fields of the configuration, besides those of every type."""
    tensors: Callable[[LayerState], dict[str, Tensor]]
    """A layer's tensors by the endings of their names."""


def _same(config: Mapping[str, Any], layer: str, part: str, tensor: Tensor) -> str:
    return part


# LoHa and LoKr


def _ranked(config: Mapping[str, Any], source: str) -> Callable[[str, int], LayerFacts]:
    reader = LoraConfig({**config, "lora_alpha": config.get("alpha"), "use_rslora": False}, source)
    return lambda layer, rank: reader.facts(layer)


def _loha_obstacle(layers: Layers) -> str | None:
    for name, layer in layers.items():
        if {INPUTS, OUTPUTS} & layer.tensors.keys():
            return f"its {layer.family} has no magnitude, as that of {name!r}"
    if len({_split(layer) for layer in layers.values() if _kernel(layer) > 1}) > 1:
        return "its loha has the kernels of all convolutions apart, or of none"
    return None


def _loha_fields(layers: Layers) -> dict[str, Any]:
    facts = {name: LayerFacts.of(layer) for name, layer in layers.items()}
    fields = pattern_fields(facts, stabilized=False)
    fields["alpha"] = fields.pop("lora_alpha")
    del fields["use_rslora"]
    return {**fields, "use_effective_conv2d": any(_split(layer) for layer in layers.values())}


def _split(layer: LayerState) -> bool:
    """Whether the kernel is apart."""
    return not {"t1", "t2"}.isdisjoint(layer.tensors)


def _kernel(layer: LayerState) -> int:
    """Numbers in the kernel, as far as the tensors tell: a flat one is taken for none."""
    shape = weight_shape(layer) or ()
    return math.prod(shape[2:])


def _lokr_obstacle(layers: Layers) -> str | None:
    if (why := _loha_obstacle(layers)) is not None:
        return why
    if _decomposition(layers) is None:
        return "its lokr has matrices of other shapes, which no decompose_factor of peft gives"
    return None


def _lokr_fields(layers: Layers) -> dict[str, Any]:
    found = _decomposition(layers)
    assert found is not None
    return {**_loha_fields(layers), "decompose_factor": found[0], "decompose_both": found[1]}


def _decomposition(layers: Layers) -> tuple[int, bool] | None:
    """The decompose_factor and decompose_both by which peft makes matrices of these shapes; None without."""
    shapes = {name: _kronecker(layer) for name, layer in layers.items()}
    factors = [-1, *sorted({side for shape in shapes.values() for side in shape[0]} | {8, 16, 4, 2})]
    for factor in factors:
        for both in (False, True):
            if all(_made_so(layer, shapes[name], factor, both) for name, layer in layers.items()):
                return factor, both
    return None


def _made_so(
    layer: LayerState, shape: tuple[tuple[int, int], tuple[int, int]], factor: int, both: bool
) -> bool:
    (a, c), (b, columns) = shape
    small, whole = "w1" in layer.tensors, "w2" in layer.tensors
    # a flat kernel is in the columns
    kernels = (1,) if whole or "t2" in layer.tensors else (1, 9, 4, 25)
    return (
        _factorized(a * b, factor) == (a, b)
        and small == (not (both and layer.rank < max(a, c) / 2))
        and any(
            columns % kernel == 0
            and _factorized(c * columns // kernel, factor) == (c, columns // kernel)
            and whole == (layer.rank >= max(b, columns // kernel) / 2)
            for kernel in kernels
        )
    )


def _kronecker(layer: LayerState) -> tuple[tuple[int, int], tuple[int, int]]:
    """((a, c), (b, d)) of the two matrices."""
    t = layer.tensors
    small = tuple(t["w1"].shape) if "w1" in t else (t["w1_a"].shape[0], t["w1_b"].shape[1])
    if "w2" in t:
        large = tuple(t["w2"].shape[:2])
    elif "t2" in t:
        large = (t["w2_a"].shape[1], t["w2_b"].shape[1])
    else:
        large = (t["w2_a"].shape[0], t["w2_b"].shape[1])
    return (small[0], small[1]), (large[0], large[1])


def _factorized(width: int, factor: int) -> tuple[int, int]:
    """How peft splits a width: by the factor where it divides, else by the nearest divisor to the square root that is
    not above the factor."""
    if factor > 0 and width % factor == 0:
        return factor, width // factor
    limit = width if factor < 0 else factor
    small = max(n for n in range(1, int(width**0.5) + 1) if width % n == 0 and (n <= limit or n == 1))
    return small, width // small


# IA3


def _ia3_part(config: Mapping[str, Any], layer: str, part: str, tensor: Tensor) -> str:
    inputs = config.get("feedforward_modules") or []
    if not isinstance(inputs, list) or not all(isinstance(name, str) for name in inputs):
        raise FormatError("unsupported: feedforward_modules that are an expression. Nothing of it was used.")
    return "input_multipliers" if layer.endswith(tuple(inputs)) else "multipliers"


def _unranked(config: Mapping[str, Any], source: str) -> Callable[[str, int], LayerFacts]:
    return lambda layer, rank: LayerFacts(rank, float(rank))


def _ia3_obstacle(layers: Layers) -> str | None:
    for name, layer in layers.items():
        if not {"multipliers", "input_multipliers"} & layer.tensors.keys():
            return f"its ia3 multiplies biases as well, and that of {name!r} does not"
        if layer.scale != 1:
            return f"its ia3 has no alpha, and that of {name!r} is {layer.scale:g}"
    return None


def _ia3_fields(layers: Layers) -> dict[str, Any]:
    inputs = sorted(name for name, layer in layers.items() if "input_multipliers" in layer.tensors)
    return {"feedforward_modules": inputs, "init_ia3_weights": True}


# OFT


def _oft_part(config: Mapping[str, Any], layer: str, part: str, tensor: Tensor) -> str:
    if not config.get("use_cayley_neumann", False):
        return "triangles"
    if config.get("num_cayley_neumann_terms", TERMS) != TERMS:
        raise FormatError(
            f"unsupported: an OFT by a series of {str(config.get('num_cayley_neumann_terms'))[:10]} terms; known is "
            f"that of {TERMS}. Nothing of it was used."
        )
    return "series"


def _no_limit(config: Mapping[str, Any], source: str) -> Callable[[str, int], LayerFacts]:
    return lambda layer, rank: LayerFacts(rank, 0.0)


def _oft_obstacle(layers: Layers) -> str | None:
    forms = {form for layer in layers.values() for form in layer.tensors}
    if len(forms) > 1 or not forms <= {"triangles", "series"}:
        return (
            "its oft turns inputs, all exactly or all by a series; other turns are LyCORIS's or OneTrainer's"
        )
    sizes, numbers = ({n for n, _ in _oft_shapes(layers)}, {b for _, b in _oft_shapes(layers)})
    if len(numbers) > 1 and (len(sizes) > 1 or 1 in sizes):
        return "its oft has blocks of one size, or one number of blocks"
    if len({n == 1 for n in sizes}) > 1:
        return "its oft shares one block in all layers, or in none"
    return None


def _oft_shapes(layers: Layers) -> list[tuple[int, int]]:
    """(n, b) of every layer."""
    tensors = [tensor for layer in layers.values() for tensor in layer.tensors.values()]
    return [(tensor.shape[0], triangle_size(tensor.shape[1])) for tensor in tensors]


def _oft_fields(layers: Layers) -> dict[str, Any]:
    shapes = _oft_shapes(layers)
    number, size = shapes[0]
    one_size = len({b for _, b in shapes}) == 1
    return {
        "r": 0 if one_size else number,
        "oft_block_size": size if one_size else 0,
        "block_share": number == 1,
        "use_cayley_neumann": "series" in next(iter(layers.values())).tensors,
        "num_cayley_neumann_terms": TERMS,
        "coft": False,
        "module_dropout": 0.0,
        "init_weights": True,
    }


def projected(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The turns as peft's constrained OFT limits them whenever it is used: blocks beyond the limit are scaled to it.

    Raises:
        FormatError: the limit is no number.
    """
    eps = config.get("eps", 6e-5)
    if not is_number(eps):
        raise FormatError(f"The field eps is malformed: {str(eps)[:40]!r}.")
    found = dict(tensors)
    for name, tensor in tensors.items():
        if not name.endswith(".oft_R.weight") or tensor.ndim != 2:
            continue
        import torch

        limit = float(eps) / tensor.shape[0] ** 0.5
        wide = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
        norm = (2 * wide.square().sum(1, keepdim=True)).sqrt()  # of Q, which has every number twice
        found[name] = torch.where(norm <= limit, wide, wide * (limit / norm.clamp_min(1e-30)))
    return found


def _only(name: str) -> Callable[[LayerState], dict[str, Tensor]]:
    return lambda layer: {name: next(iter(layer.tensors.values()))}


TYPES = {
    kind.name: kind
    for kind in (
        PeftType("LOHA", ("loha",), _same, _ranked, _loha_obstacle, _loha_fields, parts_of),
        PeftType("LOKR", ("lokr",), _same, _ranked, _lokr_obstacle, _lokr_fields, parts_of),
        PeftType("IA3", ("ia3",), _ia3_part, _unranked, _ia3_obstacle, _ia3_fields, _only("ia3_l")),
        PeftType("OFT", ("oft",), _oft_part, _no_limit, _oft_obstacle, _oft_fields, _only("oft_R.weight")),
    )
}
"""Name in the configuration -> type; LoRA is `lora_config.py`'s."""


def type_for(families: Collection[str]) -> PeftType | None:
    """The type that holds layers of these families; None for LoRA's, and where none does."""
    return next((kind for kind in TYPES.values() if set(families) <= set(kind.families)), None)
