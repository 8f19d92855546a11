"""LoKr: the change to W is a Kronecker product of a small matrix and a larger one (Yeh et al., 2024).

Legend: W (a b, c d) or (a b, c d, k, k) the base's weight, with c d = in / groups; r the rank; s the scale,
alpha / r; (x) the Kronecker product.

    weight_delta = s w1 (x) w2            arXiv:2309.14859, section 3.2; w1 (a, c), w2 (b, d) or (b, d, k, k)

    w1 may be w1_a (a, r) @ w1_b (r, c); w2 may be w2_a (b, r) @ w2_b (r, d k k), or, split as LoHa's tucker
    form, t2 (r, r, k, k) with w2_a (r, b) and w2_b (r, d).

The larger matrix is never made for a layer's output: x is folded to (c, d), and each side is multiplied alone.
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal, Self, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from scumble.adapters.delta import DeltaSettings
from scumble.adapters.loha import tucker
from scumble.adapters.magnitude import Magnitude
from scumble.adapters.names import INPUTS, OUTPUTS
from scumble.adapters.operate import Layer, compute_dtype, operate, shape_of
from scumble.adapters.state import LayerState


class LokrSettings(DeltaSettings):
    """LoKr: the change is a Kronecker product of a small and a larger matrix. The smallest files, with a
    high rank."""

    family: Literal["lokr"] = "lokr"
    """The adapter family."""
    alpha: float | None = Field(default=None, gt=0)
    """The change is multiplied by alpha / rank. Empty: alpha is each layer's rank, the factor 1. Without effect
    on layers where both matrices are whole."""
    factor: int | None = Field(default=None, ge=1)
    """Rows and columns of the small matrix: the largest divisor of the layer's width up to this. Empty: as near
    to a square root as divisors allow."""
    decompose_both: bool = False
    """Make the small matrix of rank `rank` too, where that saves numbers."""
    full: bool = False
    """Leave the larger matrix whole, whatever the rank."""
    tucker: bool = False
    """Split the kernels of convolutions off as a factor of their own: smaller files."""
    magnitude: bool = False
    """DoRA on top: a learned magnitude for every output."""


class Lokr(Magnitude):
    """s w1 (x) w2 beside one linear or convolution layer."""

    family: ClassVar[str] = "lokr"
    settings: ClassVar[type[DeltaSettings]] = LokrSettings

    @classmethod
    def fresh(
        cls, base: Layer, settings: DeltaSettings, *, rank: int, alpha: float, generator: torch.Generator
    ) -> Self:
        """An untrained delta. With both matrices whole there is no rank, and the scale is 1."""
        whole = {"w1", "w2"} <= set(cls.fresh_shapes(base, rank, settings))
        alpha = float(rank) if whole else alpha
        return super().fresh(base, settings, rank=rank, alpha=alpha, generator=generator)

    @classmethod
    def shapes(cls, base: Layer, rank: int) -> dict[str, tuple[int, ...]]:
        """The form of the default settings."""
        return cls.fresh_shapes(base, rank, LokrSettings())

    @classmethod
    def fresh_shapes(cls, base: Layer, rank: int, settings: DeltaSettings) -> dict[str, tuple[int, ...]]:
        """The form that the settings ask for; a matrix is made of two where that is smaller."""
        mine = cast(LokrSettings, settings)
        out, inner, *kernel = shape_of(base)
        (a, b), (c, d) = factorize(out, mine.factor), factorize(inner, mine.factor)
        names: tuple[str, ...] = ("w1",)
        if mine.decompose_both and not mine.full and rank < max(a, c) / 2:
            names = ("w1_a", "w1_b")
        if mine.full or rank >= max(b, d) / 2:
            names += ("w2",)
        elif mine.tucker and math.prod(kernel) > 1:
            names += ("w2_a", "w2_b", "t2")
        else:
            names += ("w2_a", "w2_b")
        return _shapes(base, rank, names + ((OUTPUTS,) if mine.magnitude else ()), (a, c))

    @classmethod
    def expected_shapes(cls, base: Layer, state: LayerState) -> dict[str, tuple[int, ...]]:
        """The form that the state's tensors have."""
        tensors = state.tensors
        names: tuple[str, ...] = ("w1",) if "w1" in tensors or "w1_a" not in tensors else ("w1_a", "w1_b")
        if "w2" in tensors or "w2_a" not in tensors:
            names += ("w2",)
        else:
            names += ("w2_a", "w2_b", "t2") if "t2" in tensors else ("w2_a", "w2_b")
        names += tuple(name for name in (OUTPUTS, INPUTS) if name in tensors)[:1]
        rows, columns = (tensors.get(name) for name in (("w1", "w1") if names[0] == "w1" else names[:2]))
        small = (1, 1)
        if rows is not None and columns is not None and rows.dim() == columns.dim() == 2:
            small = rows.shape[0], columns.shape[1]
        return _shapes(base, state.rank, names, small)

    def reset(self, generator: torch.Generator) -> None:
        """Uniform in +-1/sqrt(fan_in); w2, or its input side, zero, so that the change is zero."""
        for name, parameter in self.named_parameters():
            if name in ("w2", "w2_b"):
                nn.init.zeros_(parameter)
            elif name not in (OUTPUTS, INPUTS):
                nn.init.kaiming_uniform_(parameter, a=math.sqrt(5), generator=generator)

    def direction(self, weight: Tensor) -> Tensor:
        """s w1 (x) w2, in the parameters' dtype."""
        small, large = self._small(), self._large(weight)
        small = self.scale * small.reshape(*small.shape, *(1 for _ in large.shape[2:]))
        return torch.kron(small.contiguous(), large.contiguous())

    def direction_output(self, x: Tensor, y: Tensor, base: Layer) -> Tensor | None:
        """w2 on each of the c parts of x, then w1 across the parts."""
        if isinstance(base, nn.Conv2d) and (base.groups > 1 or x.dim() != 4):
            return None  # a group holds a piece of the parts
        dtype = compute_dtype(x)
        small = (self.scale * self._small()).to(dtype)
        large = self._large(base.weight).to(dtype)
        (a, c), x = small.shape, x.to(dtype)
        if isinstance(base, nn.Linear):
            # Plain products of two matrices: torch's batched ones round otherwise with gradients than without.
            parts = x.reshape(-1, large.shape[1]) @ large.t()
            mixed = parts.view(-1, c, large.shape[0]).transpose(1, 2).reshape(-1, c) @ small.t()  # (M b, a)
            return mixed.view(-1, large.shape[0], a).transpose(1, 2).reshape(*x.shape[:-1], -1)
        parts = operate(base, x.unflatten(1, (c, -1)).flatten(0, 1), large)  # (B c, b, h, w)
        across = parts.reshape(x.shape[0], c, -1)  # (B, c, b h w)
        return small.expand(x.shape[0], a, c).bmm(across).view(x.shape[0], -1, *parts.shape[2:])

    def _small(self) -> Tensor:
        if "w1" in self._parameters:
            return self.get_parameter("w1")
        return self.get_parameter("w1_a") @ self.get_parameter("w1_b")

    def _large(self, weight: Tensor) -> Tensor:
        if "w2" in self._parameters:
            return self.get_parameter("w2")
        a, b = self.get_parameter("w2_a"), self.get_parameter("w2_b")
        if "t2" in self._parameters:
            return tucker(self.get_parameter("t2"), a, b)
        return (a @ b).view(a.shape[0], -1, *weight.shape[2:])


