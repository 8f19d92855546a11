"""LoRA: the change to W is a product of two thin matrices (Hu et al., 2021, arXiv:2106.09685).

Legend: W (out, in) or (out, in / groups, k, k) the base's weight; r the rank; s the scale, alpha / r (or
alpha / sqrt(r) when rank-stabilized: Kalajdzievski, 2023, arXiv:2312.03732); M the rows of x in all samples.

    weight_delta = s * up @ down        down (r, in) or (r, in / groups, k, k); up (out, r) or (out, r, 1, 1)

On a convolution, `down` is a convolution with the base's kernel, stride and padding, and `up` is 1x1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, cast

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from scumble.adapters.delta import Delta, DeltaSettings
from scumble.adapters.operate import Layer, compute_dtype, operate, shape_of
from scumble.adapters.state import LayerState


class LoraSettings(DeltaSettings):
    """LoRA: two thin matrices beside each layer."""

    family: Literal["lora"] = "lora"
    """The adapter family."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of a layer's inputs that the adapter does not see in a training step, against overfitting."""
    rank_stabilized: bool = False
    """rsLoRA: multiply by alpha / sqrt(rank), not alpha / rank; high ranks then learn as fast as low ones."""


class Lora(Delta):
    """s * up @ down beside one linear or convolution layer."""

    family: ClassVar[str] = "lora"
    settings: ClassVar[type[DeltaSettings]] = LoraSettings
    rank_sides: ClassVar[Mapping[str, int]] = {"down": 0, "up": 1}
    reads_output: ClassVar[bool] = False

    down: nn.Parameter
    up: nn.Parameter
    dropout: float

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        *,
        rank: int,
        alpha: float,
        rank_stabilized: bool = False,
        dropout: float = 0.0,
    ) -> None:
        """`dropout` acts in train mode only, and draws from torch's global generator."""
        super().__init__(tensors, rank=rank, alpha=alpha, rank_stabilized=rank_stabilized)
        self.__dict__["dropout"] = dropout  # as for the others, see Delta

    @classmethod
    def options(cls, settings: DeltaSettings) -> dict[str, Any]:
        """Dropout and the kind of scale."""
        mine = cast(LoraSettings, settings)
        return {"dropout": mine.dropout, "rank_stabilized": mine.rank_stabilized}

    @classmethod
    def shapes(cls, base: Layer, rank: int) -> dict[str, tuple[int, ...]]:
        """`down` has the base's kernel, `up` is a plain product."""
        out, *inner = shape_of(base)
        return {"down": (rank, *inner), "up": (out, rank, *(1,) * (len(inner) - 1))}

    def reset(self, generator: torch.Generator) -> None:
        """down uniform in +-1/sqrt(fan_in), as in the paper's code; up zero, so that the change is zero."""
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5), generator=generator)
        nn.init.zeros_(self.up)

    def weight_delta(self, weight: Tensor) -> Tensor:
        """s * up @ down, in the parameters' dtype."""
        return (self.scale * (self.up.flatten(1) @ self.down.flatten(1))).view(weight.shape)

    def add_change(self, total: Tensor, weight: Tensor, strength: float) -> None:
        """total += strength * s * up @ down, inside the product."""
        up, down = self.up.flatten(1), self.down.flatten(1)
        another = type(self).weight_delta is not Lora.weight_delta  # a family made from this one
        if another or up.dtype != total.dtype or not total.is_contiguous():
            return super().add_change(total, weight, strength)
        total.flatten(1).addmm_(up, down, alpha=strength * self.scale)

    def largest(self) -> float:
        """|s| |up| |down|, of Frobenius norms: Cauchy and Schwarz, for each row and column."""
        if type(self).weight_delta is not Lora.weight_delta:  # a family made from this one
            return math.inf
        norms = (torch.linalg.vector_norm(factor.detach()) for factor in (self.up, self.down))
        return abs(self.scale) * math.prod(map(float, norms))

    @classmethod
    def thin(cls, state: LayerState) -> tuple[Tensor, Tensor, tuple[int, ...]] | None:
        """s * up, down; at least fp32."""
        if cls.weight_delta is not Lora.weight_delta:  # a family made from this one, with another change
            return None
        up, down = state.tensors["up"], state.tensors["down"]
        # by hand: torch promotes no 8-bit floats
        wide = torch.float64 if torch.float64 in (up.dtype, down.dtype) else torch.float32
        shape = (up.shape[0], *down.shape[1:])
        return state.scale * up.flatten(1).to(wide), down.flatten(1).to(wide), shape

    @classmethod
    def layer(cls, left: Tensor, right: Tensor, shape: Sequence[int]) -> LayerState:
        """The change left (out, r) @ right (r, in * k * k) to a weight of `shape`, at scale 1: `thin` inverted."""
        out, *inner = shape
        rank = right.shape[0]
        tensors = {
            "down": right.reshape(rank, *inner).contiguous(),
            "up": left.reshape(out, rank, *(1 for _ in inner[1:])).contiguous(),
        }
        return LayerState(cls.family, rank, float(rank), tensors)

    def output_delta(self, x: Tensor, y: Tensor, base: Layer) -> Tensor:
        """s * up(down(x)): r is small, so this costs far less than making the weight."""
        return self._change(x, base, self.scale)

    def forward(self, x: Tensor, base: Layer, strength: float | Tensor = 1.0) -> Tensor:
        """base(x) + strength * output_delta; on a plain linear layer as one node of the graph."""
        compiling = torch.compiler.is_compiling()
        scale = self.gain if compiling and self.gain is not None else self.scale
        factor = scale * strength
        # A compiler fuses the plain products by itself, and sees through them better.
        if not compiling and not (self.dropout and self.training) and _is_plain(base):
            if torch.is_grad_enabled():
                return cast(
                    Tensor, _LowRankLinear.apply(x, base.weight, base.bias, self.down, self.up, factor)
                )
            return _low_rank_linear(x, base.weight, base.bias, self.down, self.up, factor)[0]
        y: Tensor = base(x)
        return y + self._change(x, base, factor).to(y.dtype)

    def add_to(self, total: Tensor, x: Tensor, y: Tensor, base: Layer, strength: float | Tensor) -> None:
        """total += strength * output_delta; beside a linear layer inside the second product."""
        dtype = compute_dtype(x)
        thin = not (self.dropout and self.training) and total.is_contiguous() and total.dtype == dtype
        if not (thin and isinstance(base, nn.Linear)):
            return super().add_to(total, x, y, base, strength)
        down, up = self.down.to(dtype), self.up.to(dtype)
        h = _scaled(x.to(dtype).reshape(-1, x.shape[-1]) @ down.t(), self.scale * strength, x.shape)
        total.view(-1, total.shape[-1]).addmm_(h, up.t())

    def _change(self, x: Tensor, base: Layer, factor: float | Tensor) -> Tensor:
        dtype = compute_dtype(x)
        down, up = self.down.to(dtype), self.up.to(dtype)
        x = F.dropout(x, self.dropout, self.training) if self.dropout else x
        if isinstance(base, nn.Linear):
            return F.linear(_times(operate(base, x, down), factor), up)
        # In a grouped convolution each group of channels has its own x, so `down` is applied to each.
        h = operate(base, x, down.repeat(base.groups, 1, 1, 1) if base.groups > 1 else down)
        return F.conv2d(_times(h, factor), up, groups=base.groups)


