"""Algebra: adapters added into a base's weights, and the exact way back.

Legend: W0 a layer's weight before any merge; s an adapter's strength; d(W0) its weight_delta.

    W = W0 + sum over merged adapters of s * d(W0)        summed in fp32, rounded once to the base's dtype

and as much for the bias, where adapters change it.

Subtracting what was added does not give W0 back in fp16 (nor in fp32). So W0 is kept, as the very same
parameter object, and put back when the last merge is undone, which copies nothing; a merge undone in the middle
makes W again from W0 and the rest. Its price is memory: while merged, each changed weight is there twice (187 MB in
fp16 for the attention layers of SD 1.5, 374 in fp32).

A merge reads W0 once and writes W once; what is in between happens layer by layer, in the processor's cache.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from scumble.adapters.adapter import Adapter, naming
from scumble.adapters.biased import delta_of
from scumble.adapters.delta import Delta
from scumble.adapters.layers import layers_of
from scumble.adapters.memory import like
from scumble.adapters.operate import Held, Layer
from scumble.adapters.state import LayerPath, LayerState
from scumble.errors import AdapterError


@dataclass(frozen=True)
class _Share:
    """What one merge adds to one layer: deltas as they were then, with their strengths."""

    parts: tuple[tuple[Delta, float], ...]


@dataclass
class _Ledger:
    """A merged layer's own weight, and what is added to it now, in the order of the merges."""

    original: nn.Parameter
    bias: nn.Parameter | None
    shares: dict[Merged, _Share] = field(default_factory=dict)

    def follow(self, layer: Layer) -> _Ledger:
        """This, its tensors moved to where the layer's weight went since (`pipeline.to("cuda")`)."""
        for parameter in (self.original, self.bias):
            if parameter is not None:
                parameter.data = parameter.data.to(layer.weight.device, layer.weight.dtype)
        return self


_LEDGERS: weakref.WeakKeyDictionary[nn.Module, _Ledger] = weakref.WeakKeyDictionary()


_HARMLESS = 1e30
"""What a number of fp32 can be changed by and stay finite, as weights are: no base's come near 1e38."""


