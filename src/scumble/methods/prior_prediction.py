"""The prior by prediction: beside the denoising loss, how far the adapter moves the base's answers to class captions.

Source: Ruiz et al. 2023, "DreamBooth", equation 2, with the bare base's answer in the place of class pictures.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from scumble.methods.text_encoder import text_roots
from scumble.models.family import Conditioning
from scumble.rng import Streams
from scumble.training.objective import (
    DenoisingObjective,
    Drawn,
    ObjectiveSettings,
    compared,
    with_guidance,
)
from scumble.training.tensors import sent

if TYPE_CHECKING:
    from scumble.adapters.adapter import Adapter
    from scumble.data.record import Batch
    from scumble.models.family import BaseModel

KEPT = 256
"""Class captions whose readings are kept: 60 MB for Stable Diffusion 1."""


@torch.no_grad()
def readings(base: BaseModel, prompts: Sequence[str]) -> dict[str, Conditioning]:
    """As many of `prompts` as are kept, as the bare base reads them: one row each."""
    return {prompt: base.encode_prompts([prompt]) for prompt in prompts[:KEPT]}


@dataclass(frozen=True)
class Asked(Drawn):
    """A batch with its random numbers, and what the bare base reads in each row's class caption."""

    kept: Conditioning


class PriorPrediction(DenoisingObjective):
    """The denoising loss, and beside it how far the adapter moves what the base answers to the class captions.

    A row's loss is instance + weight * prior, so that the mean over rows is mean(instance) + weight * mean(prior). The
    prior compares two answers at the row's own noisy latents x_t: the adapter's, and as its target the bare base's.
    It is measured as the instance's loss is (huber, min-SNR), over the whole picture: masks and the weights of samples
    are about the subject.
    """

    def __init__(
        self,
        base: BaseModel,
        adapter: Adapter,
        streams: Streams,
        settings: ObjectiveSettings | None = None,
        *,
        prompt: Callable[[str], str],
        kept: Mapping[str, Conditioning],
        weight: float,
        among: Collection[str] | None = None,
    ) -> None:
        """`prompt`: a row's caption -> its class caption. `kept`: some class captions as the bare base reads them, one
        row each; others are read when they come. `weight`: lambda."""
        super().__init__(base, streams, settings, among=among)
        self.adapter, self.prompt, self.kept, self.weight = adapter, prompt, dict(kept), weight
        touched = {path.partition(".")[0] for path in adapter.deltas}
        self.texts = touched & set(text_roots(base))
        """Text encoders that the adapter changes: class captions are read anew at each step."""

    def drawn(self, batch: Batch) -> Asked:
        """See `DenoisingObjective`. Class captions are read here, one by one, so that it makes no difference which of
        them are kept."""
        drawn = super().drawn(batch)
        kept = Conditioning.cat([self._read(self.prompt(caption)) for caption in batch.captions])
        return Asked(drawn.batch, drawn.noise, drawn.t, sent(kept, drawn.t.device))

    def measured(self, drawn: Drawn) -> Tensor:
        """See `DenoisingObjective`. `drawn`: an `Asked`."""
        assert isinstance(drawn, Asked)
        return super().measured(drawn) + self.weight * self._prior(drawn)

    def _prior(self, drawn: Asked) -> Tensor:
        """(B,) losses between the adapter's answers to the class captions and the base's."""
        base, batch, noise, t = self.base, drawn.batch, drawn.noise, drawn.t
        x0 = batch.latents.to(noise.device, non_blocking=True)
        noisy = base.prediction.noisy(x0, noise, t).to(base.dtype)

        def answer(said: Conditioning) -> Tensor:
            rows = replace(said, shown=batch.shown).to(noise.device, base.dtype)
            return base.denoise(noisy, t, with_guidance(rows, self.settings), batch.frame)

        mine = answer(self._as_adapted(batch) if self.texts else drawn.kept)
        with torch.no_grad(), self.adapter.disabled():
            theirs = answer(drawn.kept)
        return compared(mine, theirs, None, base.prediction, t, self.settings)

    def _as_adapted(self, batch: Batch) -> Conditioning:
        """The class captions as the adapter reads them, each once."""
        prompts = [self.prompt(caption) for caption in batch.captions]
        distinct = list(dict.fromkeys(prompts))
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.texts.isdisjoint(self.roots)):
            said = self.base.encode_prompts(distinct)
        return said[torch.tensor([distinct.index(prompt) for prompt in prompts], device=said.tokens.device)]

    def _read(self, prompt: str) -> Conditioning:
        """A class caption as the bare base reads it, one row."""
        if prompt not in self.kept:
            with torch.no_grad(), self.adapter.disabled():
                found = self.base.encode_prompts([prompt])
            while len(self.kept) >= KEPT:
                del self.kept[next(iter(self.kept))]
            self.kept[prompt] = found
        return self.kept[prompt]
