"""LatentBase: what every base shares whose denoiser works on the latents of a VAE."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from scumble.adapters.layers import base_state
from scumble.models.family import BaseModel, fingerprint
from scumble.models.latents import LatentSpace
from scumble.models.precision import check_precision


class LatentBase(BaseModel):
    """A base with a `vae` and its `latents`; the denoiser and what it is told are the family's own."""

    vae: Any
    latents: LatentSpace
    _fingerprint: str

    def encode_images(self, pixels: Tensor, rng: torch.Generator | None) -> Tensor:
        """See BaseModel. Computed in the VAE's dtype, again in fp32 where that overflowed; the result is fp32."""
        latents = self.latents.encode(pixels, rng)
        self._say_if_widened()
        return latents

    def decode_latents(self, latents: Tensor) -> Tensor:
        pixels = self.latents.decode(latents)
        self._say_if_widened()
        return pixels

    def _say_if_widened(self) -> None:
        note = f"The VAE overflowed in {self.vae.dtype}: it computes in fp32 from there on."
        if self.latents.widened and note not in self.notes:
            self.notes = (*self.notes, note)

    def _check_compute(self) -> None:
        # not even under autocast: its norms want fp32
        if self.dtype == torch.float16 and self.device.type == "cpu":
            check_precision(self.dtype, self.device)

    def fingerprint(self) -> str:
        """See BaseModel. Computed once; of a base built by hand in bf16 it is that of the rounded weights."""
        if not self._fingerprint:
            self._fingerprint = fingerprint(base_state(self.denoiser))
        return self._fingerprint