def _is_plain(base: Layer) -> bool:
    """Whether base(x) is x Wᵀ + b, frozen, and nothing else: no subclass, no hook, no patched forward."""
    return (
        type(base) is nn.Linear
        and not base.weight.requires_grad
        and not (base.bias is not None and base.bias.requires_grad)
        and not (
            base._forward_hooks or base._forward_pre_hooks or base._backward_hooks or base._backward_pre_hooks
        )
        and "forward" not in base.__dict__
    )


def _times(h: Tensor, factor: float | Tensor) -> Tensor:
    """factor * h in h's dtype; `factor` acts on the thin side of the product, where it costs nothing."""
    if isinstance(factor, Tensor):
        if factor.dim() == 0:  # a number that compiled code reads: rounded once, as a number is
            return (h.to(torch.promote_types(h.dtype, factor.dtype)) * factor).to(h.dtype)
        return h * factor.to(h.dtype)
    return h if factor == 1.0 else h * factor


def _low_rank_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, factor: float | Tensor
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """x Wᵀ + b + factor * (x downᵀ) upᵀ, and what its backward needs: x as rows, W, down, up, h."""
    dtype = compute_dtype(x)
    weight, down, up = weight.to(dtype), down.to(dtype), up.to(dtype)
    x = x.to(dtype)
    rows = x.reshape(-1, x.shape[-1])
    h = _scaled(rows @ down.t(), factor, x.shape)
    # of x as it lies, not of its rows: the base's own kernel and bits, on every processor
    y = F.linear(x, weight, bias if bias is None else bias.to(dtype)).contiguous()
    y.view(-1, y.shape[-1]).addmm_(h, up.t())
    return y, (rows, weight, down, up, h)


def _scaled(h: Tensor, factor: float | Tensor, shape: torch.Size) -> Tensor:
    """factor * h; h (M, r) has the rows of an input of `shape`, `factor` as many dimensions as `shape`."""
    return (
        _times(h.view(*shape[:-1], -1), factor).view_as(h)
        if isinstance(factor, Tensor)
        else _times(h, factor)
    )


class _LowRankLinear(torch.autograd.Function):
    """`_low_rank_linear` as one node of the graph.

    Three matrix products forward and five backward, with both sums done inside a product: no copy of y or of
    the gradient of x is made. Saves x (which a frozen linear layer alone would not need) and h (M, r).
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        down: Tensor,
        up: Tensor,
        factor: float | Tensor,
    ) -> Tensor:
        y, saved = _low_rank_linear(x, weight, bias, down, up, factor)
        ctx.save_for_backward(*saved)
        ctx.factor, ctx.shape = factor, x.shape
        ctx.dtypes = x.dtype, down.dtype, up.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, down, up, h = ctx.saved_tensors
        wants_x, _, _, wants_down, wants_up, _ = ctx.needs_input_grad
        x_dtype, down_dtype, up_dtype = ctx.dtypes
        grad_x = grad_down = grad_up = None
        grad_y = grad_y.reshape(-1, grad_y.shape[-1])
        if wants_up:
            grad_up = (h.t() @ grad_y).t().to(up_dtype)  # this way round it is twice as fast on a CPU
        if wants_x or wants_down:
            grad_h = _scaled(grad_y @ up, ctx.factor, ctx.shape)
        if wants_down:
            grad_down = (grad_h.t() @ rows).to(down_dtype)
        if wants_x:
            grad_x = (grad_y @ weight).addmm_(grad_h, down).view(ctx.shape).to(x_dtype)
        return grad_x, None, None, grad_down, grad_up, None
