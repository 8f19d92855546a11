"""Latents: pictures to latents and back, through a VAE, scaled to about unit variance.

Legend: s the VAE's scaling factor, m its shift; latents = (z - m) s.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from scumble.errors import ModelError


class LatentSpace:
    """A frozen VAE and the affine map that brings its latents to about unit variance.

    Law: `decode(encode(pixels, None))` is what the diffusers pipeline's VAE gives for the same picture.
    """

    def __init__(self, vae: nn.Module) -> None:
        """`vae`: diffusers' AutoencoderKL, with `scaling_factor` and perhaps `shift_factor` in its config."""
        self.vae: Any = vae
        config: Any = vae.config
        self.scale = float(config.scaling_factor)
        self.shift = float(config.get("shift_factor") or 0.0)
        self.channels = int(config.latent_channels)
        self.factor = factor_of(config)
        """Pixels per latent along one side."""
        self.widened = False
        """True once a result in the VAE's own dtype overflowed, so that fp32 is used from then on."""

    @torch.no_grad()
    def encode(self, pixels: Tensor, rng: torch.Generator | None) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> (B, C, H / factor, W / factor), fp32.

        `rng` draws from the posterior; None takes its mean.

        Raises:
            ModelError: a latent is not finite even when computed in fp32 (names the rows).
        """
        state = rng.get_state() if rng is not None else None

        def run(dtype: torch.dtype) -> Tensor:
            if rng is not None and state is not None:
                rng.set_state(state)  # a second run in fp32 draws what the first one drew
            posterior = self.vae.encode(pixels.to(self.vae.device, dtype)).latent_dist
            return posterior.mode() if rng is None else posterior.sample(generator=rng)

        return (self._finite(run, "encode") - self.shift) * self.scale

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, 3, h * factor, w * factor), fp32, clamped to [-1, 1].

        Raises:
            ModelError: a pixel is not finite even when computed in fp32 (names the rows).
        """
        z = latents.float() / self.scale + self.shift
        return self._finite(
            lambda dtype: self.vae.decode(z.to(self.vae.device, dtype)).sample, "decode"
        ).clamp(-1, 1)

    def _finite(self, run: Any, verb: str) -> Tensor:
        """`run(dtype)` in the VAE's dtype as fp32; once more with the VAE in fp32 where that overflowed."""
        own: torch.dtype = self.vae.dtype
        # the VAE's dtype is chosen for its range: autocast must not narrow it
        with torch.autocast(self.vae.device.type, enabled=False):
            if not self.widened:
                result: Tensor = run(own).float()
                if result.isfinite().all():
                    return result
                self.widened = own != torch.float32
            if self.widened:
                # widened for the call only: a pipeline over the same module expects one dtype throughout, and
                # own -> fp32 -> own is exact
                nn.Module.to(self.vae, torch.float32)
                try:
                    result = run(torch.float32).float()
                finally:
                    nn.Module.to(self.vae, own)
        bad = (~result.isfinite().flatten(1).all(1)).nonzero().flatten().tolist()
        if bad:
            raise ModelError(
                f"The VAE can't {verb} rows {bad} of this batch: the result is not finite, even in fp32. "
                "Look at those pictures, and check the VAE's file."
            )
        return result


def factor_of(vae: Mapping[str, Any]) -> int:
    """Pixels per latent along one side, from the VAE's config."""
    return int(2 ** (len(vae["block_out_channels"]) - 1))
