"""Offload: the denoiser's blocks wait in host memory, and each is on the device only around the time when it computes.

    on the device    block n computes      n + 1 computes        n + 2 ...
    on its way       n + 1                 n + 2                 n + 3

Forward the next block is sent while one computes, backward the one before it. Frozen weights never come back: a copy
is dropped, and the host has kept the original. What trains, and all of the base that is in no block, stays on the
device.

A weight that the graph wants again in the backward pass is not kept there, as it would be: what is kept is where it
lies in its block, and the block is sent for when that is asked for. With gradient checkpointing the recomputation asks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from scumble.adapters.operate import computes_on
from scumble.errors import ModelError, UnknownName
from scumble.models.family import BaseModel
from scumble.models.precision import check_precision

OFFLOADS = ("none", "blocks")
"""What may wait in host memory: nothing, or the denoiser's blocks."""

ALIGNED = 256
"""Bytes at whose multiples a tensor begins in its block."""

Arrival: TypeAlias = tuple[Tensor, Callable[[], None]]
"""A copy on the device, perhaps still on its way, and what makes the computation wait for it."""


class Mover(Protocol):
    """Copies bytes from the host to the device."""

    def keep(self, flat: Tensor) -> Tensor:
        """`flat` (n,) uint8 on the host, where copies can be made from while the device computes."""

    def send(self, host: Tensor) -> Arrival:
        """A copy of what `keep` gave, begun at once."""


class CudaMover:
    """Pinned memory, copied on a stream of its own.

    The copy's memory belongs to the stream that computes: it is given back in that stream's order, when all that was
    asked of it before is done, and so nothing has to be remembered of who uses it.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def keep(self, flat: Tensor) -> Tensor:
        """See `Mover`."""
        return flat.pin_memory()

    def send(self, host: Tensor) -> Arrival:
        """See `Mover`."""
        there = torch.empty_like(host, device=self._device, pin_memory=False)
        # until then this memory may be in use by what was asked for before
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            there.copy_(host, non_blocking=True)
            arrived = self._stream.record_event()
        return there, lambda: torch.cuda.current_stream(self._device).wait_event(arrived)


@dataclass(frozen=True)
class _Place:
    """A tensor, and where it lies in its block's bytes."""

    tensor: Tensor
    begin: int
    stride: tuple[int, ...]

    def view(self, flat: Tensor) -> Tensor:
        """The tensor in `flat`, the block's bytes."""
        shape, dtype = self.tensor.shape, self.tensor.dtype
        size = shape.numel() * dtype.itemsize
        return flat[self.begin : self.begin + size].view(dtype).as_strided(shape, self.stride)


@dataclass(frozen=True)
class _Lies:
    """A tensor that the graph keeps: where it lies in a block's bytes."""

    block: int
    dtype: torch.dtype
    begin: int
    """In numbers of that dtype."""
    shape: torch.Size
    stride: tuple[int, ...]

    def view(self, flat: Tensor) -> Tensor:
        """The tensor in `flat`, the block's bytes."""
        empty = torch.empty(0, dtype=self.dtype, device=flat.device)
        return empty.set_(flat.untyped_storage(), self.begin, self.shape, self.stride)


class _Block:
    """One block's frozen tensors: in host memory, and while it is there in a copy on the device."""

    def __init__(self, tensors: Sequence[Tensor], mover: Mover) -> None:
        self.places: list[_Place] = []
        size = 0
        for tensor in tensors:
            self.places.append(_Place(tensor, size, _dense_stride(tensor)))
            size += math.ceil(tensor.numel() * tensor.dtype.itemsize / ALIGNED) * ALIGNED
        flat = torch.empty(size, dtype=torch.uint8, device="cpu")
        for place in self.places:
            place.view(flat).copy_(place.tensor.detach())
        self.mover, self.host = mover, mover.keep(flat)
        self.arrival: Arrival | None = None
        self._lay(self.host)

    def send(self) -> None:
        """Begin the copy, unless there is one."""
        if self.arrival is None:
            self.arrival = self.mover.send(self.host)

    def use(self) -> Tensor:
        """The block's bytes on the device, which its tensors now have."""
        self.send()
        assert self.arrival is not None
        there, wait = self.arrival
        wait()
        self._lay(there)
        return there

    def drop(self) -> None:
        """Let go of the copy."""
        if self.arrival is not None:
            self.arrival[1]()  # memory that a copy is on its way to must not become another's
            self.arrival = None
            self._lay(self.host)

    def _lay(self, flat: Tensor) -> None:
        for place in self.places:
            place.tensor.data = place.view(flat)


