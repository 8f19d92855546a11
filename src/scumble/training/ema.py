"""EMA: a running mean of the weights, smoother than the last step's."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class EMA:
    """An exponential moving average of parameters (Polyak & Juditsky, 1992).

    After n steps, mean <- d mean + (1 - d) parameter with d = min(decay, (1 + n) / (10 + n)), so that the
    start is soon forgotten. `swapped()` puts the mean in the parameters' place and gives them back bit for
    bit.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        self.parameters = parameters
        self.decay = decay
        self.means = {name: parameter.detach().clone() for name, parameter in parameters.items()}

    @torch.no_grad()
    def update(self, step: int, skip: Tensor | None = None, names: Iterable[str] | None = None) -> None:
        """Take in the parameters, or those called `names`, after the `step`-th step; nothing where `skip` (0-dim, 0 or
        1) is 1."""
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        moved = list(self.means if names is None else names)
        means, live = [self.means[name] for name in moved], [self.parameters[name].detach() for name in moved]
        difference = torch._foreach_sub(live, means)
        torch._foreach_mul_(difference, weight if skip is None else weight * (1 - skip))
        torch._foreach_add_(means, difference)

    @torch.no_grad()
    def settle(self, names: Iterable[str]) -> None:
        """Give parameters that come to rest their means: what trains on around them meets what is saved."""
        for name in names:
            self.parameters[name].copy_(self.means[name])

    @contextmanager
    @torch.no_grad()
    def swapped(self) -> Iterator[None]:
        """Inside, the parameters hold the mean."""
        kept = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        try:
            for name, parameter in self.parameters.items():
                parameter.copy_(self.means[name])
            yield
        finally:
            for name, parameter in self.parameters.items():
                parameter.copy_(kept[name])

    @torch.no_grad()
    def load(self, means: Mapping[str, Tensor]) -> None:
        """Take over saved means, one for each parameter."""
        for name, mean in self.means.items():
            mean.copy_(means[name])
