"""IA3: the change to W is W itself, each output (or input) by a factor of its own (Liu et al., 2022).

    weight_delta = s W * factors          arXiv:2205.05638, section 3.3

Legend: W the base's weight; s the scale, alpha / rank; factors (out,), or input_factors (in / groups,).
"""

from __future__ import annotations

from typing import ClassVar, Literal, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from scumble.adapters.delta import Delta, DeltaSettings
from scumble.adapters.operate import Layer
from scumble.adapters.state import LayerState


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
        return {"factors": (base.weight.shape[0],)}

    @classmethod
    def fresh_shapes(cls, base: Layer, rank: int, settings: DeltaSettings) -> dict[str, tuple[int, ...]]:
        """One number for every output or input."""
        return _inputs(base) if cast(Ia3Settings, settings).inputs else cls.shapes(base, rank)

    @classmethod
    def expected_shapes(cls, base: Layer, state: LayerState) -> dict[str, tuple[int, ...]]:
        """The form that the state's tensor has."""
        return _inputs(base) if "input_factors" in state.tensors else cls.shapes(base, state.rank)

    def reset(self, generator: torch.Generator) -> None:
        """Zero."""
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def weight_delta(self, weight: Tensor) -> Tensor:
        """s W * factors, in the parameters' dtype."""
        (name, factors), *_ = self.named_parameters()
        side = (1, -1) if name == "input_factors" else (-1, 1)
        wide = weight.to(torch.promote_types(weight.dtype, factors.dtype))
        return (self.scale * factors).view(*side, *(1 for _ in weight.shape[2:])) * wide

    def output_delta(self, x: Tensor, y: Tensor, base: Layer) -> Tensor:
        """s (y - bias) * factors; through the weight where the factors are of the inputs."""
        mine = self._parameters.get("factors")
        if mine is None:
            return super().output_delta(x, y, base)
        factors = (self.scale * mine).to(y.dtype).view(-1, *(1 for _ in base.weight.shape[2:]))
        return factors * (y if base.bias is None else y - base.bias.to(y.dtype).view_as(factors))


def _inputs(base: Layer) -> dict[str, tuple[int, ...]]:
    return {"input_factors": (base.weight.shape[1],)}
