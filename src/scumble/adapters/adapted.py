"""Adapted: a frozen layer and the deltas on it, each under its adapter's name and with its strength.

A visible wrapper instead of a patched `forward`: `print(model)` shows it, `state_dict` and DDP see it, and
taking it away leaves nothing behind.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from scumble.adapters.delta import Delta
from scumble.adapters.operate import Layer
from scumble.errors import AdapterError


def _of_base(name: str) -> Any:
    """A property that reads the base: library code asks a layer for `weight.dtype`, `in_features`, ..."""
    return property(lambda self: getattr(self.base, name), doc=f"The base's `{name}`.")


class Adapted(nn.Module):
    """base(x) + the sum over adapters of strength * output_delta(x).

    A strength is a number, or one number per sample (B,), so that one batch may serve many adapters. When the
    layer is called with a multiple of B samples, the strengths are repeated as a block: [s0, s1] for four
    samples is [s0, s1, s0, s1]. That is the order in which classifier-free guidance repeats a batch
    (`torch.cat([latents] * 2)`).

    Laws: with every strength 0 the output is bit-identical to the base's. Deltas do not see each other (each
    is given the base's own output), so the sum does not depend on their order, beyond rounding.
    """

    weight = _of_base("weight")
    bias = _of_base("bias")
    in_features = _of_base("in_features")
    out_features = _of_base("out_features")
    in_channels = _of_base("in_channels")
    out_channels = _of_base("out_channels")
    kernel_size = _of_base("kernel_size")
    stride = _of_base("stride")
    padding = _of_base("padding")
    padding_mode = _of_base("padding_mode")
    dilation = _of_base("dilation")
    groups = _of_base("groups")

    base: Layer
    deltas: nn.ModuleDict
    strengths: dict[str, float | Tensor]

    def __init__(self, base: Layer) -> None:
        """Wraps `base` with no delta yet; takes over its train or eval mode."""
        super().__init__()
        self.base = base
        self.deltas = nn.ModuleDict()
        self.strengths = {}
        self.training = base.training

    def add(self, name: str, delta: Delta, strength: float | Tensor = 1.0) -> None:
        """Add `delta` under the adapter's name.

        Raises:
            AdapterError: the layer already has a delta of that name.
        """
        if name in self:
            raise AdapterError(
                f"This layer already has an adapter {name!r}. Eject it first, or choose another name."
            )
        self.deltas[module_key(name)] = delta
        self.strengths[module_key(name)] = strength

    def remove(self, name: str) -> None:
        """Take the delta called `name` off."""
        del self.deltas[module_key(name)]
        del self.strengths[module_key(name)]

    def set_strength(self, name: str, strength: float | Tensor) -> None:
        """Set the strength of the adapter called `name`: a number, or (B,)."""
        self.strengths[module_key(name)] = strength

    def __contains__(self, name: str) -> bool:
        return module_key(name) in self.deltas

    def forward(self, x: Tensor) -> Tensor:
        """The changed layer, in the base's shapes: (..., in) -> (..., out), or (B, C, H, W) -> (B, O, h, w).

        Raises:
            AdapterError: the number of samples in `x` is no multiple of the number of strengths.
        """
        # A strength of 0 skips the delta, so that the base's output comes through untouched, bit for bit.
        live = [
            (self.deltas[key], s) for key, s in self.strengths.items() if isinstance(s, Tensor) or s != 0.0
        ]
        if not live:
            return self.base(x)
        if len(live) == 1:  # the family may do base and change in one
            delta, strength = live[0]
            return delta(x, self.base, _per_sample(strength, x))
        y = self.base(x)
        total = y
        for delta, strength in live:
            assert isinstance(delta, Delta)
            total = total + (_per_sample(strength, x) * delta.output_delta(x, y, self.base)).to(y.dtype)
        return total

    def extra_repr(self) -> str:
        """Shown by `print(model)`."""
        said = (
            f"{k}={'per sample' if isinstance(s, Tensor) else format(s, 'g')}"
            for k, s in self.strengths.items()
        )
        return "strengths: " + ", ".join(said)


def _per_sample(strength: float | Tensor, x: Tensor) -> float | Tensor:
    """A number as it is; (B,) as (N, 1, ..., 1) with N the samples in `x` and as many dimensions as `x`."""
    if not isinstance(strength, Tensor):
        return strength
    samples, count = x.shape[0], strength.shape[0]
    if x.dim() < 2 or samples % count:
        raise AdapterError(
            f"{count} per-sample strengths can't be shared out over an input of shape {tuple(x.shape)}. "
            f"Give one number, or as many strengths as samples (or a divisor: they are repeated as a block)."
        )
    return strength.to(x.device).repeat(samples // count).view(-1, *(1 for _ in x.shape[1:]))


def module_key(name: str) -> str:
    """An adapter's name as a name that torch allows for a submodule.

    Dots (`detail_v1.1`) and the names of `nn.ModuleDict`'s own attributes (`pop`) are not allowed there; they
    are written as in a URL. Two names never get one key.
    """
    key = name.replace("%", "%25").replace(".", "%2E")
    return f"%{ord(key[0]):02X}{key[1:]}" if hasattr(nn.ModuleDict, key) or key == "training" else key


def check_strength(strength: float | Tensor) -> float | Tensor:
    """`strength` as a float, or as a detached tensor (B,).

    Raises:
        AdapterError: it is not finite, or a tensor that is not (B,) with B >= 1.
    """
    if isinstance(strength, Tensor) and strength.dim() > 0:
        if strength.dim() != 1 or strength.numel() == 0:
            raise AdapterError(
                f"A strength is a number or a tensor (B,), one per sample; this one has shape "
                f"{tuple(strength.shape)}."
            )
        values = strength.detach().clone()
        values = values if values.is_floating_point() else values.float()
        if not bool(torch.isfinite(values).all()):
            raise AdapterError(f"A strength must be finite; these are {strength.tolist()}.")
        return values
    number = float(strength)
    if not torch.isfinite(torch.tensor(number)):
        raise AdapterError(f"A strength must be finite; this one is {number}.")
    return number
