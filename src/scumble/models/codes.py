"""Codes: how numbers are kept in 8 or 4 bits: blocks of 64, each with a scale of its own.

Legend: w the weights of a block; s its scale; p a code's peak, the largest number that it can say.

    s = max |w| / p, rounded up to bf16        kept: s, and the code's number nearest to each w / s

    int8    -127 ... 127, evenly spaced                              8.25 bits a weight
    fp8     e4m3: 3 bits of mantissa, up to 448                      8.25
    nf4     16 levels, each as likely in normally distributed w      4.25

int8 and fp8 cost the same; of weights in blocks int8 keeps more (its steps are even, and a block has no outliers to
speak of). fp8 is there for those who compare with what others hold in it. nf4 is QLoRA's (Dettmers et al., 2023,
arXiv:2305.14314, appendix E), without the second quantisation of scales: in bf16 they are half of what they are in
fp32, and rounding them costs nothing, because the numbers are divided by the rounded scale.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from itertools import pairwise
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from scumble.errors import ModelError, UnknownName
from scumble.models.kernels import kernel

BLOCK = 64
"""Weights that share a scale: neighbours in the weight's own order."""

PIECE = 2**13
"""Blocks that are worked on at a time, outside of a GPU: what is in fp32 on the way stays in the processor's cache."""


