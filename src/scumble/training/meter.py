"""Meter: what a step left on the device, turned into events, so that the host waits for the device only now
and then."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from scumble.errors import Diverged
from scumble.training.events import Event, StepDone, StepSkipped

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True)
class Measured:
    """One optimizer step on this process, still on the device."""

    step: int
    phase: str
    rates: Mapping[str, float]
    losses: Sequence[Tensor]
    """(B,) of each accumulated batch."""
    keys: Sequence[str]
    """The pictures, in the order of `losses`."""
    norm: Tensor
    """0-dim, of the averaged gradient: the same on every process."""


class Meter:
    """Collects steps; `flush` reads them all at once, tells them, and counts the skipped ones.

    A step counts as skipped when its gradient is not finite (a non-finite loss makes its gradient so, see the
    loop). All processes see the same gradient, so all agree.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        tell: Callable[[Event], None],
        limit: int,
        last_good: Callable[[], str],
    ) -> None:
        """`limit`: skipped steps in a row that end the run. `last_good` names the last good file, for that
        message."""
        self._accelerator, self._tell, self._limit, self._last_good = accelerator, tell, limit, last_good
        self._waiting: list[Measured] = []
        self._since = time.perf_counter()
        self.in_a_row = 0
        self.moved = False
        """Whether a step at a rate above 0 was taken."""
        self.last_loss = math.nan

    def add(self, measured: Measured) -> None:
        self._waiting.append(measured)

    @torch.no_grad()
    def flush(self) -> None:
        """Wait for the device and tell what happened.

        Raises:
            Diverged: `limit` steps in a row were skipped.
        """
        if not self._waiting:
            return
        waiting, self._waiting = self._waiting, []
        means = torch.stack([torch.cat(list(m.losses)).float().mean() for m in waiting])
        if self._accelerator.num_processes > 1:
            means = self._accelerator.reduce(means, reduction="mean")
        norms = torch.stack([m.norm.float() for m in waiting])
        values = torch.stack([means, norms.to(means.device)]).tolist()
        now = time.perf_counter()
        seconds, self._since = (now - self._since) / len(waiting), now
        for measured, loss, norm in zip(waiting, *values, strict=True):
            if math.isfinite(norm):
                self.in_a_row, self.last_loss = 0, loss
                self.moved = self.moved or any(rate > 0 for rate in measured.rates.values())
                samples = len(measured.keys) * self._accelerator.num_processes
                self._tell(
                    StepDone(measured.step, measured.phase, loss, measured.rates, norm, seconds, samples)
                )
            else:
                self._skipped(measured, loss, norm)

    def _skipped(self, measured: Measured, loss: float, norm: float) -> None:
        scaler = self._accelerator.scaler
        scale = scaler.get_scale() if scaler is not None else 0.0
        searching = (
            math.isfinite(loss) and scale > 1
        )  # fp16 looks for its loss scale: not a sign of divergence
        if not searching:
            self.in_a_row += 1
        if searching:
            reason = f"the fp16 gradient overflowed; the loss scale is now {scale:g}"
        elif not math.isfinite(loss):
            reason = f"the loss is {loss}"
        else:
            reason = f"the loss is finite ({loss:.4g}), its gradient's norm is {norm}"
        pictures = tuple(self._pictures(measured))
        self._tell(StepSkipped(measured.step, reason, pictures, self.in_a_row))
        if self.in_a_row >= self._limit:
            raise Diverged(
                f"{self.in_a_row} steps in a row had a non-finite loss or gradient; training stopped at step "
                f"{measured.step}. The weights did not move in these steps. In the last one: {reason}; "
                f"pictures: {', '.join(pictures[:8])}. {self._last_good()} Lower the learning rate, or use "
                "precision bf16 or no; if it is always the same pictures, look at them."
            )

    def _pictures(self, measured: Measured) -> list[str]:
        """The pictures whose own loss is not finite, of all processes; all of the step when every loss is
        finite."""
        finite = torch.isfinite(torch.cat(list(measured.losses))).tolist()
        mine = [key for key, good in zip(measured.keys, finite, strict=True) if not good]
        both = [(mine, list(measured.keys))]
        if self._accelerator.num_processes > 1:
            from accelerate.utils import gather_object

            both = gather_object(both)
        poisoned = [key for bad, _ in both for key in bad]
        return poisoned or [key for _, every in both for key in every]
