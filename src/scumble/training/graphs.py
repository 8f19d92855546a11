"""Graphs: a step recorded once as CUDA graphs and repeated, so that the GPU does not wait for Python.

A graph repeats the very same kernels on the very same memory. So inputs are copied into tensors that stay, one set for
each shape of batch; gradients stay where they are and are zeroed, not freed; learning rates are tensors on the device.
Forward and backward of a shape are one recording, the clipping of gradients a second and the optimizer a third.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer

from scumble.training.engine import Engine, Unsuited, Work, honest
from scumble.training.optimizers import skipping, skips_on_device
from scumble.training.proofs import check_reaches
from scumble.training.tensors import mapped, tensors_in

if TYPE_CHECKING:
    from scumble.data.record import Batch

WARM = 3
"""So often a piece of work is done as it is before it is recorded: kernels are chosen and memory is taken then."""


class Recorder(Protocol):
    """Records what is given to the device."""

    def warm(self, work: Callable[[], None]) -> None:
        """Do `work` as it will be recorded."""

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """Record `work` without doing it; what is returned does it."""


class CudaRecorder:
    """Records CUDA graphs on a stream of its own; all share one pool of memory, because they run one after another."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pool: Any = None

    def warm(self, work: Callable[[], None]) -> None:
        """See `Recorder`."""
        outside = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(outside)
        with torch.cuda.stream(self._stream):
            work()
        outside.wait_stream(self._stream)

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """See `Recorder`."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
            work()
        self._pool = self._pool or graph.pool()
        return graph.replay


class Recorded:
    """A piece of work that is done as it is at first, then recorded, and repeated from then on."""

    def __init__(self, work: Callable[[], None], recorder: Recorder) -> None:
        self._work, self._recorder, self._done = work, recorder, 0
        self._repeat: Callable[[], None] | None = None

    def run(self) -> None:
        """Do the work.

        Raises:
            Unsuited: it can't be recorded.
        """
        if self._repeat is None and self._done < WARM:
            self._done += 1
            return self._recorder.warm(self._work)
        if self._repeat is None:
            try:
                self._repeat = self._recorder.record(self._work)
            except RuntimeError as error:
                raise Unsuited(f"the step can't be recorded ({str(error).splitlines()[0]})") from error
        self._repeat()


class Bucket:
    """Batches of one shape: where their tensors are copied to, and what is then done with them."""

    def __init__(self, drawn: Any, losses_of: Callable[[Any], Tensor], recorder: Recorder) -> None:
        """`losses_of` adds to the gradients, and gives the losses."""
        self._inputs = mapped(drawn, lambda tensor: tensor.detach().clone())
        self._losses = torch.empty(0)

        def work() -> None:
            self._losses = losses_of(self._inputs)

        self._recorded = Recorded(work, recorder)

    def run(self, drawn: Any) -> Tensor:
        """The losses of `drawn`, a copy."""
        for mine, given in zip(tensors_in(self._inputs), tensors_in(drawn), strict=True):
            mine.copy_(given, non_blocking=True)
        self._recorded.run()
        return self._losses.clone()


class GraphEngine(Engine):
    """Forward, backward, clipping and optimizer, recorded per shape of batch. A strength is recorded with them: it
    stays what it was in the first steps. Learning rates are rounded to fp32, because the device reads them."""

    name: ClassVar[str] = "graph"

    def __init__(self, work: Work, recorder: Recorder | None = None) -> None:
        """`recorder`: None records CUDA graphs."""
        super().__init__(work)
        self._device = next(iter(work.parameters)).device
        why = hindrance(work, self._device if recorder is None else None)
        if why:
            raise Unsuited(why)
        self._recorder = recorder or CudaRecorder(self._device)
        self._buckets: dict[object, Bucket] = {}
        self._optimizer: Optimizer = work.stepper.optimizer
        self._rates = [group["lr"] for group in self._optimizer.param_groups]
        self._norm, self._skip = torch.zeros(()), torch.zeros((), device=self._device)
        self._clip = Recorded(self._clip_now, self._recorder)
        self._step: Recorded | None = None
        if skips_on_device(self._optimizer):
            for group in self._optimizer.param_groups:
                group["lr"] = torch.tensor(float(group["lr"]), device=self._device)
            self._step = Recorded(self._step_now, self._recorder)
        else:
            name = type(self._optimizer).__name__
            self.notes = (f"Forward and backward are recorded, {name} is not: it reads numbers on the host.",)

    def zero(self) -> None:
        """See `Engine`. The gradients stay where they are."""
        gradients = [parameter.grad for parameter in self.work.parameters if parameter.grad is not None]
        if gradients:
            torch._foreach_zero_(gradients)

    def backward(self, batch: Batch, samples: int, *, last: bool) -> Tensor:
        """See `Engine`."""
        objective: Any = self.work.objective
        if batch.conditioning is None:
            raise Unsuited("captions are read anew in each step, where the host cuts them into tokens")
        drawn = objective.drawn(batch)
        key = (samples, *((tensor.shape, tensor.dtype) for tensor in tensors_in(drawn)))
        if key not in self._buckets:
            self._buckets[key] = Bucket(
                drawn, lambda inputs: self._backward_now(inputs, samples), self._recorder
            )
        return self._buckets[key].run(drawn)

    def clip(self) -> Tensor:
        """See `Engine`."""
        self._clip.run()
        return self._norm.clone()

    def step(self, rates: Mapping[str, float], skip: Tensor) -> None:
        """See `Engine`."""
        if self._step is None:
            return super().step(rates, skip)
        for group in self._optimizer.param_groups:
            group["lr"].fill_(rates[group["name"]])
        self._skip.copy_(skip)
        self._step.run()

    def close(self) -> None:
        """See `Engine`."""
        self._buckets.clear()
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate

    # what is recorded

    def _backward_now(self, drawn: Any, samples: int) -> Tensor:
        objective: Any = self.work.objective
        with self.work.accelerator.autocast():
            losses = check_reaches(objective.measured(drawn))
        honest(losses.sum() / samples).backward()
        return losses.detach()

    def _clip_now(self) -> None:
        self._norm = super().clip()

    def _step_now(self) -> None:
        groups = self._optimizer.param_groups
        before = [group["capturable"] for group in groups]
        # torch asks for it while it records, and warns of it at any other time
        recording = self._device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        try:
            for group in groups:
                group["capturable"] = recording
            with skipping(self._optimizer, self._skip):
                self._optimizer.step()
        finally:
            for group, value in zip(groups, before, strict=True):
                group["capturable"] = value


def hindrance(work: Work, device: torch.device | None) -> str | None:
    """Why a step of `work` can't be recorded, as the end of a sentence; None where nothing is known to be in its way.

    `device`: where CUDA graphs are to be recorded; None asks only about the work.
    """
    if device is not None and device.type != "cuda":
        return f"CUDA graphs need a GPU, and this run computes on {device.type}"
    if work.accelerator.num_processes > 1:
        return "gradients are averaged over several processes"
    if work.accelerator.scaler is not None:
        return "in fp16 the host looks at every step's gradients; bf16 needs no such look"
    if not hasattr(work.objective, "measured"):
        return f"{type(work.objective).__name__} decides on the host what is computed"
    return None