class Offload:
    """Keeps a denoiser's blocks in host memory, and at most two of them on the device: one that computes and one that
    is on its way.

    Laws (tests/models/test_offload.py): outputs and gradients are bit for bit those of a base that is whole on the
    device; the frozen tensors are the same objects, and read anywhere they have their values.
    """

    def __init__(
        self, root: nn.Module, blocks: Sequence[nn.Module], device: torch.device, mover: Mover
    ) -> None:
        """`blocks`: parts of `root`, none inside another, without adapters yet. A tensor that two of them share stays
        where it is.
        """
        found = [list(_frozen(block)) for block in blocks]
        owners: dict[int, int] = {}
        for tensors in found:
            for tensor in tensors:
                owners[id(tensor)] = owners.get(id(tensor), 0) + 1
        self._blocks = [_Block([t for t in tensors if owners[id(t)] == 1], mover) for tensors in found]
        self.kept = frozenset(id(place.tensor) for block in self._blocks for place in block.places)
        """The ids of the tensors that wait in host memory."""
        self._there: dict[int, int] = {}
        """Where the memory of a block on the device begins -> the block."""
        self._last: tuple[int, bool] | None = None
        """(the block that computes, whether in the backward pass)"""
        self._then: dict[tuple[int, bool], tuple[int, bool]] = {}
        """What came after which, when that was last there: the order is the model's own, and need not be told."""
        self._keeping: list[saved_tensors_hooks | None] = []
        for number, block in enumerate(blocks):
            block.register_forward_pre_hook(partial(self._before_block, number))
            # whoever moves the whole model, as Accelerate does, leaves these where they are
            block._apply = partial(self._moved, block._apply)  # type: ignore[method-assign]
            for layer in block.modules():
                computes_on(layer, device)
        root.register_forward_pre_hook(self._before_root)
        root.register_forward_hook(self._after_root, always_call=True)

    @property
    def host_bytes(self) -> int:
        """Bytes of the blocks in host memory."""
        return sum(block.host.numel() for block in self._blocks)

    @property
    def device_bytes(self) -> int:
        """The most bytes that blocks take on the device: of two that follow each other."""
        sizes = [block.host.numel() for block in self._blocks]
        neighbours = {(one[0], other[0]) for one, other in self._then.items() if one[0] != other[0]}
        return max((sizes[one] + sizes[other] for one, other in neighbours), default=sum(sorted(sizes)[-2:]))

    @property
    def present(self) -> tuple[int, ...]:
        """The blocks on the device now, or on their way."""
        return tuple(number for number, block in enumerate(self._blocks) if block.arrival is not None)

    def leave(self) -> None:
        """Let go of every copy on the device; what is needed again is sent again."""
        for block in self._blocks:
            block.drop()
        self._there, self._last = {}, None

    def discard(self) -> None:
        """Let go of the blocks for good: nothing is computed by them any more."""
        self.leave()
        self._blocks = []

    def _arrive(self, number: int, backward: bool) -> Tensor:
        """Block `number` computes from now on: its bytes on the device."""
        now, block = (number, backward), self._blocks[number]
        if now == self._last and block.arrival is not None:
            return block.arrival[0]
        if self._last is not None:
            self._then[self._last] = now
        self._last = now
        ahead = self._ahead(now)
        for other in self.present:
            if other not in (number, ahead):
                self._blocks[other].drop()
        there = block.use()
        self._there = {there.untyped_storage().data_ptr(): number}
        if ahead is not None:
            self._blocks[ahead].send()
        return there

    def _ahead(self, now: tuple[int, bool]) -> int | None:
        """The block that will compute next, as far as is known."""
        for _ in range(2):  # where forward turns into backward, one block comes twice
            following = self._then.get(now)
            if following is None or following[0] != now[0]:
                return None if following is None else following[0]
            now = following
        return None

    def _before_block(self, number: int, *_: Any) -> None:
        self._arrive(number, torch._C._current_graph_task_id() != -1)

    def _before_root(self, *_: Any) -> None:
        keeping = saved_tensors_hooks(self._pack, self._unpack) if torch.is_grad_enabled() else None
        if keeping is not None:
            keeping.__enter__()
        self._keeping.append(keeping)

    def _after_root(self, *_: Any) -> None:
        keeping = self._keeping.pop()
        if keeping is not None:
            keeping.__exit__()

    def _pack(self, tensor: Tensor) -> Tensor | _Lies:
        number = self._there.get(_memory(tensor))
        if number is None:
            return tensor
        return _Lies(number, tensor.dtype, int(tensor.storage_offset()), tensor.shape, tensor.stride())

    def _unpack(self, kept: Tensor | _Lies) -> Tensor:
        return kept.view(self._arrive(kept.block, True)) if isinstance(kept, _Lies) else kept

    def _moved(
        self, apply: Callable[..., nn.Module], move: Callable[[Tensor], Tensor], *told: Any
    ) -> nn.Module:
        return apply(lambda tensor: tensor if id(tensor) in self.kept else move(tensor), *told)


