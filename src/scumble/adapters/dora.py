"""DoRA: LoRA turns each output's weights, a magnitude of its own sets their length (Liu et al., 2024).

Legend: W the base's weight; s up @ down LoRA's change (see lora.py); m (out,) the magnitude; n the norm of each
output's weights in W + s up @ down, a constant in the backward pass (see magnitude.py).

    weight_delta = (m / n) (W + s up @ down) - W          arXiv:2402.09353, equation 5
"""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor

from scumble.adapters.delta import DeltaSettings
from scumble.adapters.lora import Lora, LoraSettings
from scumble.adapters.magnitude import Magnitude
from scumble.adapters.names import INPUTS, OUTPUTS
from scumble.adapters.operate import Layer
from scumble.adapters.state import LayerState


class DoraSettings(LoraSettings):
    """DoRA: LoRA with a learned magnitude for every output. Trains more like a full fine-tune at low ranks;
    a step takes longer than LoRA's."""

    family: Literal["dora"] = "dora"  # type: ignore[assignment]
    """The adapter family."""


class Dora(Magnitude, Lora):
    """(m / n) (W + s up @ down) - W beside one linear or convolution layer.

    Tensors: LoRA's `down` and `up`, and `magnitude` (out,); or `input_magnitude` (in / groups,), which is never
    trained from new but read from files of older tools.

    Strength interpolates: at strength t the weight is W + t (W' - W). Dropout acts on LoRA's input alone.
    """

    family: ClassVar[str] = "dora"
    settings: ClassVar[type[DeltaSettings]] = DoraSettings
    reads_output: ClassVar[bool] = True

    @classmethod
    def shapes(cls, base: Layer, rank: int) -> dict[str, tuple[int, ...]]:
        """LoRA's, and the magnitude."""
        return Lora.shapes(base, rank) | cls.magnitude_shapes(base, (OUTPUTS,))

    @classmethod
    def expected_shapes(cls, base: Layer, state: LayerState) -> dict[str, tuple[int, ...]]:
        """LoRA's, and the magnitude that the state has."""
        side = INPUTS if INPUTS in state.tensors else OUTPUTS
        return Lora.shapes(base, state.rank) | cls.magnitude_shapes(base, (side,))

    def direction(self, weight: Tensor) -> Tensor:
        """s up @ down."""
        return Lora.weight_delta(self, weight)

    def direction_output(self, x: Tensor, y: Tensor, base: Layer) -> Tensor:
        """s up(down(x))."""
        return Lora.output_delta(self, x, y, base)
