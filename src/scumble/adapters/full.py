"""Full: the change to W is a matrix of W's own shape, with a number for every weight.

    weight_delta = s diff

Legend: W the base's weight; s the scale, alpha / rank: 1 unless the two are set apart.

It holds exactly what no low-rank family can: the difference of two fine-tunes, a change read from a file. It is the
one family that normalisations may have: (channels,), as files hold them.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from scumble.adapters.delta import Delta, DeltaSettings
from scumble.adapters.operate import Layer, shape_of
from scumble.adapters.state import LayerState


class FullSettings(DeltaSettings):
    """Full: every weight of the chosen layers is trained. As large as the layers themselves."""

    family: Literal["full"] = "full"
    """The adapter family."""
    rank: int = Field(default=1, ge=1)
    """Without meaning here but for the factor alpha / rank."""


class Full(Delta):
    """s diff beside one linear or convolution layer."""

    family: ClassVar[str] = "full"
    settings: ClassVar[type[DeltaSettings]] = FullSettings

    @classmethod
    def shapes(cls, base: Layer, rank: int) -> dict[str, tuple[int, ...]]:
        """The weight's own."""
        return {"diff": tuple(shape_of(base))}

    @classmethod
    def expected_shapes(cls, base: Layer, state: LayerState) -> dict[str, tuple[int, ...]]:
        """The weight's own; nothing where a file changes the bias alone."""
        return cls.shapes(base, state.rank) if "diff" in state.tensors else {}

    def reset(self, generator: torch.Generator) -> None:
        """Zero."""
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def weight_delta(self, weight: Tensor) -> Tensor:
        """s diff, in the parameters' dtype."""
        diff = self._parameters.get("diff")
        if diff is None:
            return torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
        return self.scale * diff
