"""OFT: the change to W turns its outputs among each other, a block of them at a time (Qiu et al., 2023).

Legend: W (out, in) or (out, in / groups, k, k) the base's weight; b the size of a block, n = out / b their number;
B (n, b, b) the trained blocks; Q = B - B^T; R the rotation of a block by Cayley's transform; g (out, 1...) a factor for
each output, 1 where there is none.

    R = (I + Q) (I - Q)^-1                      arXiv:2306.07280, section 3.3
    weight_delta = (g R^T - I) W                R^T on each block of b outputs

A rotation has no length: the scale alpha / rank is not used. alpha limits the turn, 0 means no limit:

    Q = Q c / |Q|  where |Q| > c = alpha out    |Q| the norm of all blocks together

Files of peft turn the inputs instead, by the numbers above the diagonal of Q, (n, b (b - 1) / 2), where one block may
be shared by all: exactly (`triangles`), or by the first terms of the inverse's series (`series`). On a convolution the
inputs are in * k * k. `weight_series` is OneTrainer's, which on a convolution turns the weight the other way. They
are read, applied and written, not trained.
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal, Self, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from scumble.adapters.delta import Delta, DeltaSettings
from scumble.adapters.names import INPUT_FORMS
from scumble.adapters.operate import Layer, shape_of
from scumble.adapters.state import LayerState

_HAIR = 1e-8
"""What the tool of this format adds to a norm before it divides by it."""


class RotationSettings(DeltaSettings):
    """What families of rotations are told."""

    rank: int = Field(default=4, ge=1)
    """Size of the blocks that turn, at most: the nearest that fills a layer's outputs is taken, and at least 2."""
    alpha: float | None = Field(default=None, gt=0)
    """Limits how far blocks turn, to alpha times the number of outputs. Empty: no limit."""
    rescaled: bool = False
    """A learned factor for every output besides."""


class OftSettings(RotationSettings):
    """OFT: blocks of each layer's outputs are rotated. Keeps the angles between neurons, so that much of what the
    base knows stays; a step takes longer than LoRA's."""

    family: Literal["oft"] = "oft"
    """The adapter family."""


class Rotation(Delta):
    """A family that turns W by blocks, each made orthogonal by Cayley's transform."""

    @classmethod
    def fresh(
        cls, base: Layer, settings: DeltaSettings, *, rank: int, alpha: float, generator: torch.Generator
    ) -> Self:
        """An untrained delta, whose rank is the size of its blocks and whose alpha is 0 unless the settings limit."""
        limited = settings.alpha is not None or settings.alpha_pattern
        size = cls.fresh_shapes(base, rank, settings)["blocks"][-1]
        return super().fresh(base, settings, rank=size, alpha=alpha if limited else 0.0, generator=generator)

    @classmethod
    def fresh_shapes(cls, base: Layer, rank: int, settings: DeltaSettings) -> dict[str, tuple[int, ...]]:
        """The blocks, and a factor for every output where the settings ask for it."""
        rescaled = rescale_shape(base) if cast(RotationSettings, settings).rescaled else {}
        return {**cls.shapes(base, rank), **rescaled}

    def reset(self, generator: torch.Generator) -> None:
        """Blocks of zeros, which turn nothing, and factors of 1."""
        for name, parameter in self.named_parameters():
            nn.init.constant_(parameter, 1.0 if name == "rescale" else 0.0)

    def turned(self, out: int) -> Tensor:
        """Q of all blocks, in the shape of `blocks`, within the limit."""
        blocks = self.get_parameter("blocks")
        skew = blocks - blocks.transpose(-1, -2)
        limit = self.alpha * out
        if limit > 0:
            norm = torch.linalg.vector_norm(skew) + _HAIR
            skew = torch.where(norm > limit, skew * (limit / norm), skew)
        return skew

    def rescaled(self, turned: Tensor, weight: Tensor) -> Tensor:
        """The change by turning, and what the factors of the outputs add: g (W + turned) - W."""
        factors = self._parameters.get("rescale")
        if factors is None:
            return turned
        # in this form a fresh change is zero bit for bit
        return factors * turned + (factors - 1) * weight


