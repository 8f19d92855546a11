"""Ledger: what a piece of work holds in memory at once, played through on tensors that have shapes and no numbers.

The very modules, adapters and losses of a run are played, so that whatever they keep, copy or recompute is counted; and
torch chooses the operations that it would choose on the device that is meant, fused attention included. What operations
take inside themselves (reordered weights, columns of a convolution) is not seen here.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry


@dataclass(frozen=True)
class Held:
    """What one piece of work held, in bytes, without what was there before."""

    peak: int
    """At most, at one time."""
    left: int
    """When it ended."""
    flops: int = 0
    """Floating-point operations of its products and convolutions."""
    heaviest: int = 0
    """Bytes of the weights of its heaviest convolution."""


@dataclass(frozen=True)
class Inside:
    """What one block kept for the backward pass."""

    kept: int
    """Bytes, without what it gave to the next."""
    flops: int
    """Of its forward pass: what recomputing it costs."""


class Ledger(TorchDispatchMode):
    """Counts, within a `with` block, the memory of every tensor that is made there, until it is gone."""

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        """`known` tensors were there before: they and their views count nothing."""
        super().__init__()
        self.now = self.peak = self.flops = self.heaviest = 0
        self._seen: weakref.WeakKeyDictionary[Any, None] = weakref.WeakKeyDictionary()
        for tensor in known:
            self._seen[tensor.untyped_storage()] = None

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        told = kwargs or {}
        if function is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return _answer(args[0])
        out = function(*args, **told)
        counted = flop_registry.get(getattr(function, "_overloadpacket", None))
        if counted is not None:
            self.flops += int(counted(*args, **told, out_val=out))
            if function is torch.ops.aten.convolution.default:
                self.heaviest = max(self.heaviest, args[1].numel() * args[1].element_size())
        for one in tree_leaves(out):
            if isinstance(one, Tensor):
                self._add(one)
        return out

    @property
    def held(self) -> Held:
        """What was held so far."""
        return Held(self.peak, self.now, self.flops, self.heaviest)

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage in self._seen:
            return
        size = storage.nbytes()
        self._seen[storage] = None
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._drop, size).atexit = False

    def _drop(self, size: int) -> None:
        self.now -= size


def _answer(asked: Tensor) -> bool | int | float:
    """What is said where work asks for a number that is not there: yes, or one. Such questions are whether all is
    finite."""
    if asked.dtype == torch.bool:
        return True
    return 1.0 if asked.is_floating_point() else 1


class Theatre:
    """Where modules are played without numbers: their tensors, on the meta device, are taken for tensors of
    `device`."""

    def __init__(self, modules: Iterable[nn.Module], device: torch.device) -> None:
        self._modules, self.device = list(modules), device
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)

    def play(self, work: Callable[[], Any]) -> Held:
        """What `work` holds. Its result counts as held to the end, gradients too; they are gone afterwards."""
        held, _ = self._play(work, {})
        return held

    def play_blocks(
        self, work: Callable[[], Any], blocks: Mapping[str, nn.Module]
    ) -> tuple[Held, dict[str, Inside]]:
        """The same, and beside it what each of `blocks` (path -> block) keeps of its forward pass."""
        return self._play(work, blocks)

    def _play(
        self, work: Callable[[], Any], blocks: Mapping[str, nn.Module]
    ) -> tuple[Held, dict[str, Inside]]:
        inside: dict[str, Inside] = {}
        with self._faked() as known, ExitStack() as hooks:
            ledger = Ledger(known)
            for path, block in blocks.items():
                for handle in _watch(path, block, ledger, inside):
                    hooks.callback(handle.remove)
            with self._mode, ledger:
                result = work()
            held = ledger.held
            del result
            for tensor in known:
                tensor.grad = None
        return held, inside

    @contextmanager
    def _faked(self) -> Iterator[list[Tensor]]:
        """The modules with fake tensors in the place of their own; these tensors."""
        places: list[tuple[dict[str, Any], str, Tensor]] = []
        twins: dict[Tensor, Tensor] = {}
        for root in self._modules:
            for module in root.modules():
                tables: tuple[Any, ...] = (module._parameters, module._buffers)
                for table in tables:
                    places += [(table, name, own) for name, own in table.items() if own is not None]
        for table, name, own in places:
            if own not in twins:
                twins[own] = self._twin(own)
            table[name] = twins[own]
        try:
            yield list(twins.values())
        finally:
            for table, name, own in places:
                table[name] = own

    def _twin(self, own: Tensor) -> Tensor:
        plain = own.detach()
        fake: Tensor = FakeTensor(self._mode, plain if plain.is_meta else plain.to("meta"), self.device)
        return nn.Parameter(fake, requires_grad=own.requires_grad) if isinstance(own, nn.Parameter) else fake


def _watch(path: str, block: nn.Module, ledger: Ledger, inside: dict[str, Inside]) -> list[Any]:
    begun: list[tuple[int, int]] = []

    def enter(module: nn.Module, given: Any) -> None:
        begun.append((ledger.now, ledger.flops))

    def leave(module: nn.Module, given: Any, out: Any) -> None:
        now, flops = begun.pop()
        if path not in inside and torch.is_grad_enabled():
            own = {
                id(one.untyped_storage()): one.untyped_storage()
                for one in tree_leaves(out)
                if isinstance(one, Tensor)
            }
            given_on = sum(storage.nbytes() for storage in own.values())
            inside[path] = Inside(max(0, ledger.now - now - given_on), ledger.flops - flops)

    return [block.register_forward_pre_hook(enter), block.register_forward_hook(leave)]