def factorize(width: int, factor: int | None) -> tuple[int, int]:
    """(small, large) with small * large = width and small <= large: the nearest to `factor` from below, or to
    the square root."""
    if factor is not None and width % factor == 0:
        return min(factor, width // factor), max(factor, width // factor)
    limit = math.isqrt(width) if factor is None else min(factor, math.isqrt(width))
    small = next(divisor for divisor in range(limit, 0, -1) if width % divisor == 0)
    return small, width // small


def _shapes(
    base: Layer, rank: int, names: tuple[str, ...], small: tuple[int, int]
) -> dict[str, tuple[int, ...]]:
    """Shapes of those tensors that are in `names`, for a small matrix of (a, c)."""
    out, inner, *kernel = shape_of(base)
    a, c = max(1, small[0]), max(1, small[1])
    b, d = out // a, inner // c
    split = "t2" in names
    every = {
        "w1": (a, c),
        "w1_a": (a, rank),
        "w1_b": (rank, c),
        "w2": (b, d, *kernel),
        "w2_a": (rank, b) if split else (b, rank),
        "w2_b": (rank, d) if split else (rank, d * math.prod(kernel)),
        "t2": (rank, rank, *kernel),
    } | Magnitude.magnitude_shapes(base, names)
    return {name: every[name] for name in names}
