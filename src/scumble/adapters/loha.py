"""LoHa: the change to W is the element-wise product of two low-rank products (Hyeon-Woo et al., 2022).

Legend: W (out, in) or (out, in / groups, k, k) the base's weight; r the rank; s the scale, alpha / r; * the
element-wise product.

    weight_delta = s (w1_a @ w1_b) * (w2_a @ w2_b)        arXiv:2108.06098, equation 2
                   w?_a (out, r), w?_b (r, in / groups k k): a rank of up to r^2 from the numbers of rank 2r

    tucker: each of the two is sum_ij t[i, j] w_a[i] w_b[j]       proposition 3, for kernels above 1x1
            t? (r, r, k, k), w?_a (r, out), w?_b (r, in / groups)
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from scumble.adapters.delta import DeltaSettings
from scumble.adapters.magnitude import Magnitude
from scumble.adapters.names import INPUTS, OUTPUTS
from scumble.adapters.operate import Layer, shape_of
from scumble.adapters.state import LayerState


class LohaSettings(DeltaSettings):
    """LoHa: two pairs of thin matrices beside each layer, multiplied element by element. More expressive than
    LoRA of the same size; a step takes longer."""

    family: Literal["loha"] = "loha"
    """The adapter family."""
    tucker: bool = False
    """Split the kernels of convolutions off as a factor of their own: smaller files."""
    magnitude: bool = False
    """DoRA on top: a learned magnitude for every output."""


class Loha(Magnitude):
    """s (w1_a @ w1_b) * (w2_a @ w2_b) beside one linear or convolution layer."""

    family: ClassVar[str] = "loha"
    settings: ClassVar[type[DeltaSettings]] = LohaSettings

    @classmethod
    def shapes(cls, base: Layer, rank: int) -> dict[str, tuple[int, ...]]:
        """The plain form: two pairs of matrices, kernels flattened."""
        return _shapes(base, rank, tucker=False)

    @classmethod
    def fresh_shapes(cls, base: Layer, rank: int, settings: DeltaSettings) -> dict[str, tuple[int, ...]]:
        """The form that the settings ask for; 1x1 kernels have nothing to split off."""
        mine = cast(LohaSettings, settings)
        shapes = _shapes(base, rank, tucker=mine.tucker and shape_of(base)[2:].numel() > 1)
        return shapes | (cls.magnitude_shapes(base, (OUTPUTS,)) if mine.magnitude else {})

    @classmethod
    def expected_shapes(cls, base: Layer, state: LayerState) -> dict[str, tuple[int, ...]]:
        """The form that the state's tensors have."""
        tucker = len(shape_of(base)) == 4 and not {"t1", "t2"}.isdisjoint(state.tensors)
        return _shapes(base, state.rank, tucker) | cls.magnitude_shapes(base, _one_magnitude(state))

    def reset(self, generator: torch.Generator) -> None:
        """Normal, narrow on the output side (0.1); w2_a zero, so that the change is zero. The widths are those
        with which the field's learning rates for LoHa were found."""
        for name, parameter in self.named_parameters():
            if name == "w2_a":
                nn.init.zeros_(parameter)
            elif name not in (INPUTS, OUTPUTS):
                nn.init.normal_(parameter, std=1.0 if name.endswith("_b") else 0.1, generator=generator)

    def direction(self, weight: Tensor) -> Tensor:
        """The scaled product, in the parameters' dtype."""
        w1_a, w1_b, w2_a, w2_b = (self.get_parameter(name) for name in ("w1_a", "w1_b", "w2_a", "w2_b"))
        if "t1" in self._parameters:
            first = tucker(self.get_parameter("t1"), self.scale * w1_a, w1_b)
            return first * tucker(self.get_parameter("t2"), w2_a, w2_b)
        return cast(Tensor, _Product.apply(self.scale * w1_a, w1_b, w2_a, w2_b)).view(weight.shape)


def tucker(core: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """sum_ij core[i, j] a[i] b[j]: core (r, r, k, k), a (r, out), b (r, in) -> (out, in, k, k)."""
    return torch.einsum("ijkl,io,jn->onkl", core, a, b)


def _shapes(base: Layer, rank: int, tucker: bool) -> dict[str, tuple[int, ...]]:
    out, inner, *kernel = shape_of(base)
    if not tucker:
        a, b = (out, rank), (rank, shape_of(base)[1:].numel())
        return {"w1_a": a, "w1_b": b, "w2_a": a, "w2_b": b}
    a, b, t = (rank, out), (rank, inner), (rank, rank, *kernel)
    return {"w1_a": a, "w1_b": b, "w2_a": a, "w2_b": b, "t1": t, "t2": t}


def _one_magnitude(state: LayerState) -> tuple[str, ...]:
    return tuple(name for name in (OUTPUTS, INPUTS) if name in state.tensors)[:1]


class _Product(torch.autograd.Function):
    """(a1 @ b1) * (a2 @ b2), that keeps the thin factors alone: backward makes both products again, instead
    of keeping two matrices of the weight's size for every layer."""

    @staticmethod
    def forward(ctx: Any, a1: Tensor, b1: Tensor, a2: Tensor, b2: Tensor) -> Tensor:
        ctx.save_for_backward(a1, b1, a2, b2)
        return (a1 @ b1).mul_(a2 @ b2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        a1, b1, a2, b2 = ctx.saved_tensors
        first, second = (a2 @ b2).mul_(grad), (a1 @ b1).mul_(grad)
        return first @ b1.t(), a1.t() @ first, second @ b2.t(), a2.t() @ second
