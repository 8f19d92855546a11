"""IA3: the change to W is W itself, each output (or input) by a factor of its own (Liu et al., 2022).

    weight_delta = s W * factors          arXiv:2205.05638, section 3.3

Legend: W the base's weight; s the scale, alpha / rank; factors (out,), or input_factors (in / groups,).

Read from files of peft, the two are `multipliers` (out, 1), on a convolution (1, out, 1, 1), and `input_multipliers`
(1, in[, 1, 1]), which are 1 + factors; those of the outputs multiply the layer's bias as well.
"""

from __future__ import annotations

from typing import ClassVar, Literal, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from scumble.adapters.delta import Delta, DeltaSettings
from scumble.adapters.operate import Layer, shape_of
from scumble.adapters.state import LayerState

_FORMS = ("factors", "input_factors", "multipliers", "input_multipliers")
"""The names of the one tensor that a layer has."""


class Ia3Settings(DeltaSettings):
    """IA3: one factor for every output of a layer. The smallest adapters; they shift what is there."""

    family: Literal["ia3"] = "ia3"
    """The adapter family."""
    rank: int = Field(default=1, ge=1)
    """Without meaning here but for the factor alpha / rank."""
    inputs: bool = False
    """One factor for every input instead."""


class Ia3(Delta):
    """s W * factors beside one linear or convolution layer."""

    family: ClassVar[str] = "ia3"
    settings: ClassVar[type[DeltaSettings]] = Ia3Settings

    @classmethod
    def shapes(cls, base: Layer, rank: int) -> dict[str, tuple[int, ...]]:
        """One number for every output."""
        return {"factors": (shape_of(base)[0],)}

    @classmethod
    def fresh_shapes(cls, base: Layer, rank: int, settings: DeltaSettings) -> dict[str, tuple[int, ...]]:
        """One number for every output or input."""
        inputs = cast(Ia3Settings, settings).inputs
        return {"input_factors": (shape_of(base)[1],)} if inputs else cls.shapes(base, rank)

    @classmethod
    def expected_shapes(cls, base: Layer, state: LayerState) -> dict[str, tuple[int, ...]]:
        """The form that the state's tensor has."""
        name = next((name for name in _FORMS if name in state.tensors), "factors")
        number = shape_of(base)[1 if name.startswith("input_") else 0]
        if not name.endswith("multipliers"):
            return {name: (number,)}
        trailing = (1,) * (len(shape_of(base)) - 2)
        side = (1, number) if trailing or name.startswith("input_") else (number, 1)
        return {name: (*side, *trailing)}

    def reset(self, generator: torch.Generator) -> None:
        """Zero."""
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def weight_delta(self, weight: Tensor) -> Tensor:
        """s W * factors, in the parameters' dtype."""
        name, factors = self._factors()
        side = (1, -1) if name.startswith("input_") else (-1, 1)
        wide = weight.to(torch.promote_types(weight.dtype, factors.dtype))
        return (self.scale * factors).view(*side, *(1 for _ in weight.shape[2:])) * wide

    def bias_delta(self, bias: Tensor | None) -> Tensor | None:
        """s bias * (multipliers - 1); none in the other forms."""
        name, factors = self._factors()
        return (
            None if bias is None or name != "multipliers" else self.scale * factors * bias.to(factors.dtype)
        )

    def _factors(self) -> tuple[str, Tensor]:
        """The name of the tensor that there is, and what it multiplies W by, less 1."""
        ((name, values),) = self._parameters.items()
        assert values is not None
        return name, values.flatten() - 1 if name.endswith("multipliers") else values

    def output_delta(self, x: Tensor, y: Tensor, base: Layer) -> Tensor:
        """s (y - bias) * factors; through the weight where the factors are of the inputs."""
        name, mine = self._factors()
        if name.startswith("input_"):
            return super().output_delta(x, y, base)
        factors = (self.scale * mine).to(y.dtype).view(-1, *(1 for _ in shape_of(base)[2:]))
        apart = base.bias if name == "factors" else None
        return factors * (y if apart is None else y - apart.to(y.dtype).view_as(factors))
