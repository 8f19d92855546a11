"""Factors: the change to a weight as a product of two thin matrices, and its singular values.

Legend: D (out, in) a change, flattened after its first axis; D = left @ right with left (out, r), right (r, in).

The singular values of D are those of a small core: with left = Q1 R1 and right^T = Q2 R2, D = Q1 (R1 R2^T) Q2^T
and the core R1 R2^T is (r, r). D itself, thousands by thousands, is never made. Everything here is fp64.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from scumble.adapters.biased import changes_bias
from scumble.adapters.families import FAMILIES
from scumble.adapters.lora import Lora
from scumble.adapters.operate import Layer
from scumble.adapters.shapes import is_whole, whole_shape
from scumble.adapters.state import LayerPath, LayerState
from scumble.errors import AdapterError, ConfigError

NOTHING = 1e-7
"""Singular values below this share of the largest are rounding of the fp32 that adapters are stored in."""

Weights = Mapping[LayerPath, Tensor]
"""The base's weights by layer path. Values may be read from disk when they are asked for."""


@dataclass(frozen=True)
class Keep:
    """How much of a change a smaller rank must keep. `rank` alone, a share alone, or a share with `rank` as its
    limit.

    Raises:
        ConfigError: nothing is said, both shares are, or a number is out of its range.
    """

    rank: int | None = None
    """At most this rank."""
    energy: float | None = None
    """Share of the sum of squared singular values, in (0, 1]."""
    frobenius: float | None = None
    """Share of the Frobenius norm, in (0, 1]: the square root of an energy share."""

    def __post_init__(self) -> None:
        if self.rank is None and self.energy is None and self.frobenius is None:
            raise ConfigError(
                "Say how much to keep: a rank, a share of the energy, or of the Frobenius norm."
            )
        if self.energy is not None and self.frobenius is not None:
            raise ConfigError(
                f"energy {self.energy:g} and frobenius {self.frobenius:g} are two measures of one thing "
                "(energy = frobenius squared). Give one of them."
            )
        if self.rank is not None and self.rank < 1:
            raise ConfigError(f"rank {self.rank} keeps nothing. The smallest rank is 1.")
        for name, share in (("energy", self.energy), ("frobenius", self.frobenius)):
            if share is not None and not 0 < share <= 1:
                raise ConfigError(f"{name} {share:g} is not a share: write a number above 0, at most 1.")

    def choose(self, values: Tensor) -> int:
        """The smallest rank that keeps this much of a change with these singular values (falling, fp64)."""
        rank = len(values)
        share = self.energy if self.frobenius is None else self.frobenius**2
        if share is not None and share < 1 and rank:
            kept = values.square().cumsum(0)
            # a hair of tolerance, so that a share that is met exactly is met in floating point too
            rank = int((kept < share * kept[-1] * (1 - 1e-12)).sum()) + 1
        return rank if self.rank is None else min(rank, self.rank)


@dataclass(frozen=True)
class Singular:
    """D = left @ diag(values) @ right, with orthonormal columns and rows, values falling and above rounding."""

    left: Tensor
    """(out, k)"""
    values: Tensor
    """(k,)"""
    right: Tensor
    """(k, in)"""

    def energy(self, rank: int) -> float:
        """Share of the squared Frobenius norm in the first `rank` directions, in [0, 1]; 1 of nothing at all."""
        squares = self.values.square()
        return float(squares[:rank].sum() / squares.sum()) if len(squares) else 1.0

    def layer(self, rank: int, shape: Sequence[int]) -> LayerState:
        """The nearest change of this rank (Eckart and Young, 1936), both factors of equal size, as fp32."""
        root = self.values[:rank].sqrt()
        left, right = self.left[:, :rank] * root, root[:, None] * self.right[:rank]
        return Lora.layer(left.float(), right.float(), shape)


@dataclass(frozen=True)
class Factors:
    """left (out, r) @ right (r, in): a change as a thin product, fp64, scale included."""

    left: Tensor
    right: Tensor

    @property
    def rank(self) -> int:
        """r, the number of columns; the change's own rank may be smaller."""
        return self.right.shape[0]

    def norm(self) -> float:
        """Frobenius norm of the change: ||L R||^2 = sum(L'L * RR'), two (r, r) matrices."""
        return math.sqrt(max(0.0, float(((self.left.T @ self.left) * (self.right @ self.right.T)).sum())))

    def dense(self) -> Tensor:
        """(out, in)"""
        return self.left @ self.right

    def singular(self) -> Singular:
        """Its singular values and vectors, through the small core."""
        q_left, r_left = torch.linalg.qr(self.left)
        q_right, r_right = torch.linalg.qr(self.right.T)
        u, values, vh = torch.linalg.svd(r_left @ r_right.T, full_matrices=False)
        k = _above_rounding(values)
        return Singular(q_left @ u[:, :k], values[:k], vh[:k] @ q_right.T)


