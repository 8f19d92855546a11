"""Pairs: two factors of one layer, found under two names in a file, become one LayerState.

Every codec of a LoRA dialect parses names into `Factor`s; what can be wrong with them is checked here.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from scumble.adapters.state import AdapterState, LayerPath, LayerState
from scumble.errors import FormatError
from scumble.formats.container import TensorFile
from scumble.formats.keymap import LayerNames
from scumble.formats.metadata import LayerFacts, from_header

NO_LAYER = "matched no layer"

_UNSUPPORTED = (
    (re.compile(r"\.lora_magnitude_vector(\.weight)?$"), "lora_magnitude_vector (DoRA)"),
    (re.compile(r"\.dora_scale$"), "dora_scale (DoRA)"),
    (re.compile(r"\.magnitude$"), "magnitude (DoRA)"),
    (re.compile(r"\.lora_(B|up)\.bias$"), "lora_B.bias (LoRA with biases)"),
    (re.compile(r"\.lora_(mid|embedding_[AB])(\.weight)?$"), "lora_mid or lora_embedding"),
    (re.compile(r"\.hada_[wt][12](_[ab])?$"), "hada_w1 (LoHa)"),
    (re.compile(r"\.lokr_[wt][12](_[ab])?$"), "lokr_w1 (LoKr)"),
    (re.compile(r"\.(oft_blocks|oft_R(\.weight)?|boft_[Rs])$"), "oft_blocks (OFT)"),
    (re.compile(r"\.diff(_b)?$"), "diff (full matrices)"),
    (re.compile(r"_custom_diffusion\.weight$"), "custom_diffusion (full matrices)"),
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


@dataclass(frozen=True)
class Factor:
    """One tensor's part in a layer."""

    name: str
    """The tensor's name in the file."""
    layer: str
    """The layer as the file spells it."""
    part: str
    """"down", "up" or "alpha"."""


Scales = Callable[[Mapping[str, int]], tuple[Mapping[str, LayerFacts], tuple[str, ...]]]
"""Ranks by layer spelling -> (facts by layer spelling, notes): where a dialect keeps its alphas."""


def refuse_unsupported(names: Iterable[str]) -> None:
    """Refuse a file with tensors of a family that is not known here: without them it draws wrong pictures.

    Raises:
        FormatError: names the tensors and on how many modules they are.
    """
    found: dict[str, set[str]] = defaultdict(set)
    for name in names:
        for pattern, title in _UNSUPPORTED:
            match = pattern.search(name)
            if match:
                found[title].add(name[: match.start()])
    if found:
        listed = ", ".join(f"{title} on {count(modules, 'module')}" for title, modules in found.items())
        raise FormatError(f"unsupported: {listed}. Nothing of the file was used.")


def assemble(
    file: TensorFile,
    factors: Sequence[Factor],
    names: LayerNames,
    scales: Scales,
    ignored: Sequence[str] = (),
) -> Decoded:
    """The AdapterState of a file that was parsed into `factors`; what is in neither list is reported unused.

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
    _refuse_halves(parts)
    ranks = {spelled: _rank(file, spelled, found) for spelled, found in parts.items()}
    facts, notes = scales(ranks)
    layers: dict[LayerPath, LayerState] = {}
    spelling: dict[LayerPath, str] = {}
    used: list[str] = []
    taken = {name for found in parts.values() for name in found.values()} | set(ignored)
    unused = {name: "is of no known kind" for name in file.tensors if name not in taken}
    for spelled, found in parts.items():
        path = names.resolve(spelled)
        if path is None:
            unused |= dict.fromkeys(found.values(), NO_LAYER)
            continue
        if path in layers:
            raise FormatError(
                f"The file describes one layer twice, as {spelling[path]!r} and as {spelled!r}."
            )
        fact = facts[spelled]
        layer: LayerState | None = LayerState(
            family="lora",
            rank=fact.rank,
            alpha=fact.alpha,
            tensors={part: file.tensors[found[part]] for part in ("down", "up")},
            rank_stabilized=fact.rank_stabilized,
        )
        shape = names.shape(path)
        if layer is not None and shape is not None:
            layer = fit(layer, shape)
        if layer is None:
            down, up = file.tensors[found["down"]].shape, file.tensors[found["up"]].shape
            mine = (up[0], *down[1:])
            unused |= dict.fromkeys(
                found.values(), f"change a weight of {mine}, where the model has {tuple(shape or ())}"
            )
            continue
        layers[path] = layer
        spelling[path] = spelled
        used += found.values()
    state = AdapterState(layers, metadata=from_header(file.metadata))
    return Decoded(state, tuple(used), unused, tuple(ignored), notes if layers else (), tuple(parts))


def _refuse_halves(parts: Mapping[str, Mapping[str, str]]) -> None:
    halves = [found for found in parts.values() if "down" not in found or "up" not in found]
    if halves:
        first = next(iter(halves[0].values()))
        raise FormatError(
            f"{count(halves, 'layer')} of {len(parts)} {'has' if len(halves) == 1 else 'have'} only one of "
            f"the two factors; the first is {first!r}. The file is damaged or was edited. Not applied."
        )


def _rank(file: TensorFile, spelled: str, found: Mapping[str, str]) -> int:
    down, up = file.tensors[found["down"]], file.tensors[found["up"]]
    shapes = f"{tuple(down.shape)} and {tuple(up.shape)}"
    if (
        down.ndim != up.ndim
        or down.ndim not in (2, 4)
        or up.shape[1] != down.shape[0]
        or up.shape[2:].numel() != 1
    ):
        raise FormatError(
            f"The factors of {spelled!r} have shapes {shapes}; expected (rank, in) and (out, rank), or "
            "(rank, in, k, k) and (out, rank, 1, 1) for a convolution. Not applied."
        )
    if not (down.is_floating_point() and up.is_floating_point()):
        raise FormatError(
            f"The factors of {spelled!r} are {down.dtype} and {up.dtype}; expected floating point."
        )
    return down.shape[0]


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

    A 1x1 convolution and a linear layer are one thing; its factors are reshaped to what the weight is.
    """
    down, up = layer.tensors["down"], layer.tensors["up"]
    if tuple(down.shape[1:]) == tuple(weight[1:]) and up.shape[0] == weight[0]:
        return layer
    if up.shape[0] != weight[0] or down[0].numel() != weight[1] or any(side != 1 for side in weight[2:]):
        return None
    tail = (1,) * (len(weight) - 2)
    tensors: dict[str, Tensor] = {
        "down": down.reshape(layer.rank, weight[1], *tail),
        "up": up.reshape(weight[0], layer.rank, *tail),
    }
    return LayerState(layer.family, layer.rank, layer.alpha, tensors, layer.rank_stabilized)
