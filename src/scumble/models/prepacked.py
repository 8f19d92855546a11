"""Prepacked: frozen convolutions whose weights are put into the order of the CPU's kernels once, not at every call.

oneDNN multiplies by blocks of a weight. torch keeps the weight as (out, in, height, width) and has it put into blocks
each time that it is used: half of a training step of SD 1.5's UNet at 256 pixels in bf16, on a processor with AMX
(benchmarks/NOTES.md, 26). A weight that never changes can stay in blocks, once for the forward pass and once for the
backward pass. Where multiplying itself is slow, less is won, and kernels for other orders are as good: `pays`.

To everybody else the layer is the `nn.Conv2d` that it was, and its `weight` is where it was; the blocks are beside it,
as large again for each direction. Whether they are kept changes no bit, so free memory and the clock may decide it.
"""

from __future__ import annotations

import time
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.grad import conv2d_input

from scumble.adapters.operate import compute_dtype
from scumble.models.heap import free_memory

SMALLEST = 800_000
"""Weights of a layer from which this is worth it: the least of SD 1.5's large convolutions has more. A model with one
such layer has all its convolutions done so, since activations then keep one order of channels."""
AMPLE = 3
"""How many times what the blocks take must be free where they are kept."""


class Prepacked(nn.Conv2d):
    """A convolution that multiplies by blocks where it can: on a CPU, in its weight's dtype, while that is frozen.

    Law (tests/laws/test_prepacked.py): outputs and gradients are those of the plain layer, to rounding; and they are
    the same bits whatever is kept. A changed weight is noticed.
    """

    _room: Room
    _forth: _Blocks
    _back: _Blocks
    _seen: tuple[Tensor, int] | None

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, O, h, w), in channels-last order where it was multiplied by blocks."""
        dtype = compute_dtype(x)
        if not self._can(x, dtype):
            return super().forward(x)
        out: Tensor = _Product.apply(x.to(dtype), self)  # type: ignore[no-untyped-call]
        return out

    def _can(self, x: Tensor, dtype: torch.dtype) -> bool:
        parameters = [self.weight] if self.bias is None else [self.weight, self.bias]
        return (
            x.dim() == 4
            and x.numel() > 0
            and x.device.type == "cpu"
            and all(
                p.device.type == "cpu" and p.dtype == dtype and not p.requires_grad and not p.is_inference()
                for p in parameters
            )
            and not torch.compiler.is_compiling()
            and works(dtype)
        )

    def look(self) -> None:
        """Let go of blocks that were made of other numbers than the weight has now."""
        weight = self.weight
        if self._seen is not None:
            before, version = self._seen
            if before.data_ptr() == weight.data_ptr() and version == weight._version:
                return
        self.forget()
        self._seen = (
            weight.detach(),
            weight._version,
        )  # holds the memory, so that nothing else comes to lie there

    def forget(self) -> None:
        """Let go of all blocks; they are made again when they are needed."""
        self._forth, self._back, self._seen = _Blocks(), _Blocks(), None


class Room:
    """Whether there is memory for a model's blocks: asked once, when they would be kept for the first time."""

    def __init__(self, size: int) -> None:
        self.size = size
        """Bytes of all blocks, of both directions."""
        self._kept: bool | None = None

    @property
    def kept(self) -> bool:
        """Whether blocks are kept."""
        if self._kept is None:
            self._kept = is_ample(self.size)
        return self._kept


def is_ample(size: int, after: int = 0) -> bool:
    """Whether enough memory is free for `size` bytes of blocks and for all else that comes, once `after` bytes more are
    taken."""
    return free_memory() - after >= AMPLE * size


@cache
def pays() -> bool:
    """Whether it is worth it on this processor: one with AMX, so fast that the order of weights counts.

    Measured (benchmarks/NOTES.md, 26): with it a step takes 0.58 to 0.90 of the frozen base's. On an AMD EPYC with
    AVX-512 blocks save a tenth in bf16, which pays after some thirty steps, and where there is no memory for them a
    step takes 1.4 to 1.7 of its time.
    """
    told = getattr(torch.cpu, "get_capabilities", None)
    return bool(told is not None and told().get("amx_tile"))


def layers_packed(module: nn.Module) -> list[nn.Conv2d]:
    """The module's convolutions for which blocks are made; none where no large one is among them."""
    found = [part for part in module.modules() if isinstance(part, nn.Conv2d) and is_plain(part)]
    return found if any(part.weight.numel() >= SMALLEST for part in found) else []


