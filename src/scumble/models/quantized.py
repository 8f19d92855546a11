"""Quantized: a frozen layer whose weight is held in few bits, and made anew each time it is needed.

To everybody else it is the layer that it was: `nn.Linear` or `nn.Conv2d`, with its bias, its sizes and a `weight` that
can be read. So adapters of all families train on it and draw with it, and their gradients are those over the weight
that is read there.

The weight is there while it is multiplied, forward and again backward, and not between the two: what the graph keeps
is the code, which the model has anyway.
"""

from __future__ import annotations

from typing import Any, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.grad import conv2d_input

from scumble.adapters.operate import Held, compute_dtype
from scumble.errors import ModelError
from scumble.models.codes import Code, code_named
from scumble.models.prepacked import is_plain, unpack

SMALLEST = 4096
"""Layers with fewer weights stay as they are."""


class Quantized(Held):
    """What the two kinds of layers share.

    Law (tests/laws/test_quantized.py): output and gradients are those of the plain layer whose weight is
    `self.weight`, and nothing but `codes` and `scales` is kept for them.
    """

    codes: nn.Parameter
    """uint8; see `models.codes`."""
    scales: nn.Parameter
    """uint8"""
    like: Tensor
    """Empty; it has the dtype that the weight is read in, and follows `module.to(dtype)`."""
    shape: torch.Size
    """The weight's."""

    @classmethod
    def of(cls, layer: nn.Module, code: Code, weight: Tensor, dtype: torch.dtype) -> Self:
        """`layer` with `weight` in the place of its own, held in `code` and read in `dtype`. The bias stays."""
        self = cls.__new__(cls)
        nn.Module.__init__(self)
        blank = self.__dict__.keys() - {"training"}
        self.__dict__.update({name: value for name, value in layer.__dict__.items() if name not in blank})
        self._parameters["bias"] = layer._parameters["bias"]
        codes, scales = code.encode(weight)
        self.codes = nn.Parameter(codes, requires_grad=False)
        self.scales = nn.Parameter(scales, requires_grad=False)
        self.register_buffer("like", torch.empty(0, dtype=dtype, device=weight.device), persistent=False)
        self.held_in, self.shape = code.name, weight.shape
        return self

    @property
    def weight(self) -> Tensor:
        """The weight in the model's dtype, made anew at each reading."""
        return self.read(self.like.dtype)

    @property
    def weight_shape(self) -> torch.Size:
        """See Held."""
        return self.shape

    @property
    def weight_device(self) -> torch.device:
        """See Held."""
        return self.codes.device

    def read(self, dtype: torch.dtype) -> Tensor:
        """The weight in `dtype`, a new tensor."""
        return _read(self.held_in, self.codes, self.scales, self.shape, dtype)

    def multiplied(self, x: Tensor, how: tuple[Any, ...] | None) -> Tensor:
        """The layer's output; `how` as for `_Product`."""
        codes, scales, bias = self.codes, self.scales, self._parameters["bias"]
        out: Tensor = _Product.apply(x, codes, scales, bias, self.held_in, self.shape, how)  # type: ignore[no-untyped-call]
        return out

    def extra_repr(self) -> str:
        """Shown by `print(model)`."""
        return f"{super().extra_repr()}, held in {self.held_in}"


class QuantizedLinear(Quantized, nn.Linear):  # type: ignore[misc, override]
    """A linear layer."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return self.multiplied(x, None)


class QuantizedConv2d(Quantized, nn.Conv2d):  # type: ignore[misc, override]
    """A convolution that pads with zeros."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, O, h, w)."""
        return self.multiplied(x, (self.stride, self.padding, self.dilation, self.groups))


def layers_held(module: nn.Module) -> dict[str, nn.Linear | nn.Conv2d]:
    """Path -> layer of what is held in few bits: the linear layers and convolutions in the module's lists of blocks.

    What stands outside of the lists stays as it is: what the latents come in and go out through, what the time and the
    text come in through. It is a few in a hundred of the weights at most, and all of a picture goes through it. So do
    norms, biases and layers with less than `SMALLEST` weights.
    """
    parts = dict(module.named_modules())
    lists = tuple(f"{path}." for path, part in parts.items() if isinstance(part, nn.ModuleList))
    return {
        path: cast("nn.Linear | nn.Conv2d", part)
        for path, part in parts.items()
        if path.startswith(lists) and _is_plain(part)
    }


