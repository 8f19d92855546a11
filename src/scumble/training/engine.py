"""Engine: how the operations of one step are given to the device: one after the other, compiled, or recorded.

The loop asks for gradients, their norm and a step; which engine does them changes the time, and results by rounding
alone. An engine that can't go on says so with `Unsuited`, and the step is done anew by this one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from scumble.registry import Registry
from scumble.training.optimizers import skipping, skips_on_device
from scumble.training.proofs import check_reaches

if TYPE_CHECKING:
    from accelerate import Accelerator

    from scumble.data.record import Batch

R = TypeVar("R")

ENGINES: Registry[type[Engine]] = Registry(
    "engine",
    {
        "eager": "scumble.training.engine:Engine",
        "compile": "scumble.training.compiled:CompiledEngine",
        "graph": "scumble.training.graphs:GraphEngine",
    },
)


class Unsuited(Exception):
    """An engine can't do this run, or not this step; the message says why, as the end of a sentence."""


@dataclass(frozen=True)
class Work:
    """What a phase has to compute."""

    objective: nn.Module
    """The phase's own."""
    prepared: nn.Module
    """The same as Accelerate wraps it: data parallelism and autocast are in it."""
    stepper: Any
    """The optimizer as Accelerate wraps it."""
    parameters: Sequence[nn.Parameter]
    """What trains."""
    limit: float | None
    """Gradients are scaled down to this norm; None leaves them."""
    blocks: Sequence[nn.Module]
    """See `Plan.blocks`."""
    accelerator: Accelerator


class Engine:
    """Eager: every operation when Python comes to it. What other engines do otherwise, they override."""

    name: ClassVar[str] = "eager"
    notes: Sequence[str] = ()
    """What a person should know of how this run is computed."""

    def __init__(self, work: Work) -> None:
        """
        Raises:
            Unsuited: this engine can't do this run.
        """
        self.work = work

    def zero(self) -> None:
        """Forget the gradients."""
        self.work.stepper.zero_grad()

    def backward(self, batch: Batch, samples: int, *, last: bool) -> Tensor:
        """The losses of `batch`, (B,) without graph; their sum / `samples` is added to the gradients.

        `last`: of the batches of a step.

        Raises:
            NothingTrained: the loss depends on nothing that trains.
            Unsuited: this engine can't do it; gradients may be half added.
        """
        accelerator, prepared = self.work.accelerator, self.work.prepared
        with nullcontext() if last else accelerator.no_sync(prepared):
            losses = check_reaches(prepared(batch))
            accelerator.backward(honest(losses.sum() / samples))
        return losses.detach()

    def clip(self) -> Tensor:
        """Scale the gradients down to the limit; their norm before that, 0-dim."""
        limit = self.work.limit or float("inf")
        norm: Tensor = self.work.accelerator.clip_grad_norm_(self.work.parameters, limit)
        return norm

    def step(self, rates: Mapping[str, float], skip: Tensor) -> None:
        """One optimizer step, at a learning rate for each parameter group by its name; left out where `skip` (0-dim
        fp32) is 1, without waiting for the device where the optimizer can."""
        stepper = self.work.stepper
        for group in stepper.optimizer.param_groups:
            group["lr"] = rates[group["name"]]
        if self.work.accelerator.scaler is not None:
            stepper.step()  # fp16's loss scaler looks at the same gradients and skips by itself
        elif skips_on_device(stepper.optimizer):
            with skipping(stepper.optimizer, skip):
                stepper.step()
        elif not skip.item():
            stepper.step()

    def close(self) -> None:
        """Leave model and optimizer as they were found."""


class Driver:
    """The engine of a phase, and the eager one in its place where it is unsuited, which is told once."""

    def __init__(self, name: str, work: Work, tell: Callable[[str], None]) -> None:
        """`tell` takes a sentence for the person who runs this."""
        self._work, self._name, self._tell = work, name, tell
        try:
            self._engine = ENGINES.get(name)(work)
        except Unsuited as why:
            self._engine = self._eager(why)
        for note in self._engine.notes:
            tell(note)

    def do(self, action: Callable[[Engine], R]) -> R:
        """What `action` gives for the engine; done again with the eager one where the engine is found unsuited."""
        try:
            return action(self._engine)
        except Unsuited as why:
            self._engine.close()
            self._engine = self._eager(why)
            return action(self._engine)

    def close(self) -> None:
        """See `Engine`."""
        self._engine.close()

    def _eager(self, why: Unsuited) -> Engine:
        self._tell(f'engine = "{self._name}" is not used: {why}. Training goes on with engine = "eager".')
        return Engine(self._work)


def honest(loss: Tensor) -> Tensor:
    """`loss`, whose gradient is NaN when the loss is not finite: then one look at the gradient tells all
    processes."""
    return loss * torch.where(loss.detach().isfinite(), 1.0, float("nan"))