def size_packed(module: nn.Module, *, directions: int = 2) -> int:
    """Bytes that the blocks of `module` may take, for the forward pass or for both; 0 before `prepack`."""
    return directions * sum(part.weight.nbytes for part in _prepacked(module))


def prepack(module: nn.Module) -> None:
    """Have the module's convolutions multiply by blocks from here on, where they can and where it is worth it. `unpack`
    is the inverse."""
    found = layers_packed(module)
    room = Room(2 * sum(part.weight.nbytes for part in found))
    for part in found:
        works(part.weight.dtype)  # tried here, where tensors have numbers
        part.__class__ = Prepacked
        assert isinstance(part, Prepacked)
        part._room = room
        part.forget()


def unpack(module: nn.Module) -> None:
    """Make the module what it was before `prepack`."""
    for part in _prepacked(module):
        for name in ("_room", "_forth", "_back", "_seen"):
            del part.__dict__[name]
        part.__class__ = nn.Conv2d  # type: ignore[assignment]


def forget(module: nn.Module) -> None:
    """Let go of the blocks that were made of `module`."""
    for part in _prepacked(module):
        part.forget()


@cache
def works(dtype: torch.dtype) -> bool:
    """Whether torch can multiply by blocks here in `dtype`: tried once, on a small layer, in both directions."""
    if dtype not in (torch.float32, torch.bfloat16) or not torch.backends.mkldnn.is_available():
        return False
    generator = torch.Generator().manual_seed(0)
    x, y, weight = (
        torch.randn(shape, generator=generator, device="cpu").div(scale).to(dtype)
        for shape, scale in (((1, 32, 8, 8), 1), ((1, 48, 8, 8), 1), ((48, 32, 3, 3), 17))
    )
    layer = nn.Conv2d(32, 48, 3, padding=1, bias=False, device="cpu")
    try:
        found = (
            (_Forth(layer, x.shape).by_blocks(x, weight, None), F.conv2d(x, weight, padding=1)),
            (_Back(layer, x.shape).by_blocks(y, weight, None), conv2d_input(x.shape, weight, y, padding=1)),
        )
    except (
        RuntimeError,
        NotImplementedError,
        AttributeError,
    ):  # a torch or a processor that lacks something of it
        return False
    near = 1e-5 if dtype == torch.float32 else 2e-2
    return all(torch.allclose(one.float(), other.float(), near, near) for one, other in found)


