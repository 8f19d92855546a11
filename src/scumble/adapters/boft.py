"""BOFT: the change to W is a product of rotations by blocks, between which the outputs are shuffled (Liu et al., 2024).

Legend: W (out, in) or (out, in / groups, k, k) the base's weight; b the size of a block, even; n = out / b their
number, a power of two; B (m, n, b, b) the trained blocks of m stages; R their rotations by Cayley's transform (see
oft.py); P_i the shuffle of stage i, which brings together outputs that are 2^i b / 2 apart; g (out, 1...) a factor for
each output.

    weight_delta = (g P_m R_m P_m^T ... P_1 R_1 P_1^T - I) W          arXiv:2311.06243, section 4

With m = log2(n) + 1 stages every output reaches every other, at a fraction of a full rotation's numbers. alpha limits
the turn as in OFT. Files of peft's BOFT turn inputs by other shuffles: they are not read.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor

from scumble.adapters.delta import DeltaSettings
from scumble.adapters.oft import Rotation, RotationSettings, cayley, rescale_shape
from scumble.adapters.operate import Layer, shape_of
from scumble.adapters.state import LayerState


class BoftSettings(RotationSettings):
    """BOFT: several small rotations of each layer's outputs, one after the other, make a large one."""

    family: Literal["boft"] = "boft"
    """The adapter family."""


class Boft(Rotation):
    """(g P_m R_m P_m^T ... P_1 R_1 P_1^T - I) W beside one linear or convolution layer."""

    family: ClassVar[str] = "boft"
    settings: ClassVar[type[DeltaSettings]] = BoftSettings
    reads_output: ClassVar[bool] = False

    @classmethod
    def shapes(cls, base: Layer, rank: int) -> dict[str, tuple[int, ...]]:
        """As many stages as let every output reach every other."""
        out = shape_of(base)[0]
        size = _block_size(out, rank)
        number = out // size
        return {"blocks": (number.bit_length(), number, size, size)}

    @classmethod
    def expected_shapes(cls, base: Layer, state: LayerState) -> dict[str, tuple[int, ...]]:
        """The number of stages that the state has, and blocks that fill the layer's outputs."""
        out, size = shape_of(base)[0], max(1, state.rank)
        blocks = state.tensors.get("blocks")
        stages = blocks.shape[0] if blocks is not None and blocks.dim() == 4 else 1
        # the shuffle of the last stage needs 2^stages half blocks in every piece of the outputs
        fits = size % 2 == 0 and out % size == 0 and stages < 32 and out % (2 ** (stages - 1) * size) == 0
        rescale = rescale_shape(base) if "rescale" in state.tensors else {}
        return {"blocks": (stages, out // size if fits else 0, size, size), **rescale}

    def weight_delta(self, weight: Tensor) -> Tensor:
        """The change, in the parameters' dtype."""
        turns = cayley(self.turned(weight.shape[0]))  # R - I of every block
        wide = weight.to(torch.promote_types(weight.dtype, turns.dtype)).flatten(1)
        turns = turns.to(wide.dtype)
        change = torch.zeros_like(wide)
        size = turns.shape[-1]
        for stage, turn in enumerate(turns):
            apart = 2**stage * size // 2
            # what was changed so far turns as well
            near = (
                (wide + change).unflatten(0, (-1, 2, apart)).transpose(1, 2).reshape(-1, size, wide.shape[1])
            )
            far = (turn @ near).reshape(-1, apart, 2, wide.shape[1]).transpose(1, 2)
            change = change + far.reshape(wide.shape)
        return self.rescaled(change.view(weight.shape), wide.view(weight.shape))


def _block_size(width: int, rank: int) -> int:
    """The largest even b of at most `rank` with width / b a power of two; where there is none, the smallest above; for
    an odd width all of it."""
    odd = width
    while odd % 2 == 0:
        odd //= 2
    sizes = [odd * 2**power for power in range(1, width.bit_length()) if odd * 2**power <= width]
    return max((size for size in sizes if size <= rank), default=min(sizes, default=width))
