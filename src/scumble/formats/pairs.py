"""Pairs: two factors of one layer, found under two names in a file, become one LayerState.

Every codec of a LoRA dialect parses names into `Factor`s; what can be wrong with them is checked here.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

from scumble.adapters.shapes import weight_shape
from scumble.adapters.state import AdapterState, LayerPath, LayerState
from scumble.errors import FormatError
from scumble.formats.container import TensorFile
from scumble.formats.keymap import Names
from scumble.formats.kinds import (
    bias_tensors,
    fit_tensors,
    kind_of,
    magnitude,
    split_ending,
    state_of,
)
from scumble.formats.metadata import LAYERS, LayerFacts, from_header, layer_facts
from scumble.formats.stored import scalar

if TYPE_CHECKING:
    from torch import Tensor

NO_LAYER = "matched no layer"
NO_KIND = "matched no known kind"

_UNSUPPORTED = (
    (re.compile(r"\.lora_embedding_[AB](\.weight)?$"), "lora_embedding"),
    (re.compile(r"\.oft_diag$"), "oft_diag (the first OFT and BOFT of LyCORIS, which stored something else)"),
    (re.compile(r"\.boft_[Rs]$"), "boft_R (peft's BOFT, which shuffles otherwise than that of LyCORIS)"),
    (re.compile(r"\.dora_multiplier$"), "dora_multiplier (DoRA on top of OFT)"),
    (re.compile(r"\.bm\.weight$"), "bm (GLoRA with a kernel apart)"),
    (re.compile(r"\.ia3_l$"), "ia3_l (IA3 in peft's spelling)"),
    (re.compile(r"\.lokr_t1$"), "lokr_t1 (LoKr with two cores)"),
    (re.compile(r"_custom_diffusion\.weight$"), "custom_diffusion (Custom Diffusion: whole matrices)"),
)


@dataclass(frozen=True)
class Decoded:
    """A file's content, with an account of every tensor."""

    state: AdapterState
    used: tuple[str, ...]
    """Names of tensors that are in `state`."""
    unused: Mapping[str, str] = field(default_factory=dict)
    """Names of tensors that are not -> why."""
    ignored: tuple[str, ...] = ()
    """Names of tensors that carry nothing by the dialect's own rules."""
    notes: tuple[str, ...] = ()
    """What had to be assumed."""
    layers: tuple[str, ...] = ()
    """Every layer that the file describes, found in the base or not, as it spells them."""


class Factor(NamedTuple):
    """One tensor's part in a layer."""

    name: str
    """The tensor's name in the file."""
    layer: str
    """The layer as the file spells it."""
    part: str
    """"down", "up", "mid", "alpha", or one of `kinds.py`."""


_FACTORS = (
    (re.compile(r"(.+)\.lora_A(?:\.default)?\.weight"), "down"),
    (re.compile(r"(.+)\.lora_B(?:\.default)?\.weight"), "up"),
    (re.compile(r"(.+)\.lora(?:_linear_layer)?\.down\.weight"), "down"),
    (re.compile(r"(.+)\.lora(?:_linear_layer)?\.up\.weight"), "up"),
    (re.compile(r"(.+)\.lora_down\.weight"), "down"),
    (re.compile(r"(.+)\.lora_up\.weight"), "up"),
    (re.compile(r"(.+)\.lora_mid\.weight"), "mid"),
    (re.compile(r"(.+)\.alpha"), "alpha"),
)


@lru_cache(maxsize=2**15)
def split_factor(name: str) -> tuple[str, str]:
    """(layer, part) of a tensor's name, in whatever way its tool calls the parts; part is empty for others."""
    for pattern, part in _FACTORS:
        if match := pattern.fullmatch(name):
            return match[1], part
    return split_ending(name)


_LONE = re.compile(r"\.lora_down\.weight$")
"""What ai-toolkit calls the whole matrix of a layer, beside an alpha and nothing else."""

Scales = Callable[[Mapping[str, int]], tuple[Mapping[str, LayerFacts], tuple[str, ...]]]
"""Ranks by layer spelling -> (facts by layer spelling, notes): where a dialect keeps its alphas."""


def refuse_unsupported(names: Iterable[str]) -> None:
    """Refuse a file with tensors of a family that is not known here: without them it draws wrong pictures.

    Raises:
        FormatError: names the tensors and on how many modules they are.
    """
    found: dict[str, set[str]] = defaultdict(set)
    for name in names:
        for title, module in _unsupported(name):
            found[title].add(module)
    if found:
        listed = ", ".join(f"{title} on {count(modules, 'module')}" for title, modules in found.items())
        raise FormatError(f"unsupported: {listed}. Nothing of the file was used.")


@lru_cache(maxsize=2**15)
def _unsupported(name: str) -> tuple[tuple[str, str], ...]:
    """(title, module) of each family that is not known here and has tensors called so."""
    matches = ((title, pattern.search(name)) for pattern, title in _UNSUPPORTED)
    return tuple((title, name[: match.start()]) for title, match in matches if match)


def assemble(
    file: TensorFile,
    factors: Sequence[Factor],
    names: Names,
    scales: Scales,
    ignored: Sequence[str] = (),
    *,
    ranked: bool = False,
) -> Decoded:
    """The AdapterState of a file that was parsed into `factors`; what is in neither list is reported unused.

    `ranked`: whether `scales` speak of layers whose tensors tell no rank as well; else the scale of those is 1.

    Raises:
        FormatError: a factor without its partner, ranks that disagree, two tensors for one place.
    """
    parts: dict[str, dict[str, str]] = defaultdict(dict)
    for factor in factors:
        if factor.part in parts[factor.layer]:
            raise FormatError(
                f"Two tensors claim one place: {parts[factor.layer][factor.part]!r} and {factor.name!r}."
            )
        parts[factor.layer][factor.part] = factor.name
    _refuse_halves({spelled: found for spelled, found in parts.items() if kind_of(found) is None})
    bare = {spelled: _bare(file, spelled, found) for spelled, found in parts.items()}
    ranks = {spelled: layer.rank or _untold_rank(file, spelled, parts) for spelled, layer in bare.items()}
    unranked = {spelled for spelled, layer in bare.items() if not layer.rank}
    if ranked or LAYERS in file.metadata:
        unranked = set()
    facts, notes = scales({spelled: rank for spelled, rank in ranks.items() if spelled not in unranked})
    layers: dict[LayerPath, LayerState] = {}
    spelling: dict[LayerPath, str] = {}
    used: list[str] = []
    taken = {name for found in parts.values() for name in found.values()} | set(ignored)
    unused = {name: NO_KIND for name in file.tensors if name not in taken}
    for spelled, found in parts.items():
        path = names.resolve(spelled)
        if path is None:
            unused |= dict.fromkeys(found.values(), NO_LAYER)
            continue
        if path in layers:
            raise FormatError(
                f"The file describes one layer twice, as {spelling[path]!r} and as {spelled!r}."
            )
        # where there is no rank, the scale is 1
        fact = LayerFacts(ranks[spelled], float(ranks[spelled])) if spelled in unranked else facts[spelled]
        family, tensors = bare[spelled].family, bare[spelled].tensors
        layer: LayerState | None
        layer = LayerState(family, fact.rank, fact.alpha, tensors, fact.rank_stabilized)
        shape = names.shape(path)
        if shape is not None:
            layer = fit(layer, shape)
        if layer is None:
            mine = weight_shape(bare[spelled])
            unused |= dict.fromkeys(
                found.values(), f"would change a weight of {mine}, where the model has {tuple(shape or ())}"
            )
            continue
        layers[path] = layer
        spelling[path] = spelled
        used += found.values()
    state = AdapterState(layers, metadata=from_header(file.metadata))
    folded = sum("mid" in parts[spelled] for spelled in spelling.values())
    if folded:
        notes = (*notes, f"lora_mid of {count(folded, 'layer')} folded into its lora_down, exactly")
    labels = tuple(names.labelled(spelled) for spelled in parts)
    return Decoded(state, tuple(used), unused, tuple(ignored), notes if layers else (), labels)


def _refuse_halves(parts: Mapping[str, Mapping[str, str]]) -> None:
    halves = [found for found in parts.values() if "down" not in found or "up" not in found]
    whole = [found for found in halves if found.keys() == {"down", "alpha"} and _LONE.search(found["down"])]
    if halves and len(whole) == len(parts):
        raise FormatError(
            f"unsupported: lora_down without lora_up on {count(whole, 'module')}, first {whole[0]['down']!r}: "
            "ai-toolkit's fullrank, which holds whole matrices. Nothing of the file was used; train it there as lora."
        )
    if halves:
        first = min(halves[0].items(), key=lambda item: item[0] == "alpha")[1]
        raise FormatError(
            f"{count(halves, 'layer')} of {len(parts)} {'has' if len(halves) == 1 else 'have'} only one of "
            f"the two factors; the first is {first!r}. The file is damaged or was edited. Not applied."
        )


def _bare(file: TensorFile, spelled: str, found: Mapping[str, str]) -> LayerState:
    """A layer's family and tensors; its rank is 0 where the tensors tell none."""
    kind = kind_of(found)
    if kind is not None:
        return state_of(kind, spelled, {part: file.tensors[name] for part, name in found.items()})
    rank = _rank(file, spelled, found)
    tensors = _factors(file, found)
    shape = (tensors["up"].shape[0], *tensors["down"].shape[1:])
    parts = {part: file.tensors[name] for part, name in found.items()}
    extra = magnitude(spelled, parts, shape)
    family = "dora" if extra else "lora"
    sides = bias_tensors(spelled, parts, shape[0])
    return LayerState(family, rank, float(rank), {**tensors, **extra, **sides})


def _untold_rank(file: TensorFile, spelled: str, parts: Mapping[str, object]) -> int:
    """The rank of a layer whose tensors tell none: what our header says, else its alpha, else 1."""
    ours = layer_facts(file.metadata, parts)
    if ours is not None:
        return ours[spelled].rank
    alpha = file.tensors.get(spelled + ".alpha")
    value = float(alpha) if alpha is not None and alpha.numel() == 1 else 1.0
    return int(value) if value.is_integer() and 0 < value < 2**31 else 1