class _Forth:
    """How a layer is computed: (B, in, H, W) -> (B, out, h, w). Inputs are in channels-last order."""

    def __init__(self, layer: nn.Conv2d, sides: torch.Size) -> None:
        self._how: Any = (layer.padding, layer.stride, layer.dilation, layer.groups)

    @property
    def kind(self) -> tuple[Any, ...]:
        """What it does, whatever the weight is."""
        return type(self), *self._how

    def pack(self, weight: Tensor, shape: torch.Size) -> Tensor:
        """The weight in the blocks that are best for inputs of `shape`."""
        ops: Any = torch._C._nn
        packed: Tensor = ops.mkldnn_reorder_conv2d_weight(weight.to_mkldnn(), *self._how, list(shape))
        return packed

    def multiply(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """`x` by a weight in blocks or as it is: the same kernel, the same bits."""
        out: Tensor = torch.ops.mkldnn._convolution_pointwise(x, weight, bias, *self._how, "none", [], "")
        return out

    plain = multiply

    def by_blocks(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Packed and multiplied."""
        x = _ordered(x)
        return self.multiply(x, self.pack(weight, x.shape), bias)


class _Back(_Forth):
    """How the gradient of its input is computed: (B, out, h, w) -> (B, in, H, W), by a transposed convolution with the
    same weight."""

    def __init__(self, layer: nn.Conv2d, sides: torch.Size) -> None:
        """`sides`: the shape of the input."""
        padding, stride, dilation = _pair(layer.padding), layer.stride, layer.dilation
        rest = tuple(
            (side + 2 * pad - far * (kernel - 1) - 1) % step
            for side, pad, far, kernel, step in zip(
                sides[2:], padding, dilation, layer.kernel_size, stride, strict=True
            )
        )
        self._how = (padding, rest, stride, dilation, layer.groups)
        self._sides = sides

    def pack(self, weight: Tensor, shape: torch.Size) -> Tensor:
        """See _Forth."""
        ops: Any = torch.ops.mkldnn
        packed: Tensor = ops._reorder_convolution_transpose_weight(weight, *self._how, list(shape))
        return packed

    def multiply(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """See _Forth."""
        ops: Any = torch.ops.mkldnn
        out: Tensor = ops._convolution_transpose_pointwise(x, weight, bias, *self._how, "none", [], "")
        return out

    def plain(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """By the weight as it is. torch's own gradient takes half the time, and has the same bits only in bf16."""
        if x.dtype == torch.float32:
            return self.multiply(x, weight, bias)
        padding, _, stride, dilation, groups = self._how
        return conv2d_input(self._sides, weight, x, stride, padding, dilation, groups)


class _Blocks:
    """A weight in blocks, for one direction of one layer. Copies of a layer make their own."""

    def __init__(self) -> None:
        self._packed: Tensor | None = None
        self._shape = self._last = torch.Size()
        """Of the input that the blocks were made for; of the last one."""

    def __reduce__(self) -> tuple[type[_Blocks], tuple[()]]:
        return _Blocks, ()

    def multiplied(self, x: Tensor, weight: Tensor, bias: Tensor | None, how: _Forth, room: Room) -> Tensor:
        """`x` by the weight. Blocks are made where a shape comes twice in a row: what computes once keeps none."""
        x, shape, kind = _ordered(x), x.shape, (*how.kind, weight.dtype, weight.shape)
        if self._packed is not None:
            trial = (*kind, self._shape, shape)
            if trial not in _SERVES:
                return _tried(trial, how, x, weight, bias, self._packed)
            if _SERVES[trial]:
                return how.multiply(x, self._packed, bias)
        again, self._last = shape == self._last, shape
        trial = (*kind, shape, shape)
        if not (again and room.kept and _SERVES.get(trial, True)):
            return how.plain(x, weight, bias)
        packed = how.pack(weight, shape)
        known = trial in _SERVES
        out = how.multiply(x, packed, bias) if known else _tried(trial, how, x, weight, bias, packed)
        if _SERVES[trial]:
            self._packed, self._shape = packed, shape
        return out


_SERVES: dict[tuple[Any, ...], bool] = {}
"""(kind of layer, shape that blocks were made for, shape that they are asked for) -> whether they are used there: where
they give every bit that the weight itself gives, and are not slower. Tried once in a process for each."""


def _tried(
    trial: tuple[Any, ...], how: _Forth, x: Tensor, weight: Tensor, bias: Tensor | None, packed: Tensor
) -> Tensor:
    """`x` by the weight itself, and note whether blocks serve as well."""
    begun = time.perf_counter()
    out = how.plain(x, weight, bias)
    half = time.perf_counter()
    same = torch.equal(how.multiply(x, packed, bias), out)
    made_for, shape = trial[-2:]
    _SERVES[trial] = same and (made_for == shape or time.perf_counter() - half < half - begun)
    return out


class _Product(torch.autograd.Function):
    """A prepacked layer's output, of which nothing is kept but the layer."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Prepacked) -> Tensor:
        ctx.layer, ctx.sides = layer, x.shape
        if _is_played(x):
            return F.conv2d(x, layer.weight, layer.bias, *_told(layer))
        layer.look()
        weight = layer.weight.detach()
        return layer._forth.multiplied(x, weight, layer.bias, _Forth(layer, x.shape), layer._room)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, None]:
        layer: Prepacked = ctx.layer
        if _is_played(grad_y):
            return conv2d_input(ctx.sides, layer.weight, grad_y, *_told(layer)), None
        layer.look()
        weight = layer.weight.detach()
        return layer._back.multiplied(grad_y, weight, None, _Back(layer, ctx.sides), layer._room), None


def _prepacked(module: nn.Module) -> list[Prepacked]:
    return [part for part in module.modules() if isinstance(part, Prepacked)]


def is_plain(layer: nn.Conv2d) -> bool:
    """Whether this is torch's own convolution, prepacked or not, of which all is known."""
    kind = type(layer) in (nn.Conv2d, Prepacked)
    return kind and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)


def _is_played(x: Tensor) -> bool:
    """Whether there are no numbers in it (see `models.ledger`)."""
    return type(x) is not Tensor


def _told(layer: nn.Conv2d) -> tuple[Any, ...]:
    return layer.stride, layer.padding, layer.dilation, layer.groups


def _pair(padding: str | tuple[int, ...]) -> tuple[int, ...]:
    assert not isinstance(padding, str)
    return padding


def _ordered(x: Tensor) -> Tensor:
    """In channels-last order, in which the kernels compute anyway; in fp32 they have the same bits in this order alone,
    whatever the weight is in."""
    return x.contiguous(memory_format=torch.channels_last)