class Code(ABC):
    """A way to keep numbers in few bits.

    Laws (tests/laws/test_quantized.py): |decode(encode(w)) - w| <= step * max |w| of its block; zeros stay zeros.
    """

    name: ClassVar[str]
    bits: ClassVar[int]
    """Of a number, without its share of the scale."""
    peak: ClassVar[float]
    step: ClassVar[float]
    """The largest error, in parts of the block's largest number: half of the widest gap between neighbours over
    the peak, and the rounding of the scale."""

    @abstractmethod
    def encode_unit(self, numbers: Tensor) -> Tensor:
        """(n, BLOCK) fp32 in [-peak, peak] -> (n, BLOCK * bits / 8) uint8."""

    @abstractmethod
    def decode_unit(self, codes: Tensor) -> Tensor:
        """(n, BLOCK * bits / 8) uint8 -> (n, BLOCK) fp32, which nobody else has."""

    @torch.no_grad()
    def encode(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """(codes (n, BLOCK * bits / 8), scales (n, 2)), both as bytes, which no cast of a model
        to another dtype touches. n is the number of blocks; the last is filled with zeros. On the meta device it is
        sizes alone.

        Raises:
            ModelError: a number is infinite or NaN.
        """
        flat = weight.detach().reshape(-1)
        blocks = -(-flat.numel() // BLOCK)
        codes = torch.empty(blocks, BLOCK * self.bits // 8, dtype=torch.uint8, device=flat.device)
        scales = torch.empty(blocks, 1, dtype=torch.bfloat16, device=flat.device)
        for begin in range(0, 0 if flat.is_meta else blocks, PIECE):
            end = min(begin + PIECE, blocks)
            piece = flat[begin * BLOCK : end * BLOCK].float()
            piece = F.pad(piece, (0, (end - begin) * BLOCK - piece.numel())).view(-1, BLOCK)
            scale = _up(piece.abs().amax(1, keepdim=True) / self.peak)
            if not bool(scale.isfinite().all()):
                raise ModelError(
                    f"A weight of {tuple(weight.shape)} is infinite or NaN: it can't be held in {self.name}."
                )
            scales[begin:end] = scale
            unit = piece / scale.clamp_min(torch.finfo(torch.float32).tiny)
            codes[begin:end] = self.encode_unit(unit.clamp_(-self.peak, self.peak))
        return codes, scales.view(torch.uint8)

    def decode(self, codes: Tensor, scales: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """The inverse of `encode`, to rounding: a new tensor. Each number is computed in fp32 and rounded once."""
        wide = scales.view(torch.bfloat16)
        compiling = torch.compiler.is_compiling()
        faster = None if compiling or codes.is_meta else kernel(self, codes.device.type, dtype, BLOCK)
        if faster is not None:
            numbers = faster(codes, wide.float().view(-1))
        elif compiling or codes.device.type != "cpu":
            numbers = self.read(codes, wide.float(), dtype)
        else:
            numbers = torch.empty(len(codes), BLOCK, dtype=dtype)
            for begin in range(0, len(codes), PIECE):
                piece = slice(begin, begin + PIECE)
                numbers[piece] = self.read(codes[piece], wide[piece].float(), dtype)
        return numbers.view(-1)[: shape.numel()].view(shape)

    def read(self, codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
        """(n, BLOCK) numbers by torch alone; `scales` (n, 1) fp32."""
        return self.decode_unit(codes).mul_(scales).to(dtype)

    def size(self, count: int) -> int:
        """Bytes of `count` numbers with their scales."""
        return -(-count // BLOCK) * (BLOCK * self.bits // 8 + 2)


class Int8(Code):
    """255 levels, evenly spaced."""

    name: ClassVar[str] = "int8"
    bits: ClassVar[int] = 8
    peak: ClassVar[float] = 127.0
    step: ClassVar[float] = 0.5 / 127 * (1 + 2**-7)

    def encode_unit(self, numbers: Tensor) -> Tensor:
        """See Code."""
        return numbers.round().to(torch.int8).view(torch.uint8)

    def decode_unit(self, codes: Tensor) -> Tensor:
        """See Code."""
        return codes.view(torch.int8).float()


class Fp8(Code):
    """Floating-point numbers of 8 bits, 4 of them for the exponent and 3 for the mantissa (Micikevicius et al., 2022,
    arXiv:2209.05433)."""

    name: ClassVar[str] = "fp8"
    bits: ClassVar[int] = 8
    peak: ClassVar[float] = 448.0
    step: ClassVar[float] = 16 / 448 * (1 + 2**-7)

    def encode_unit(self, numbers: Tensor) -> Tensor:
        """See Code."""
        return numbers.to(torch.float8_e4m3fn).view(torch.uint8)

    def decode_unit(self, codes: Tensor) -> Tensor:
        """See Code."""
        # a CPU looks numbers up faster than it converts them
        every = torch.arange(256, dtype=torch.uint8, device=codes.device).view(torch.float8_e4m3fn).float()
        return every.index_select(0, codes.flatten().int()).view(codes.shape)


class Nf4(Code):
    """16 levels at the quantiles of a normal distribution, two to a byte."""

    name: ClassVar[str] = "nf4"
    bits: ClassVar[int] = 4
    peak: ClassVar[float] = 1.0
    step: ClassVar[float] = 0.1519036 * (1 + 2**-7)

    levels: ClassVar[tuple[float, ...]] = (
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    )
    """The paper's; 0 is one of them, exactly."""

    def encode_unit(self, numbers: Tensor) -> Tensor:
        """See Code."""
        # counted, how many borders each number is beyond: almost twice as fast as searching
        nearest = torch.zeros(numbers.shape, dtype=torch.uint8, device=numbers.device)
        for one, next_one in pairwise(self.levels):
            nearest += numbers > (one + next_one) / 2
        return nearest[:, 0::2] << 4 | nearest[:, 1::2]  # the first in the upper half, as bitsandbytes packs

    def decode_unit(self, codes: Tensor) -> Tensor:
        """See Code."""
        # both numbers of a byte are looked up at once
        levels = torch.tensor(self.levels, device=codes.device)
        pairs = torch.stack([levels.repeat_interleave(16), levels.repeat(16)], dim=1)
        return pairs.index_select(0, codes.flatten().int()).view(len(codes), -1)


CODES: dict[str, Code] = {code.name: code for code in (Int8(), Nf4(), Fp8())}
"""What a base can be held in, by name."""

NONE = "none"
"""A base that is held as it is."""


def code_named(quantization: str) -> Code | None:
    """The code called "int8", "nf4" or "fp8"; None for "none".

    Raises:
        UnknownName: none is called so.
    """
    if quantization == NONE:
        return None
    if quantization not in CODES:
        raise UnknownName("quantization", quantization, (NONE, *CODES))
    return CODES[quantization]


def _up(scales: Tensor) -> Tensor:
    """Positive fp32 numbers rounded up to the next that bf16 has."""
    return (scales.view(torch.int32) + 0xFFFF & -0x10000).view(torch.float32)