class Oft(Rotation):
    """(g R^T - I) W beside one linear or convolution layer, or W (R^T - I) where the inputs turn."""

    family: ClassVar[str] = "oft"
    settings: ClassVar[type[DeltaSettings]] = OftSettings
    reads_output: ClassVar[bool] = False

    @classmethod
    def shapes(cls, base: Layer, rank: int) -> dict[str, tuple[int, ...]]:
        """One block for every b outputs."""
        out = shape_of(base)[0]
        size = block_size(out, rank)
        return {"blocks": (out // size, size, size)}

    @classmethod
    def expected_shapes(cls, base: Layer, state: LayerState) -> dict[str, tuple[int, ...]]:
        """The form that the state's tensors have, whose blocks must fill the layer's side."""
        tensors, size = state.tensors, max(1, state.rank)
        form = next((name for name in INPUT_FORMS if name in tensors), None)
        if form is not None:
            width = shape_of(base)[1:].numel()
            number = 1 if tensors[form].shape[:1] == (1,) else width // size
            # a size that does not divide the width fits nothing
            number = number if width % size == 0 else 0
            return {form: (number, size * (size - 1) // 2)}
        out = shape_of(base)[0]
        rescale = rescale_shape(base) if "rescale" in tensors else {}
        return {"blocks": (out // size if out % size == 0 else 0, size, size), **rescale}

    def weight_delta(self, weight: Tensor) -> Tensor:
        """The change, in the parameters' dtype."""
        wide = weight.to(torch.promote_types(weight.dtype, next(self.parameters()).dtype))
        form = next((name for name in INPUT_FORMS if name in self._parameters), None)
        if form is not None:
            numbers = self.get_parameter(form)
            # R of -Q is R of Q transposed, in each of the forms
            signed = -numbers if form == "weight_series" and weight.dim() > 2 else numbers
            turn = _input_turn(form, signed, self.rank).to(wide.dtype)  # R - I
            rows = wide.reshape(wide.shape[0], -1, self.rank)
            return torch.einsum("onc,nkc->onk", rows, turn.expand(rows.shape[1], -1, -1)).reshape(
                weight.shape
            )
        turn = cayley(self.turned(weight.shape[0])).to(wide.dtype)
        blocks = wide.reshape(*turn.shape[:2], -1)
        return self.rescaled((turn.transpose(1, 2) @ blocks).view(weight.shape), wide)


def cayley(skew: Tensor) -> Tensor:
    """R - I of R = (I + Q) (I - Q)^-1: 2 Q (I - Q)^-1, which is exactly zero where Q is; (..., b, b)."""
    one = torch.eye(skew.shape[-1], dtype=skew.dtype, device=skew.device)
    return 2 * torch.linalg.solve(one - skew, skew, left=False)


def block_size(width: int, rank: int) -> int:
    """The largest divisor of `width` that is at least 2, and at most `rank` and the square root of `width`; where there
    is none, the smallest above."""
    limit = min(rank, math.isqrt(width))
    below = next((size for size in range(limit, 1, -1) if width % size == 0), None)
    return below or next((size for size in range(2, width + 1) if width % size == 0), 1)


def rescale_shape(base: Layer) -> dict[str, tuple[int, ...]]:
    """A factor for every output, with as many dimensions as the weight."""
    return {"rescale": (shape_of(base)[0], *(1 for _ in shape_of(base)[1:]))}


def _input_turn(form: str, numbers: Tensor, size: int) -> Tensor:
    """R - I of each block (n, b, b), where the inputs x become x R."""
    rows, columns = torch.triu_indices(size, size, 1, device=numbers.device)
    upper = numbers.new_zeros(numbers.shape[0], size, size).index_put(
        (torch.arange(len(numbers), device=numbers.device)[:, None], rows, columns), numbers
    )
    skew = upper - upper.transpose(1, 2)
    if form == "triangles":  # peft's exact transform turns the other way than its series
        return cayley(-skew)
    square = skew @ skew
    return 2 * skew + 2 * square + 2 * square @ skew + square @ square
