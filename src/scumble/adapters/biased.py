"""Biased: a delta of any family, and with it a change to the layer's bias, as files hold the two together.

    y + strength (change of the weight + bias + s up_bias)

Legend: s the delta's scale, alpha / rank; bias (out,) the change as it is; up_bias (out,) LoRA's, scaled like its
factors (peft's `lora_bias`). A layer without a bias gets one.

Nothing is trained so from new: both are read, applied and written again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from scumble.adapters.delta import Delta, paired
from scumble.adapters.families import FAMILIES
from scumble.adapters.names import BIAS, SIDES, UP_BIAS, apart
from scumble.adapters.operate import Layer, device_of, shape_of
from scumble.adapters.state import LayerState
from scumble.errors import AdapterError


def delta_of(base: Layer, state: LayerState, *, copy: bool = True) -> Delta:
    """The delta that `state` describes, of whatever family, with the change to the bias that it may have. `copy` is as
    for `Delta.from_state`.

    Raises:
        AdapterError: the tensors are not those of the family, or don't fit the layer.
        UnknownName: the family is not known.
    """
    if not SIDES & state.tensors.keys():
        return FAMILIES.get(state.family).from_state(base, state, copy=copy)
    inner, sides = apart(state)
    out = shape_of(base)[0]
    for name, tensor in sides.items():
        if tuple(tensor.shape) != (out,):
            raise AdapterError(
                f"{name} has shape {tuple(tensor.shape)} on a layer of {out} outputs. The adapter was made for "
                "another base model."
            )
    delta = FAMILIES.get(state.family).from_state(base, inner, copy=copy)
    return Biased(delta, {name: t.to(device_of(base), copy=True) for name, t in sides.items()})


def changes_bias(state: LayerState) -> bool:
    """Whether a layer's change reaches its bias: it is then no change of a weight alone."""
    return bool(SIDES & state.tensors.keys()) or (state.family == "ia3" and "multipliers" in state.tensors)


class Biased(Delta):
    """A delta and a change to the layer's bias. To everybody else it is a delta of the inner one's family."""

    def __init__(self, inner: Delta, sides: Mapping[str, Tensor]) -> None:
        """`inner` changes the weight; `sides` are `bias` or `up_bias` or both, kept in fp32 at least."""
        nn.Module.__init__(self)  # what Delta sets up, the inner one has
        self.family, self.settings = inner.family, inner.settings  # type: ignore[misc]
        self.rank, self.alpha, self.scale = inner.rank, inner.alpha, inner.scale
        self.rank_stabilized, self.reads_output = inner.rank_stabilized, inner.reads_output  # type: ignore[misc]
        self.inner = inner
        for name, tensor in sides.items():
            wide = torch.promote_types(tensor.dtype, torch.float32) if tensor.itemsize > 1 else torch.float32
            self.register_parameter(name, nn.Parameter(tensor.detach().to(wide)))

    @classmethod
    def shapes(cls, base: Layer, rank: int) -> dict[str, tuple[int, ...]]:
        """A change to the bias alone: one number for every output."""
        return {BIAS: (shape_of(base)[0],)}

    def reset(self, generator: torch.Generator) -> None:
        """The inner one's first values, and zero."""
        self.inner.reset(generator)
        for parameter in self.parameters(recurse=False):
            nn.init.zeros_(parameter)

    def weight_delta(self, weight: Tensor) -> Tensor:
        """The inner one's."""
        return self.inner.weight_delta(weight)

    def bias_delta(self, bias: Tensor | None) -> Tensor:
        """bias + s up_bias, and what the inner one changes."""
        own, scaled = self._parameters.get(BIAS), self._parameters.get(UP_BIAS)
        parts = [part for part in (own, None if scaled is None else self.scale * scaled) if part is not None]
        total = parts[0] if len(parts) == 1 else parts[0] + parts[1]
        inner = self.inner.bias_delta(bias)
        return total if inner is None else total + inner

    def output_delta(self, x: Tensor, y: Tensor, base: Layer) -> Tensor:
        """The inner one's, and the change to the bias."""
        return self.inner.output_delta(x, y, base) + self._side(y, base)

    def forward(self, x: Tensor, base: Layer, strength: float | Tensor = 1.0) -> Tensor:
        """As the inner one's, and strength times the change to the bias."""
        y: Tensor = self.inner(x, base, strength)
        return y + (strength * self._side(y, base)).to(y.dtype)

    def add_to(self, total: Tensor, x: Tensor, y: Tensor, base: Layer, strength: float | Tensor) -> None:
        """As the inner one's, and strength times the change to the bias."""
        self.inner.add_to(total, x, y, base, strength)
        total.add_((strength * self._side(y, base)).to(total.dtype))

    def live_state(self) -> LayerState:
        """The inner one's tensors and these."""
        state = self.inner.live_state()
        mine = {name: parameter.detach() for name, parameter in self.named_parameters(recurse=False)}
        return replace(state, tensors={**state.tensors, **mine})

    def pairs(self, state: LayerState) -> list[tuple[nn.Parameter, Tensor]]:
        """See `Delta.pairs`."""
        inner, sides = apart(state)
        return [*self.inner.pairs(inner), *paired(self._parameters, sides)]

    @classmethod
    def from_state(cls, base: Layer, state: LayerState, *, copy: bool = True) -> Delta:  # type: ignore[override]
        """As `delta_of`."""
        return delta_of(base, state, copy=copy)

    def _side(self, y: Tensor, base: Layer) -> Tensor:
        """bias + s up_bias in the shape that is added to y."""
        own = self.bias_delta(None)
        channels_last = isinstance(base, nn.Linear | nn.LayerNorm)
        trailing = 0 if channels_last else y.dim() - 2 if isinstance(base, nn.GroupNorm) else 2
        return own.to(y.dtype).view(-1, *(1 for _ in range(trailing)))
