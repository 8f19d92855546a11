"""Overlap: how far two adapters meet in each layer, and whether they disagree there, told from weights alone.

Legend: A and B the two changes to one weight, (out, in); U their left and V their right singular vectors.

A change reads from a subspace of the layer's inputs (spanned by V) and writes into one of its outputs (spanned
by U). Within one layer two adapters act on the same only where both coincide: B must react to what A reads, and write
where A writes. This tells where they meet, not whether pictures suffer: how large the changes are, and what the layers
after them make of both, no share here knows.

    right      mean squared cosine of the principal angles between the V: 0 they read nothing in common,
               1 they read the same (Bjorck and Golub, 1973)
    left       the same between the U: what they write
    agreement  cosine between A and B as vectors: 1 one change, -1 its opposite, 0 unrelated
    conflict   (share of the changes' energy that meets on both sides) * (1 - agreement) / 2: 0 they don't meet or
               are one, 0.5 they meet fully and want unrelated things, 1 they cancel

Two random subspaces of r of n dimensions overlap by r / n already: `chance` says how much that is.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from scumble.adapters.factors import Keep, Singular, Weights, factors_of, shape_of
from scumble.adapters.state import AdapterState, LayerPath
from scumble.errors import AdapterError, WrongBase


@dataclass(frozen=True)
class LayerOverlap:
    """How two changes to one weight lie to each other. All shares in [0, 1]; see the top of this file."""

    left: float
    right: float
    agreement: float
    """In [-1, 1]."""
    conflict: float
    chance_left: float
    """`left` of two random subspaces of these sizes, on average."""
    chance_right: float
    norms: tuple[float, float]
    """Frobenius norms of A and B, at strength 1."""

    @property
    def weight(self) -> float:
        """How much this layer counts in a summary: |A| |B|."""
        return self.norms[0] * self.norms[1]


@dataclass(frozen=True)
class Overlap:
    """How two adapters lie to each other."""

    layers: Mapping[LayerPath, LayerOverlap]
    """The layers that both change."""
    only_first: tuple[LayerPath, ...]
    only_second: tuple[LayerPath, ...]

    def mean(self, name: str, paths: Iterable[LayerPath] | None = None) -> float:
        """Mean of "left", "right", "agreement", "conflict", ... over `paths` (all when None), each layer counted
        by `weight`."""
        chosen = [self.layers[p] for p in (self.layers if paths is None else paths)]
        total = sum(layer.weight for layer in chosen)
        return sum(getattr(layer, name) * layer.weight for layer in chosen) / total if total else 0.0


def overlap(
    first: AdapterState,
    second: AdapterState,
    weights: Weights | None = None,
    *,
    energy: float = 0.99,
) -> Overlap:
    """Compare two adapters layer by layer, before anything is drawn.

    Laws: overlap(A, A) is left = right = agreement = 1 and conflict = 0; overlap(A, -A) is left = right =
    conflict = 1; orthogonal changes give 0 everywhere.

    Args:
        weights: the base's weights, for families whose change depends on them.
        energy: a change's subspaces are those that hold this share of its squared norm; less leaves out the
            directions that training hardly used.

    Raises:
        WrongBase: a weight has different shapes in the two.
        AdapterError: they have no layer in common, or a change is zero everywhere.
    """
    layers: dict[LayerPath, LayerOverlap] = {}
    common = [path for path in first.layers if path in second.layers]
    if not common:
        raise AdapterError(
            f"The adapters have no layer in common ({len(first.layers)} and {len(second.layers)} layers): they "
            "can't disturb each other within a layer."
        )
    keep = Keep(energy=energy)
    for path in common:
        one, two = first.layers[path], second.layers[path]
        shapes = shape_of(path, one, weights), shape_of(path, two, weights)
        if shapes[0][:2] != shapes[1][:2]:
            raise WrongBase(
                f"These adapters are for different bases: {path!r} is {shapes[0]} in the first and {shapes[1]} in "
                "the second."
            )
        a, b = (factors_of(path, layer, weights).singular() for layer in (one, two))
        if len(a.values) and len(b.values):
            layers[path] = _compare(a, b, keep)
    if not layers:
        raise AdapterError(
            "In every common layer one of the adapters changes nothing: there is nothing to compare."
        )
    return Overlap(
        layers,
        tuple(path for path in first.layers if path not in second.layers),
        tuple(path for path in second.layers if path not in first.layers),
    )


def _compare(a: Singular, b: Singular, keep: Keep) -> LayerOverlap:
    # whole changes for the agreement, main directions for the subspaces
    inner = float(torch.sum((a.left.T @ b.left) * (a.right @ b.right.T) * a.values[:, None] * b.values))
    norms = float(a.values.norm()), float(b.values.norm())
    agreement = max(-1.0, min(1.0, inner / (norms[0] * norms[1])))
    a, b = _main(a, keep), _main(b, keep)
    left, right = a.left.T @ b.left, a.right @ b.right.T
    smaller = min(len(a.values), len(b.values))
    larger = max(len(a.values), len(b.values))
    # ||P_U(A) B P_V(A)||^2 / ||B||^2: the share of B that happens where A happens; and the other way round
    b_in_a = _energy(left * b.values @ right.T) / _energy(b.values)
    a_in_b = _energy(left.T * a.values @ right) / _energy(a.values)
    return LayerOverlap(
        left=min(1.0, _energy(left) / smaller),
        right=min(1.0, _energy(right) / smaller),
        agreement=agreement,
        conflict=min(1.0, math.sqrt(a_in_b * b_in_a)) * (1 - agreement) / 2,
        chance_left=min(1.0, larger / a.left.shape[0]),
        chance_right=min(1.0, larger / a.right.shape[1]),
        norms=norms,
    )


def _main(change: Singular, keep: Keep) -> Singular:
    rank = keep.choose(change.values)
    return Singular(change.left[:, :rank], change.values[:rank], change.right[:rank])


def _energy(matrix: Tensor) -> float:
    return float(matrix.square().sum())
