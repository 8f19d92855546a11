"""Effect: what an adapter does to a base in numbers, on fixed inputs, so that "loaded" means "acts"."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from scumble.adapters import Adapter
from scumble.adapters.names import one_word
from scumble.adapters.state import AdapterState
from scumble.models.family import BaseModel, Frame
from scumble.rng import Streams

PROMPTS = ("a photo of a dog", "a painting", "")
NOISE = (0.2, 0.5, 0.8)
"""Where in the noise schedule the denoiser is asked, from 0 (clean) to 1 (noise)."""


@dataclass(frozen=True)
class Effect:
    """How far outputs move, as rms of the difference over rms of the base's own output. 0 is no effect at all."""

    denoiser: float
    """Of the prediction, text encoder included."""
    text: float
    """Of the text's embedding; 0 when the adapter has no text encoder layers and brings no word."""


@torch.no_grad()
def measure_effect(base: BaseModel, state: AdapterState) -> Effect:
    """Compare the base's outputs with and without the adapter; the base is left as it was.

    Three prompts at three noise levels, and one more for each word that it brings; the same noise at every call, in
    the base's dtype.

    Raises:
        AdapterError: the adapter does not fit the base.
    """
    base.claim(state.roots)
    prompts = [*PROMPTS, *(f"a photo of {one_word(name)}" for name in state.tokens)]
    with base.sparing():
        text, prediction = _outputs(base, prompts)
    adapter = Adapter.load(base.roots, state, name="measured", vocabularies=base.vocabularies)
    try:
        with base.sparing():
            text_with, prediction_with = _outputs(base, prompts)
    finally:
        adapter.eject()
    return Effect(_moved(prediction_with, prediction), _moved(text_with, text))


def _outputs(base: BaseModel, prompts: list[str]) -> tuple[Tensor, Tensor]:
    conditioning = base.encode_prompts(prompts)
    least = max(1, base.size_multiple // base.latent_factor)
    side = max(least, min(32, base.resolution // base.latent_factor) // least * least)
    count = len(prompts)
    latents = Streams(0).normal("effect", range(count), (base.latent_channels, side, side))
    latents = latents.to(base.device, base.dtype)
    levels = [NOISE[row % len(NOISE)] for row in range(count)]
    t = base.prediction.from_uniform(torch.tensor(levels)).to(base.device)
    pixels = side * base.latent_factor
    prediction = base.denoise(latents, t, conditioning, Frame.plain(count, pixels, pixels))
    return conditioning.tokens.float(), prediction.float()


def _moved(now: Tensor, before: Tensor) -> float:
    return float((now - before).norm() / before.norm())
