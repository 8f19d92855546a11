"""Resizing: the nearest adapter of smaller rank, layer by layer, by truncating its singular values.

No matrix larger than (out, r) is made for a family that is a thin product (see `factors`). The result is a
LoRA at scale 1 (alpha = rank), whose two factors are equally large.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from scumble.adapters.factors import Keep, Weights, factors_of, refuse_other_than_weights, shape_of
from scumble.adapters.families import FAMILIES
from scumble.adapters.state import AdapterState, LayerPath, LayerState
from scumble.errors import AdapterError


@dataclass(frozen=True)
class Resized:
    """An adapter of smaller rank, and what it cost."""

    state: AdapterState
    ranks: Mapping[LayerPath, tuple[int, int]]
    """Layer -> (rank before, rank now)."""
    kept: Mapping[LayerPath, float]
    """Layer -> share of its squared Frobenius norm that is left, in [0, 1]."""
    vanished: tuple[LayerPath, ...]
    """Layers whose change was zero: they are not in the state."""


def resize(state: AdapterState, keep: Keep, weights: Weights | None = None) -> Resized:
    """The nearest adapter that keeps as much of every layer as `keep` says (Eckart and Young, 1936).

    Law: at full rank it is the identity: a layer that keeps its rank is the very same LayerState.

    Args:
        keep: a rank, a share, or both.
        weights: the base's weights, for families whose change depends on them.

    Raises:
        AdapterError: every change is zero; or a family needs `weights`.
    """
    layers: dict[LayerPath, LayerState] = {}
    ranks: dict[LayerPath, tuple[int, int]] = {}
    kept: dict[LayerPath, float] = {}
    vanished = []
    for path, layer in state.layers.items():
        refuse_other_than_weights(path, layer)
        thin = FAMILIES.get(layer.family).thin(layer) is not None
        if (
            thin
            and keep.energy in (None, 1)
            and keep.frobenius in (None, 1)
            and layer.rank <= (keep.rank or layer.rank)
        ):
            layers[path], ranks[path], kept[path] = layer, (layer.rank, layer.rank), 1.0
            continue
        singular = factors_of(path, layer, weights).singular()
        rank = keep.choose(singular.values)
        if rank == 0:
            vanished.append(path)
            continue
        unchanged = thin and rank >= layer.rank
        layers[path] = layer if unchanged else singular.layer(rank, shape_of(path, layer, weights))
        ranks[path] = (layer.rank, rank)
        kept[path] = singular.energy(rank)
    if not layers:
        raise AdapterError(
            f"Every change in this adapter is zero ({len(vanished)} layers): there is nothing to resize."
        )
    return Resized(replace(state, layers=layers), ranks, kept, tuple(vanished))