def _rank(file: TensorFile, spelled: str, found: Mapping[str, str]) -> int:
    down, up = file.tensors[found["down"]], file.tensors[found["up"]]
    if (
        down.ndim not in (2, 4)
        or up.ndim not in (2, 4)
        or up.shape[1] != down.shape[0]
        or math.prod(up.shape[2:]) != 1
    ):
        raise FormatError(
            f"The factors of {spelled!r} have shapes {tuple(down.shape)} and {tuple(up.shape)}; expected "
            "(rank, in) and (out, rank), or (rank, in, k, k) and (out, rank, 1, 1) for a convolution. Not applied."
        )
    refuse_integers(spelled, down, up)
    if "mid" in found:
        mid, rank = file.tensors[found["mid"]], down.shape[0]
        if mid.ndim != 4 or tuple(mid.shape[:2]) != (rank, rank) or math.prod(down.shape[2:]) != 1:
            raise FormatError(
                f"{found['mid']!r} has shape {tuple(mid.shape)}; expected (rank, rank, k, k) between factors "
                f"of kernel 1, which have {tuple(down.shape)} and {tuple(up.shape)}. Not applied."
            )
        if not mid.is_floating_point():
            raise FormatError(f"{found['mid']!r} is {mid.dtype}; expected floating point.")
    return down.shape[0]


def _factors(file: TensorFile, found: Mapping[str, str]) -> dict[str, Tensor]:
    """`down` and `up` of a layer, with as many dimensions as each other, and what was between them folded in."""
    down, up = file.tensors[found["down"]], file.tensors[found["up"]]
    if "mid" in found:
        # W[o, i] = up[o, m] mid[m, n] down[n, i] in every place of the kernel: (up) (mid down) has rank r too
        import torch

        mid = file.tensors[found["mid"]]
        wide = torch.float64 if torch.float64 in (down.dtype, mid.dtype) else torch.float32
        down = torch.einsum("mnkl,ni->mikl", mid.to(wide), down.to(wide).flatten(1))
    if up.ndim < down.ndim:
        up = up.reshape(*up.shape, 1, 1)
    if up.ndim > down.ndim:
        up = up.flatten(1)
    return {"down": down, "up": up}


def refuse_integers(layer: str, down: Tensor, up: Tensor) -> None:
    """Raises FormatError where the factors of a layer are no floating-point numbers."""
    if not (down.is_floating_point() and up.is_floating_point()):
        raise FormatError(
            f"The factors of {layer!r} are {down.dtype} and {up.dtype}; expected floating point."
        )


def alpha_tensor(layer: LayerState) -> Tensor:
    """The alpha by which alpha / rank is the layer's scale, as a tensor of fp32."""
    return scalar(layer.scale * layer.rank, next(iter(layer.tensors.values()), None))


def beyond_lora(state: AdapterState) -> str | None:
    """Why a dialect that holds LoRA's pairs and nothing else can't hold this; None when it can."""
    if state.tokens:
        return "it has no place for learned tokens"
    foreign = sorted({layer.family for layer in state.layers.values()} - {"lora"})
    return f"it holds lora, not {', '.join(foreign)}" if foreign else None


def check_lora(path: LayerPath, layer: LayerState) -> None:
    """A LayerState that a LoRA dialect is asked to write.

    Raises:
        FormatError: its tensors contradict its rank.
    """
    tensors = layer.tensors
    if (
        set(tensors) != {"down", "up"}
        or tensors["down"].shape[0] != layer.rank
        or tensors["up"].shape[1] != layer.rank
    ):
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        raise FormatError(
            f"Layer {path!r} says rank {layer.rank}, its tensors are {shapes}. Nothing was written."
        )


def count(things: Iterable[object] | int, word: str) -> str:
    """`"1 layer"`, `"2 layers"`."""
    number = things if isinstance(things, int) else sum(1 for _ in things)
    return f"{number} {word}{'' if number == 1 else 's'}"


def fit(layer: LayerState, weight: Sequence[int]) -> LayerState | None:
    """`layer` for a weight of shape (out, in) or (out, in, k, k), or None when it does not fit.

    A 1x1 convolution and a linear layer are one thing, and a convolution's `down` may be flat: (rank, in k k).
    The factors are reshaped to what the weight is.
    """
    if layer.family != "lora":
        return fit_tensors(layer, weight)
    down, up = layer.tensors["down"], layer.tensors["up"]
    if tuple(down.shape[1:]) == tuple(weight[1:]) and up.shape[0] == weight[0]:
        return layer
    plain = math.prod(down.shape[2:]) == 1  # also when there is nothing after (rank, in)
    if up.shape[0] != weight[0] or not plain or math.prod(down.shape[1:]) != math.prod(weight[1:]):
        return None
    tensors: dict[str, Tensor] = {
        **layer.tensors,
        "down": down.reshape(layer.rank, *weight[1:]),
        "up": up.reshape(weight[0], layer.rank, *(1,) * (len(weight) - 2)),
    }
    return LayerState(layer.family, layer.rank, layer.alpha, tensors, layer.rank_stabilized)
