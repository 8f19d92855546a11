"""Adapted: a frozen layer and the deltas on it, each under its adapter's name and with its strength.

A visible wrapper instead of a patched `forward`: `print(model)` shows it, `state_dict` and DDP see it, and
taking it away leaves nothing behind.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor, nn

from scumble.adapters.blank import blank_dict, set_up
from scumble.adapters.delta import Delta
from scumble.adapters.dial import Dial, check_samples
from scumble.adapters.operate import Layer
from scumble.adapters.stack import Stack, stack_of
from scumble.errors import AdapterError


def _of_base(name: str) -> Any:
    """A property that reads the base: library code asks a layer for `weight.dtype`, `in_features`, ..."""
    return property(lambda self: getattr(self.base, name), doc=f"The base's `{name}`.")


class Adapted(nn.Module):
    """base(x) + the sum over adapters of strength * output_delta(x).

    A strength is a number, or one number per sample (B,), so that one batch may serve many adapters: without
    gradients, a sample costs what its own adapters cost (see `dial.py` for how strengths are repeated).

    Laws: with every strength 0 the output is bit-identical to the base's; a sample of strength 0 has the bits of
    the base's output. Deltas do not see each other (each is given the base's own output), so the sum does not
    depend on their order, beyond rounding.
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
    normalized_shape = _of_base("normalized_shape")
    num_groups = _of_base("num_groups")
    num_channels = _of_base("num_channels")
    eps = _of_base("eps")

    base: Layer
    deltas: nn.ModuleDict
    dials: dict[str, Dial]
    """Key of a delta -> how strongly it acts; an adapter's layers share one."""
    _read: int | None
    """`Dial.turned` when `_acting` was made."""
    _acting: tuple[tuple[Delta, Dial], ...]
    _stack: Stack | None

    def __init__(self, base: Layer) -> None:
        """Wraps `base` with no delta yet; takes over its train or eval mode."""
        set_up(self)
        # past torch's own __setattr__, which takes a good part of a load's time
        self._modules.update(base=base, deltas=blank_dict())
        self.__dict__.update(dials={}, _read=None, _acting=(), _stack=None, training=base.training)

    def add(self, name: str, delta: Delta, strength: float | Tensor | Dial = 1.0) -> None:
        """Add `delta` under the adapter's name; a dial may be shared with other layers.

        Raises:
            AdapterError: the layer already has a delta of that name.
        """
        key = module_key(name)
        if key in self.dials:
            raise AdapterError(
                f"This layer already has an adapter {name!r}. Eject it first, or choose another name."
            )
        self.deltas._modules[key] = delta
        self.dials[key] = strength if isinstance(strength, Dial) else Dial(strength)
        self.__dict__["_read"] = None

    def remove(self, name: str) -> None:
        """Take the delta called `name` off."""
        key = module_key(name)
        del self.deltas._modules[key]
        del self.dials[key]
        self.__dict__.update(_read=None, _acting=(), _stack=None)

    @property
    def strengths(self) -> dict[str, float | Tensor]:
        """Key of a delta -> its strength now: a number, or (B,)."""
        return {key: dial.value for key, dial in self.dials.items()}

    def set_strength(self, name: str, strength: float | Tensor) -> None:
        """Set the strength of the adapter called `name`, in all layers that share its dial."""
        self.dials[module_key(name)].value = strength

    def __contains__(self, name: str) -> bool:
        return module_key(name) in self.dials

    def forward(self, x: Tensor) -> Tensor:
        """The changed layer, in the base's shapes: (..., in) -> (..., out), or (B, C, H, W) -> (B, O, h, w).

        Raises:
            AdapterError: the number of samples in `x` is no multiple of the number of strengths.
        """
        whole = torch.is_grad_enabled() or torch.compiler.is_compiling()
        if whole:
            acting = self._find()
        else:
            if self._read != Dial.turned:
                self._acting, self._read = self._find(), Dial.turned
            acting = self._acting
        single = len(acting) == 1 and (whole or not isinstance(acting[0][1].value, Tensor))
        if not whole and (single or not acting):
            self._stack = None
        # A strength of 0 skips the delta, so that the base's output comes through untouched, bit for bit.
        if not acting:
            return self.base(x)
        if single:  # the family may do base and change in one
            delta, dial = acting[0]
            return delta(x, self.base, _per_sample(_amount(dial), x))
        return self._sum(x, acting) if whole else self._add_up(x, acting)

    def _find(self) -> tuple[tuple[Delta, Dial], ...]:
        """The deltas that act, in the order in which they are added."""
        acting = [(cast(Delta, self.deltas[key]), dial) for key, dial in self.dials.items() if dial.acts]
        return tuple(sorted(acting, key=lambda pair: pair[1].turn))

    def _sum(self, x: Tensor, acting: tuple[tuple[Delta, Dial], ...]) -> Tensor:
        """As a sum that gradients and compilers see through: every delta is computed for the whole batch."""
        y = self.base(x)
        total = y
        for delta, dial in acting:
            total = total + (_per_sample(_amount(dial), x) * delta.output_delta(x, y, self.base)).to(y.dtype)
        return total

    def _add_up(self, x: Tensor, acting: tuple[tuple[Delta, Dial], ...]) -> Tensor:
        """In place; all of them at once, or each delta for those samples alone at which it acts."""
        y: Tensor = self.base(x)
        self._stack = stack_of(acting, x, y, self.base, self._stack)
        if self._stack is not None:
            return self._stack.add_to(y, x)
        total = y.clone() if len(acting) > 1 and any(delta.reads_output for delta, _ in acting) else y
        for delta, dial in acting:
            if not isinstance(dial.value, Tensor):
                delta.add_to(total, x, y, self.base, dial.value)
                continue
            for piece in dial.pieces(x):
                rows = piece.rows
                delta.add_to(total[rows], x[rows], y[rows], self.base, _per_sample(piece.strength, x[rows]))
        return total

    def extra_repr(self) -> str:
        """Shown by `print(model)`."""
        said = (
            f"{k}={'per sample' if isinstance(s, Tensor) else format(s, 'g')}"
            for k, s in self.strengths.items()
        )
        return "strengths: " + ", ".join(said)


def _amount(dial: Dial) -> float | Tensor:
    """The strength as code reads it: a number would be compiled in, and another one compiled anew."""
    if dial.gain is None or isinstance(dial.value, Tensor) or not torch.compiler.is_compiling():
        return dial.value
    return dial.gain


def _per_sample(strength: float | Tensor, x: Tensor) -> float | Tensor:
    """A number as it is; (B,) as (N, 1, ..., 1) with N the samples in `x` and as many dimensions as `x`."""
    if not isinstance(strength, Tensor) or strength.dim() == 0:
        return strength
    check_samples(strength, x)
    return strength.to(x.device).repeat(x.shape[0] // len(strength)).view(-1, *(1 for _ in x.shape[1:]))


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
    if not math.isfinite(number):
        raise AdapterError(f"A strength must be finite; this one is {number}.")
    return number