def park(base: BaseModel, device: torch.device, mover: Mover | None = None) -> Offload:
    """Bring a base that was loaded on the host to `device`, all but its denoiser's blocks, which go there one by one
    when they compute. Before anything is put into it.

    `mover`: None copies from pinned memory on a CUDA stream.

    Raises:
        ModelError: the base doesn't say what its blocks are.
        PrecisionError: the device can't compute in the base's dtype.
    """
    if not base.movable:
        raise ModelError(
            f'offload = "blocks": {base.name} ({base.family}) does not say which parts of its denoiser are blocks. '
            "Leave offload out."
        )
    check_precision(base.dtype, device)
    moving = Offload(base.denoiser, base.movable, device, mover or CudaMover(device))
    for module in base.modules().values():
        for tensor in _tensors(module):
            if id(tensor) not in moving.kept:
                tensor.data = tensor.data.to(device)
    base.device, base.offloaded = device, moving
    return moving


def refuse_offload(offloading: str, device: torch.device, processes: int = 1) -> None:
    """Say before anything is loaded where offloading does nothing.

    Raises:
        UnknownName: nothing is called so.
        ModelError: there is no GPU to save memory of, or several processes would have to agree on what is there.
    """
    if offloading not in OFFLOADS:
        raise UnknownName("offload", offloading, OFFLOADS)
    if offloading == "none":
        return
    if device.type != "cuda":
        raise ModelError(
            f'offload = "{offloading}" keeps the base\'s blocks in host memory while a GPU computes. Here it would do '
            f"nothing: the computation is on {device.type}, where they are in that memory anyway. Leave it out; what "
            "saves memory here is quantization, gradient checkpointing and a smaller batch."
        )
    if processes > 1:
        raise ModelError(
            f'offload = "{offloading}" works in one process, and this run has {processes}. Leave it out, or train in '
            "one process; quantization and gradient checkpointing save memory in all of them."
        )


def _memory(tensor: Tensor) -> int:
    """Where the memory of a tensor begins; 0 of what has none to speak of."""
    if tensor.layout is not torch.strided or tensor.is_meta:
        return 0
    return tensor.untyped_storage().data_ptr()


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def _frozen(block: nn.Module) -> Iterator[Tensor]:
    """What may wait: plain tensors that don't train."""
    for tensor in _tensors(block):
        if type(tensor) in (nn.Parameter, Tensor) and not tensor.requires_grad and tensor.numel():
            yield tensor


def _dense_stride(tensor: Tensor) -> tuple[int, ...]:
    """The tensor's own order in memory, where it leaves no gaps."""
    for order in (torch.contiguous_format, torch.channels_last):
        if (tensor.dim() == 4 or order is torch.contiguous_format) and tensor.is_contiguous(
            memory_format=order
        ):
            return tensor.stride()
    return torch.empty(tensor.shape, device="meta").stride()
