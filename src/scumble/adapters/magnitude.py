"""Magnitude: a change of direction with a learned length for every output (Liu et al., 2024, arXiv:2402.09353).

Legend: W the base's weight; D the direction's change, of W's shape; m the magnitude, one number for each
output (or, in older files, for each input); n the norm of W + D over all other axes.

    weight_delta = (m / n) (W + D) - W                    the paper's equation 5

n is a constant in the backward pass, as the paper's section 4.3 has it: it follows D and gets no gradient.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Container

import torch
from torch import Tensor, nn

from scumble.adapters.delta import Delta
from scumble.adapters.names import INPUTS, OUTPUTS
from scumble.adapters.operate import Layer, shape_of


class Magnitude(Delta):
    """A family whose change may be split into direction and magnitude; without one of the two tensors
    `magnitude` and `input_magnitude` it is the direction alone.

    A family writes `direction` instead of `weight_delta`, and may write a faster `direction_output`.
    """

    # What a family writes

    @abstractmethod
    def direction(self, weight: Tensor) -> Tensor:
        """D: as `weight_delta` would be without a magnitude."""

    def direction_output(self, x: Tensor, y: Tensor, base: Layer) -> Tensor | None:
        """D's change to y, where that is faster than making D; else None."""
        return None

    # What they share

    @staticmethod
    def magnitude_shapes(base: Layer, names: Container[str]) -> dict[str, tuple[int, ...]]:
        """The shapes of those magnitudes that are in `names`, for this layer."""
        sides = {OUTPUTS: (shape_of(base)[0],), INPUTS: (shape_of(base)[1],)}
        return {name: shape for name, shape in sides.items() if name in names}

    def start(self, base: Layer, generator: torch.Generator) -> None:
        """The magnitude starts as W's own norm, bit for bit, so that the change is zero."""
        super().start(base, generator)
        weight = base.weight.detach()
        for name, axis in ((OUTPUTS, 0), (INPUTS, 1)):
            if name in self._parameters:
                self.register_parameter(name, nn.Parameter(_norm(_wide(weight), axis).flatten().cpu()))

    def constants(self, weight: Tensor) -> tuple[Tensor, ...]:
        """(n,), with one number for each output (or input) in the shape that multiplies W."""
        axis = self._axis()
        if axis is None:
            return ()
        with torch.no_grad():
            return (_norm(_wide(weight) + self.direction(weight), axis),)

    def weight_delta(self, weight: Tensor) -> Tensor:
        """(m / n) (W + D) - W, in the parameters' dtype; D where there is no magnitude."""
        if self._axis() is None:
            return self.direction(weight)
        ratio = self._ratio(weight)
        # In this form a fresh change is zero bit for bit, and small ones do not drown in W.
        return (ratio - 1) * _wide(weight) + ratio * self.direction(weight)

    def output_delta(self, x: Tensor, y: Tensor, base: Layer) -> Tensor:
        """(m / n - 1) (y - bias) + (m / n) D's change to y, where that is faster; else through the weight."""
        axis = self._axis()
        change = None if axis == 1 else self.direction_output(x, y, base)
        if change is None:
            return Delta.output_delta(self, x, y, base)
        if axis is None:
            return change
        ratio = self._ratio(base.weight).view(-1, *(1 for _ in shape_of(base)[2:]))
        plain = y if base.bias is None else y - base.bias.to(y.dtype).view_as(ratio)
        return (ratio - 1).to(y.dtype) * plain + ratio.to(change.dtype) * change

    def add_to(self, total: Tensor, x: Tensor, y: Tensor, base: Layer, strength: float | Tensor) -> None:
        """total += strength * output_delta; the direction's own way where there is no magnitude."""
        if self._axis() is None:
            return super().add_to(total, x, y, base, strength)
        Delta.add_to(self, total, x, y, base, strength)

    def forward(self, x: Tensor, base: Layer, strength: float | Tensor = 1.0) -> Tensor:
        """base(x) + strength * output_delta; the direction's own way where there is no magnitude."""
        if self._axis() is None:
            return super().forward(x, base, strength)
        return Delta.forward(self, x, base, strength)

    def _axis(self) -> int | None:
        return 0 if OUTPUTS in self._parameters else 1 if INPUTS in self._parameters else None

    def _ratio(self, weight: Tensor) -> Tensor:
        """m / n in the shape that multiplies W."""
        (norm,) = self.constants(weight)
        magnitude = self._parameters[INPUTS if self._axis() else OUTPUTS]
        assert magnitude is not None
        # A row of zeros has no direction: it stays what it is, instead of becoming NaN.
        return magnitude.view(norm.shape) / norm.clamp_min(torch.finfo(norm.dtype).tiny)


def _norm(weight: Tensor, axis: int) -> Tensor:
    return torch.linalg.vector_norm(weight, dim=[d for d in range(weight.dim()) if d != axis], keepdim=True)


def _wide(weight: Tensor) -> Tensor:
    return weight.to(torch.promote_types(weight.dtype, torch.float32))