def hold(module: nn.Module, path: str, code: Code, weight: Tensor, dtype: torch.dtype) -> None:
    """Put a quantised layer in the place of the layer at `path`, with `weight`."""
    parent, _, name = path.rpartition(".")
    owner = module.get_submodule(parent)
    layer = owner._modules[name]
    kind: type[Quantized] = QuantizedLinear if isinstance(layer, nn.Linear) else QuantizedConv2d
    assert layer is not None
    unpack(layer)
    owner._modules[name] = kind.of(layer, code, weight, dtype)


def quantize(module: nn.Module, quantization: str, dtype: torch.dtype) -> int:
    """Hold the module's layers in few bits from here on, in place and layer by layer; each weight is let go of before
    the next is looked at.

    Args:
        module: frozen; its weights are rounded from the dtype that they are in.
        dtype: what the weights are read in.

    Returns:
        How many weights are held so.

    Raises:
        UnknownName: no code is called so.
        ModelError: there is no layer that can be held so, or a weight is not finite.
    """
    code = code_named(quantization)
    if code is None:
        return 0
    paths, count = list(layers_held(module)), 0
    for path in paths:
        weight = module.get_submodule(path).weight
        assert isinstance(weight, Tensor)
        hold(module, path, code, weight, dtype)
        count += weight.numel()
    if not count:
        raise ModelError(nothing_to_hold(type(module).__name__, quantization))
    return count


def said_of(module: nn.Module) -> str:
    """What is held in few bits of a quantised module, as a sentence."""
    layers = [part for part in module.modules() if isinstance(part, Quantized)]
    weights = sum(layer.shape.numel() for layer in layers)
    size = sum(p.numel() for layer in layers for p in (layer.codes, layer.scales))
    rest = sum(p.numel() for p in module.parameters()) - size
    kinds = " and ".join(sorted({layer.held_in for layer in layers}))
    return (
        f"{weights / 1e6:,.1f} million weights of the {type(module).__name__} in {len(layers)} layers are held in "
        f"{kinds}, {size / 1e6:,.1f} MB; its other {rest / 1e6:,.1f} million are as they were."
    )


def nothing_to_hold(kind: str, quantization: str) -> str:
    """What is said of a module without a layer that can be held in few bits."""
    return (
        f'quantization = "{quantization}" would change nothing: no list of blocks in this {kind} has a linear layer or '
        f"a convolution with {SMALLEST} weights or more. Leave quantization out."
    )


def _is_plain(layer: nn.Module) -> bool:
    """Whether this is torch's own layer, of which all is known."""
    known = is_plain(layer) if isinstance(layer, nn.Conv2d) else type(layer) is nn.Linear
    return known and layer.weight.numel() >= SMALLEST  # type: ignore[operator, union-attr]


def _read(held_in: str, codes: Tensor, scales: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    code = code_named(held_in)
    assert code is not None
    return code.decode(codes, scales, shape, dtype)


class _Product(torch.autograd.Function):
    """x with W, of which the code of W is kept and nothing else: a convolution done `how` (stride, padding, dilation,
    groups), or x Wᵀ where that is None."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        codes: Tensor,
        scales: Tensor,
        bias: Tensor | None,
        held_in: str,
        shape: torch.Size,
        how: tuple[Any, ...] | None,
    ) -> Tensor:
        dtype = compute_dtype(x)
        ctx.save_for_backward(codes, scales)
        ctx.held_in, ctx.shape, ctx.dtype, ctx.how = held_in, shape, dtype, how
        ctx.of_x, ctx.sides = x.dtype, x.shape
        weight = _read(held_in, codes, scales, shape, dtype)
        bias = bias if bias is None else bias.to(dtype)
        return (
            F.linear(x.to(dtype), weight, bias) if how is None else F.conv2d(x.to(dtype), weight, bias, *how)
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        codes, scales = ctx.saved_tensors
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            weight = _read(ctx.held_in, codes, scales, ctx.shape, ctx.dtype)
            grad_x = grad_y @ weight if ctx.how is None else conv2d_input(ctx.sides, weight, grad_y, *ctx.how)
            grad_x = grad_x.to(ctx.of_x)
        if ctx.needs_input_grad[3]:
            grad_bias = grad_y.flatten(0, -2).sum(0) if ctx.how is None else grad_y.sum((0, 2, 3))
        return grad_x, None, None, grad_bias, None, None, None
