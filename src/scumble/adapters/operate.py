"""operate: a layer's own operation, done with another weight.

It is the ground on which a weight change and an output change can be compared: both go through the layer's
stride, padding, dilation and groups.
"""

from __future__ import annotations

from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

Layer: TypeAlias = nn.Linear | nn.Conv2d
"""What an adapter can change."""

Norm: TypeAlias = nn.LayerNorm | nn.GroupNorm
"""What files may hold changes of besides layers: normalisations with a weight. Nothing is trained there."""


class Held(nn.Module):
    """A frozen linear or convolution layer that has no weight but makes it when it is read: one in few bits, say. It is
    an `nn.Linear` or `nn.Conv2d` as well."""

    held_in: str
    """What its weight is held in, by name."""

    @property
    def weight_shape(self) -> torch.Size:
        """The weight's shape, without making it."""
        raise NotImplementedError

    @property
    def weight_device(self) -> torch.device:
        """The weight's device, without making it."""
        raise NotImplementedError


_DEVICE = "_scumble_device"
"""The attribute of layers that `computes_on` was told of."""

_LAYERS = (nn.Linear, nn.Conv2d)
_NORMS = (nn.LayerNorm, nn.GroupNorm)


def is_layer(module: object) -> bool:
    """Whether an adapter can change this module.

    The output projection of `nn.MultiheadAttention` cannot be changed: torch reads its weight and never calls
    it, so a change would be lost in silence.
    """
    return isinstance(module, _LAYERS) and not isinstance(module, NonDynamicallyQuantizableLinear)


def is_norm(module: object) -> bool:
    """Whether this is a normalisation with one weight a channel, which files may hold a change of."""
    return isinstance(module, _NORMS) and module.weight is not None and module.weight.dim() == 1


def shape_of(layer: Layer | Norm) -> torch.Size:
    """The shape of the layer's weight, which is not made for that where it is `Held`."""
    return layer.weight_shape if isinstance(layer, Held) else layer.weight.shape


def device_of(layer: Layer | Norm) -> torch.device:
    """Where the layer computes: the device that `computes_on` was told, else that of its weight, which is not made for
    that where it is `Held`."""
    if _DEVICE in layer.__dict__:
        return layer.__dict__[_DEVICE]  # type: ignore[no-any-return]
    return layer.weight_device if isinstance(layer, Held) else layer.weight.device


def computes_on(layer: nn.Module, device: torch.device) -> None:
    """Say that `layer` computes on `device`, though its weights may be elsewhere meanwhile."""
    layer.__dict__[_DEVICE] = device


def operate(layer: Layer | Norm, x: Tensor, weight: Tensor) -> Tensor:
    """`layer` applied to `x` with `weight` in place of its own, and without bias.

    Args:
        layer: gives stride, padding, padding mode, dilation and groups.
        x: (..., in) for a linear layer, (B, C, H, W) or (C, H, W) for a convolution.
        weight: (o, in), or (o, in / groups, kh, kw) with o a multiple of `layer.groups`. o and the kernel may
            differ from the layer's own. For a norm (channels,); `x` is what it normalises.

    Returns:
        (..., o), or (B, o, h, w).
    """
    if isinstance(layer, nn.Linear):
        return F.linear(x, weight)
    if isinstance(layer, nn.LayerNorm):
        return F.layer_norm(x, layer.normalized_shape, weight, None, layer.eps)
    if isinstance(layer, nn.GroupNorm):
        return F.group_norm(x, layer.num_groups, weight, None, layer.eps)
    padding: int | str | tuple[int, ...] = layer.padding
    if layer.padding_mode != "zeros":
        x = F.pad(x, layer._reversed_padding_repeated_twice, mode=layer.padding_mode)
        padding = 0
    return F.conv2d(x, weight, None, layer.stride, padding, layer.dilation, layer.groups)


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which torch would multiply by a matrix here: autocast's when it is on, else `x`'s."""
    device = x.device.type
    if (
        x.dtype != torch.float64  # autocast leaves float64 alone
        and torch.amp.is_autocast_available(device)
        and torch.is_autocast_enabled(device)
    ):
        return torch.get_autocast_dtype(device)
    return x.dtype
