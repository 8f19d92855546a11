"""Resting: components of a base whose weights leave the memory while nobody computes with them.

In training the VAE and the text encoders work before the first step, whose cached outputs they are, and again for a
preview and at the end. In between their weights are in host memory, if the base is on a GPU; if it is on the CPU, in
the files that they came from. Meanwhile each parameter is one zero that looks like a tensor of its shape, dtype and
device; whoever calls the component finds the weights.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from scumble.adapters.adapted import Adapted
from scumble.adapters.tokens import TokenTable
from scumble.errors import ModelError


class Rest:
    """One component that may rest.

    Law: awake, it has the bits that it had before; nothing rests that trains, or that an adapter or a word is in.
    """

    def __init__(self, name: str, module: nn.Module, again: Callable[[], nn.Module] | None) -> None:
        """`again` loads the module anew; None keeps the weights of one that is not on the CPU in host memory."""
        self.name, self.module = name, module
        self._again = again
        self._away: dict[str, Tensor | None] = {}
        """Name -> the parameter's values on the host; None where they are loaded again."""
        self._watching = False

    @property
    def resting(self) -> bool:
        """Whether the weights are away."""
        return bool(self._away)

    @torch.no_grad()
    def rest(self) -> bool:
        """Let the weights go, if that can be; whether they are away now."""
        if self.resting:
            return True
        parameters = dict(self.module.named_parameters())
        on_cpu = all(parameter.device.type == "cpu" for parameter in parameters.values())
        if not parameters or (on_cpu and self._again is None) or in_use(self.module):
            return False
        self._watch()
        for name, parameter in parameters.items():
            self._away[name] = None if on_cpu else parameter.data.to("cpu")
            parameter.data = parameter.data.new_zeros(()).expand(parameter.shape)
        return True

    @torch.no_grad()
    def wake(self) -> None:
        """The weights are there again.

        Raises:
            ModelError: the files that they came from are gone, or are others now.
        """
        away, self._away = self._away, {}
        if not away:
            return
        try:
            kept = dict(self._loaded()) if None in away.values() else {}
            for name, parameter in self.module.named_parameters():
                values = away[name] if away[name] is not None else kept.get(name)
                if values is None or values.shape != parameter.shape:
                    raise ModelError(
                        f"{self.name} can't be loaded again: its files have changed since ({name} has another shape or "
                        "is gone). Put the base's files back, and go on from the last checkpoint."
                    )
                parameter.data = values.to(parameter.device, parameter.dtype)
        except BaseException:
            self._away = away
            raise

    def forget(self) -> None:
        """The weights are gone for good: nothing is computed with them any more."""
        self._away = {}

    def _loaded(self) -> dict[str, Tensor]:
        assert self._again is not None
        return {name: parameter.data for name, parameter in self._again().named_parameters()}

    def _watch(self) -> None:
        """Whoever calls the module or one of its parts (a VAE's are called by themselves) finds it awake."""
        if self._watching:
            return
        for part in (self.module, *self.module.children()):
            part.register_forward_pre_hook(lambda *_: self.wake())
        self._watching = True


def in_use(module: nn.Module) -> bool:
    """Whether something in it trains, or an adapter or a word was put into it."""
    return any(isinstance(part, Adapted | TokenTable) for part in module.modules()) or any(
        parameter.requires_grad for parameter in module.parameters()
    )
