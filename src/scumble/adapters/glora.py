"""GLoRA: the change to W is a thin product, and another that W itself is multiplied by (Chavan et al., 2023).

Legend: W (out, in) or (out, in / groups, k, k) the base's weight; r the rank; s the scale, alpha / r.

    weight_delta = s (W a1 @ a2 + b1 @ b2)        arXiv:2306.07967, equation 9 without its supports, as LyCORIS has it
                   a1 (in / groups, r), a2 (r, in / groups): on a convolution they mix channels, at every place alike
                   b1 (out, r), b2 (r, in / groups[, k, k])

On a convolution the parameters have as many dimensions as W.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scumble.adapters.delta import Delta, DeltaSettings
from scumble.adapters.operate import Layer, compute_dtype, shape_of


class GloraSettings(DeltaSettings):
    """GLoRA: LoRA, and beside it a pair of thin matrices that mix what the layer reads."""

    family: Literal["glora"] = "glora"
    """The adapter family."""


class Glora(Delta):
    """s (W a1 @ a2 + b1 @ b2) beside one linear or convolution layer."""

    family: ClassVar[str] = "glora"
    settings: ClassVar[type[DeltaSettings]] = GloraSettings
    rank_sides: ClassVar[Mapping[str, int]] = {"a1": 1, "a2": 0, "b1": 1, "b2": 0}
    reads_output: ClassVar[bool] = False

    @classmethod
    def shapes(cls, base: Layer, rank: int) -> dict[str, tuple[int, ...]]:
        """`b2` has the base's kernel, the others are plain products."""
        out, inner, *kernel = shape_of(base)
        ones = (1,) * len(kernel)
        return {
            "a1": (inner, rank, *ones),
            "a2": (rank, inner, *ones),
            "b1": (out, rank, *ones),
            "b2": (rank, inner, *kernel),
        }

    def reset(self, generator: torch.Generator) -> None:
        """a1 and b1 uniform in +-1/sqrt(rank), as LyCORIS begins; a2 and b2 zero, so that the change is zero."""
        for name, parameter in self.named_parameters():
            if name in ("a1", "b1"):
                nn.init.kaiming_uniform_(parameter, a=math.sqrt(5), generator=generator)
            else:
                nn.init.zeros_(parameter)

    def weight_delta(self, weight: Tensor) -> Tensor:
        """s (W a1 @ a2 + b1 @ b2), in the parameters' dtype."""
        a1, a2, b1, b2 = self._matrices()
        mixed = torch.einsum("oi...,ir,rj->oj...", weight.to(b1.dtype), a1, a2)
        return self.scale * (mixed + (b1 @ b2).view(weight.shape))

    def output_delta(self, x: Tensor, y: Tensor, base: Layer) -> Tensor:
        """On a linear layer as one thin product: [W a1, b1] on [a2 x, b2 x]."""
        if not isinstance(base, nn.Linear):
            return super().output_delta(x, y, base)
        dtype = compute_dtype(x)
        a1, a2, b1, b2 = (matrix.to(dtype) for matrix in self._matrices())
        left = torch.cat([base.weight.to(dtype) @ a1, b1], dim=1)
        return F.linear(F.linear(x, self.scale * torch.cat([a2, b2])), left)

    def _matrices(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        a1, a2, b1, b2 = (self.get_parameter(name).flatten(1) for name in ("a1", "a2", "b1", "b2"))
        return a1, a2, b1, b2