class _Room:
    """Where merged weights go, all in one memory, and one wide weight at a time on its way there: new memory for
    each would cost more than the sums."""

    def __init__(self, weights: Mapping[LayerPath, nn.Parameter]) -> None:
        originals = [weight.detach() for weight in weights.values()]
        self._places = dict(zip(weights, like(originals), strict=True))
        self._wide: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def copied(self, path: LayerPath, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """The weight in `dtype`: in its place if that has this dtype, else until the next one is asked for."""
        place = self._places[path]
        if place.dtype == dtype:
            return place.copy_(weight)
        room = self._wide.get((weight.device, dtype))
        if room is None or room.numel() < weight.numel():
            room = torch.empty(weight.numel(), dtype=dtype, device=weight.device)
            self._wide[weight.device, dtype] = room
        return room[: weight.numel()].view(weight.shape).copy_(weight)

    def rounded(self, path: LayerPath, total: Tensor) -> Tensor:
        """What was copied and changed, in its place and dtype."""
        place = self._places[path]
        return total if total is place else place.copy_(total)


class Merged:
    """Adapters merged into a base. `undo` gives the base back, bit for bit; so does leaving a `with` block.

    Law: after every merge of a layer is undone, in any order, its `weight` and `bias` are the very same parameter
    objects with the very same bits, in any dtype, and the adapters are attached as before.
    """

    def __init__(self, layers: Mapping[LayerPath, Layer], ejected: Sequence[Adapter]) -> None:
        self._layers = dict(layers)
        self._ejected = tuple(ejected)
        self.active = True
        """Whether the adapters are in the weights now."""

    @property
    def layers(self) -> tuple[LayerPath, ...]:
        """The paths of the layers whose weight was changed."""
        return tuple(self._layers)

    def undo(self) -> None:
        """Take the adapters out of the weights, and attach those again that were attached before.

        Raises:
            AdapterError: it was undone before.
        """
        if not self.active:
            raise AdapterError("This merge was undone before.")
        ledgers = {path: _LEDGERS[layer].follow(layer) for path, layer in self._layers.items()}
        rest = {
            path: [share for merged, share in ledger.shares.items() if merged is not self]
            for path, ledger in ledgers.items()
        }
        weights = _weights({path: ledger.original for path, ledger in ledgers.items()}, rest)
        biases = {path: _bias(path, ledger, rest[path]) for path, ledger in ledgers.items()}
        for path, layer in self._layers.items():
            ledger = ledgers[path]
            del ledger.shares[self]
            layer.weight, layer.bias = weights[path], biases[path]
            if not ledger.shares:
                del _LEDGERS[layer]
        self.active = False
        for adapter in self._ejected:
            if not adapter.attached:
                adapter.attach()

    def __enter__(self) -> Merged:
        return self

    def __exit__(self, *_: object) -> None:
        if self.active:
            self.undo()


@torch.no_grad()
def merge(adapters: Adapter | Sequence[Adapter], roots: Mapping[str, nn.Module]) -> Merged:
    """Add the adapters, at their present strengths, to the weights of `roots`.

    The layers are found by path, so that `roots` may be the model that the adapters are attached to or
    another one of the same shape. Adapters attached to these very layers are ejected while merged: they would
    act twice. The base then runs at its own speed, at the cost of a second copy of each changed weight.

    Args:
        adapters: one or several, each with one number as strength.
        roots: name -> module.

    Raises:
        AdapterError: a strength is per sample, an adapter brings words, a layer is not there or is held in few bits,
            or a merged weight would not be finite. Nothing is changed then.
    """
    adapters = (adapters,) if isinstance(adapters, Adapter) else tuple(adapters)
    layers = layers_of(roots, norms=True)
    parts: dict[LayerPath, list[tuple[Delta, float]]] = {}
    for adapter in adapters:
        strength = adapter.strength
        if isinstance(strength, Tensor):
            raise AdapterError(
                f"Adapter {adapter.name!r} has one strength per sample, but all samples share the weights. "
                "Set its strength to one number before merging."
            )
        if adapter.tokens is not None:
            raise AdapterError(
                f"Adapter {adapter.name!r} brings the words {', '.join(adapter.tokens.vectors)}, which are in no "
                "layer's weight: merging would lose them. Load its layers alone (a state without tokens), merge "
                "those, and keep the words in a file of their own."
            )
        for path, delta in adapter.deltas.items():
            if path not in layers:
                raise AdapterError(
                    f"Adapter {adapter.name!r} changes {path!r}, which is not in this model "
                    f"(its parts: {', '.join(roots)})."
                )
            if isinstance(layer := layers[path], Held):
                raise AdapterError(
                    f"Adapter {adapter.name!r} changes {path!r}, whose weight is held in {layer.held_in}: what a merge "
                    "adds would be rounded away with it. Leave the adapter attached, where it acts exactly, or load "
                    'the base as it is (quantization = "none") and merge there.'
                )
            if strength != 0.0:
                # A copy: the adapter may train on, the merge stays what it was.
                with naming(path):
                    parts.setdefault(path, []).append((_snapshot(delta, layers[path]), strength))
    changed = {path: layer for path, layer in layers.items() if path in parts}
    ledgers = {
        path: (_LEDGERS.get(layer) or _Ledger(_parameter(layer), _own_bias(layer))).follow(layer)
        for path, layer in changed.items()
    }
    shares = {path: [*ledger.shares.values(), _Share(tuple(parts[path]))] for path, ledger in ledgers.items()}
    weights = _weights({path: ledger.original for path, ledger in ledgers.items()}, shares)
    biases = {path: _bias(path, ledger, shares[path]) for path, ledger in ledgers.items()}
    ejected = [adapter for adapter in adapters if adapter.touches(layers.values())]
    merged = Merged(changed, ejected)
    for adapter in ejected:
        adapter.eject()
    for path, layer in changed.items():
        ledger = _LEDGERS.setdefault(layer, ledgers[path])
        ledger.shares[merged] = shares[path][-1]
        layer.weight, layer.bias = weights[path], biases[path]
    return merged


def _snapshot(delta: Delta, layer: Layer) -> Delta:
    """A frozen copy, made in a fraction of the time of a new one; it fits the layer.

    Raises:
        AdapterError: it doesn't.
    """
    if delta._modules:  # one in another
        return delta_of(layer, delta.state()).requires_grad_(False).eval()
    tensors = dict(delta.named_parameters())
    delta.check_fits(layer, LayerState(delta.family, delta.rank, delta.alpha, tensors, delta.rank_stabilized))
    twin = copy.copy(delta)
    twin.__dict__["_parameters"] = {
        name: nn.Parameter(tensor.detach().clone(), requires_grad=False) for name, tensor in tensors.items()
    }
    return twin.eval()


def _parameter(layer: Layer) -> nn.Parameter:
    weight = layer.weight
    assert isinstance(weight, nn.Parameter)
    return weight


def _own_bias(layer: Layer) -> nn.Parameter | None:
    bias = layer.bias
    assert bias is None or isinstance(bias, nn.Parameter)
    return bias


@torch.no_grad()
def _weights(
    originals: Mapping[LayerPath, nn.Parameter], shares: Mapping[LayerPath, Iterable[_Share]]
) -> dict[LayerPath, nn.Parameter]:
    """W0 + sum of s * d(W0) as a new parameter for each layer; W0 itself where there is nothing to add."""
    parts = {path: [part for share in shares[path] for part in share.parts] for path in originals}
    room = _Room({path: original for path, original in originals.items() if parts[path]})
    return {
        path: _weight(path, original, parts[path], room) if parts[path] else original
        for path, original in originals.items()
    }


def _weight(
    path: LayerPath, original: nn.Parameter, parts: Sequence[tuple[Delta, float]], room: _Room
) -> nn.Parameter:
    weight = original.detach()
    dtype = torch.promote_types(weight.dtype, torch.float32)
    total = room.copied(path, weight, dtype)
    for delta, strength in parts:
        _on(delta, total.device).add_change(total, weight, strength)
    made = room.rounded(path, total)
    # asking a fp32 weight's every number takes a fifth of the merge, and a small change can't make one infinite
    if dtype != weight.dtype or not sum(abs(s) * delta.largest() for delta, s in parts) < _HARMLESS:
        _refuse_non_finite(f"the weight of {path!r}", made)
    return nn.Parameter(made, requires_grad=original.requires_grad)


@torch.no_grad()
def _bias(path: LayerPath, ledger: _Ledger, shares: Iterable[_Share]) -> nn.Parameter | None:
    """The bias with what adapters add to it as a new parameter; its own, or none, when there is nothing to add."""
    original, like = ledger.bias, ledger.original
    wide = None if original is None else original.detach().to(torch.promote_types(like.dtype, torch.float32))
    changes = [
        strength * change
        for share in shares
        for delta, strength in share.parts
        if (change := _on(delta, like.device).bias_delta(wide)) is not None
    ]
    if not changes:
        return original
    total = sum(changes[1:], changes[0])
    made = (total if wide is None else wide + total).to(like.dtype)
    _refuse_non_finite(f"the bias of {path!r}", made)
    return nn.Parameter(made, requires_grad=like.requires_grad)


def _on(delta: Delta, device: torch.device) -> Delta:
    """`delta`, on that device; torch's own `to` takes as long as merging a small layer."""
    return delta if next(delta.parameters()).device == device else delta.to(device)


def _refuse_non_finite(what: str, made: Tensor) -> None:
    # The sum first: asking every number takes longer than the merge. NaN and infinity can't hide in it.
    if not bool(made.sum().isfinite()) and not bool(torch.isfinite(made).all()):
        raise AdapterError(
            f"Merging would make {what} infinite or NaN in {str(made.dtype).removeprefix('torch.')}. "
            "The model was not changed. Lower the strength, or check the adapter."
        )
