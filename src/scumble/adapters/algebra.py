"""Algebra: adapters added into a base's weights, and the exact way back.

Legend: W0 a layer's weight before any merge; s an adapter's strength; d(W0) its weight_delta.

    W = W0 + sum over merged adapters of s * d(W0)        summed in fp32, rounded once to the base's dtype

Subtracting what was added does not give W0 back in fp16 (nor in fp32). So W0 is kept, as the very same
parameter object, and put back when the last merge is undone; a merge undone in the middle makes W again from
W0 and the rest.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from scumble.adapters.adapter import Adapter, naming
from scumble.adapters.delta import Delta
from scumble.adapters.layers import layers_of
from scumble.adapters.operate import Layer
from scumble.adapters.state import LayerPath
from scumble.errors import AdapterError


@dataclass(frozen=True)
class _Share:
    """What one merge adds to one layer: deltas as they were then, with their strengths."""

    parts: tuple[tuple[Delta, float], ...]


@dataclass
class _Ledger:
    """A merged layer's own weight, and what is added to it now, in the order of the merges."""

    original: nn.Parameter
    shares: dict[Merged, _Share] = field(default_factory=dict)


_LEDGERS: weakref.WeakKeyDictionary[nn.Module, _Ledger] = weakref.WeakKeyDictionary()


class Merged:
    """Adapters merged into a base. `undo` gives the base back, bit for bit; so does leaving a `with` block.

    Law: after every merge of a layer is undone, in any order, its `weight` is the very same parameter object
    with the very same bits, in any dtype, and the adapters are attached as before.
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
        weights: list[tuple[Layer, nn.Parameter]] = []
        for path, layer in self._layers.items():
            ledger = _LEDGERS[layer]
            _follow(ledger.original, layer)
            rest = [share for merged, share in ledger.shares.items() if merged is not self]
            weights.append((layer, _weight(path, ledger.original, rest)))
        for layer, weight in weights:
            ledger = _LEDGERS[layer]
            del ledger.shares[self]
            layer.weight = weight
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
        AdapterError: a strength is per sample, an adapter brings words, a layer is not there, or a merged weight
            would not be finite. Nothing is changed then.
    """
    adapters = (adapters,) if isinstance(adapters, Adapter) else tuple(adapters)
    layers = layers_of(roots)
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
            if strength != 0.0:
                # A copy: the adapter may train on, the merge stays what it was.
                with naming(path):
                    frozen = type(delta).from_state(layers[path], delta.state()).requires_grad_(False).eval()
                parts.setdefault(path, []).append((frozen, strength))
    changed = {path: layer for path, layer in layers.items() if path in parts}
    weights: dict[LayerPath, nn.Parameter] = {}
    for path, layer in changed.items():
        ledger = _LEDGERS.get(layer)
        before = [] if ledger is None else list(ledger.shares.values())
        original = _parameter(layer) if ledger is None else _follow(ledger.original, layer)
        weights[path] = _weight(path, original, [*before, _Share(tuple(parts[path]))])
    ejected = [adapter for adapter in adapters if adapter.touches(layers.values())]
    merged = Merged(changed, ejected)
    for adapter in ejected:
        adapter.eject()
    for path, layer in changed.items():
        ledger = _LEDGERS.setdefault(layer, _Ledger(_parameter(layer)))
        ledger.shares[merged] = _Share(tuple(parts[path]))
        layer.weight = weights[path]
    return merged


def _parameter(layer: Layer) -> nn.Parameter:
    weight = layer.weight
    assert isinstance(weight, nn.Parameter)
    return weight


def _follow(original: nn.Parameter, layer: Layer) -> nn.Parameter:
    """`original`, moved to where the layer's weight went since (`pipeline.to("cuda")`)."""
    original.data = original.data.to(layer.weight.device, layer.weight.dtype)
    return original


@torch.no_grad()
def _weight(path: LayerPath, original: nn.Parameter, shares: Iterable[_Share]) -> nn.Parameter:
    """W0 + sum of s * d(W0) as a new parameter; W0 itself when there is nothing to add."""
    parts = [part for share in shares for part in share.parts]
    if not parts:
        return original
    wide = original.detach().to(torch.promote_types(original.dtype, torch.float32))
    total = wide.clone()
    for delta, strength in parts:
        total += strength * delta.to(wide.device).weight_delta(wide)
    rounded = total.to(original.dtype)
    if not bool(torch.isfinite(rounded).all()):
        raise AdapterError(
            f"Merging would make the weight of {path!r} infinite or NaN in "
            f"{str(original.dtype).removeprefix('torch.')}. "
            "The model was not changed. Lower the strength, or check the adapter."
        )
    return nn.Parameter(rounded, requires_grad=original.requires_grad)