def decompose(change: Tensor) -> Singular:
    """The singular values and vectors of a full matrix (out, in), through the Gram matrix of its shorter side.

    Squaring halves the digits: in fp64 that leaves values down to about 1e-8 of the largest, and fp32 weights
    hold no smaller ones.
    """
    wide = change.double()
    tall = wide.shape[0] > wide.shape[1]
    wide = wide.T if tall else wide
    squares, vectors = torch.linalg.eigh(wide @ wide.T)
    squares, vectors = squares.flip(0).clamp(min=0), vectors.flip(1)
    values = squares.sqrt()
    k = _above_rounding(values)
    short = vectors[:, :k]
    long = (short.T @ wide) / values[:k, None]
    return Singular(long.T, values[:k], short.T) if tall else Singular(short, values[:k], long)


def factors_of(path: LayerPath, layer: LayerState, weights: Weights | None = None) -> Factors:
    """The change of one layer as a thin product. Families that are none are made one from their full change,
    exact to rounding.

    Raises:
        AdapterError: the family needs the base's weight, and `weights` has none; or it changes more than a weight.
    """
    refuse_other_than_weights(path, layer)
    thin = FAMILIES.get(layer.family).thin(layer)
    if thin is not None:
        return Factors(thin[0].double(), thin[1].double())
    found = decompose(change_of(path, layer, weights).flatten(1))
    return Factors(found.left * found.values, found.right)


def change_of(path: LayerPath, layer: LayerState, weights: Weights | None = None) -> Tensor:
    """The change of one layer as a full matrix: fp32 or fp64, in the shape of its weight, scale included.

    Raises:
        AdapterError: the family needs the base's weight, and `weights` has none; it does not fit; or it changes
            more than a weight.
    """
    refuse_other_than_weights(path, layer)
    family = FAMILIES.get(layer.family)
    weight = None if weights is None or path not in weights else weights[path]
    thin = family.thin(layer)
    if thin is not None:
        left, right, shape = thin
        return (left @ right).view(_fitting(path, shape, weight))
    if weight is None:
        told = whole_shape(path, layer)
        if told is None:
            why = (
                "whose tensors don't tell a convolution's kernel"
                if is_whole(layer)
                else "whose change can't be told"
            )
            raise AdapterError(
                f"{path!r} is changed by {layer.family}, {why} without the base's weight. Name the base (--base on the "
                "command line)."
            )
        weight = torch.zeros(told)
    wide = widened(weight)
    with torch.no_grad():
        delta = family.from_state(_shell(wide), layer).eval()
        return delta.weight_delta(wide).detach()


def refuse_other_than_weights(path: LayerPath, layer: LayerState) -> None:
    """Refuse a layer whose change is not that of a weight alone, where nothing else can be kept.

    Raises:
        AdapterError: it changes a bias, or a normalisation.
    """
    diff = layer.tensors.get("diff")
    norm = layer.family == "full" and diff is not None and diff.dim() == 1
    if norm or changes_bias(layer):
        raise AdapterError(
            f"{path!r} is changed in its {'normalisation' if norm else 'bias'}, which can't be mixed, resized, "
            "compared or merged into a base's file: only changes of weights can. Load the adapter beside the base "
            "instead, at any strength."
        )


def shape_of(path: LayerPath, layer: LayerState, weights: Weights | None = None) -> tuple[int, ...]:
    """The shape of the weight that a layer changes: (out, in) or (out, in / groups, k, k)."""
    if weights is not None and path in weights and FAMILIES.get(layer.family).thin(layer) is None:
        return tuple(weights[path].shape)
    told = told_shape(path, layer)
    return told if told is not None else tuple(change_of(path, layer, weights).shape)


def told_shape(path: LayerPath, layer: LayerState) -> tuple[int, ...] | None:
    """As `shape_of`, where the layer's tensors tell it."""
    thin = FAMILIES.get(layer.family).thin(layer)
    return thin[2] if thin is not None else whole_shape(path, layer)


def _fitting(path: LayerPath, shape: tuple[int, ...], weight: Tensor | None) -> tuple[int, ...]:
    """The base's shape; a linear layer and a 1x1 convolution are one thing."""
    if weight is None:
        return shape
    theirs = tuple(weight.shape)
    if shape[:2] != theirs[:2] or math.prod(shape) != math.prod(theirs):
        raise AdapterError(
            f"The change to {path!r} is for a weight of {shape}, the base has {theirs}: the adapter was made for "
            "another base."
        )
    return theirs


def widened(tensor: Tensor) -> Tensor:
    """fp64 and fp32 as they are, everything narrower as fp32 (torch itself promotes no 8-bit floats)."""
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


def _above_rounding(values: Tensor) -> int:
    return int((values > NOTHING * values[0]).sum()) if len(values) and values[0] > 0 else 0


def _shell(weight: Tensor) -> Layer:
    """A layer that holds this weight and nothing else: what families ask for a shape, a device and values."""
    out, inner, *kernel = weight.shape
    with torch.device("meta"):
        layer: Layer = (
            nn.Conv2d(inner, out, (kernel[0], kernel[1]), bias=False)
            if kernel
            else nn.Linear(inner, out, bias=False)
        )
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer
