"""LatentBase: what every base shares whose denoiser works on the latents of a VAE."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from scumble.adapters.layers import base_state
from scumble.errors import ModelError
from scumble.models.family import BaseModel, Components, fingerprint
from scumble.models.latents import LatentSpace
from scumble.models.precision import check_precision
from scumble.models.prediction import prediction_from


class LatentBase(BaseModel):
    """A base with a `vae` and its `latents`; the denoiser and what it is told are the family's own."""

    scheduler: Any
    vae: Any
    latents: LatentSpace
    _fingerprint: str

    def _open(self, parts: Components, *, family: str, dtype: torch.dtype, device: torch.device) -> None:
        """Take from `parts` what every such base has. The VAE has `dtype` too, but fp16 on a CPU is fp32 there."""
        self.family, self.name, self.notes = family, parts.name, parts.notes
        self.device, self.dtype = torch.device(device), dtype
        self.scheduler, self.vae = parts.scheduler, parts.modules["vae"]
        self._settle(
            self.vae, torch.float32 if dtype == torch.float16 and self.device.type == "cpu" else dtype
        )
        self.prediction = prediction_from(self.scheduler.config)
        self.latents = LatentSpace(self.vae)
        self.latent_factor, self.latent_channels = self.latents.factor, self.latents.channels
        self._fingerprint = parts.fingerprint

    def _settle(self, module: nn.Module, dtype: torch.dtype) -> None:
        """Move `module` to the device and freeze it in place."""
        its: Any = module
        if (its.device, its.dtype) != (self.device, dtype):
            nn.Module.to(
                module, self.device, dtype
            )  # diffusers' own `to` warns of fp32 modules that are not there
        module.requires_grad_(False).eval()

    def _settle_t5(self, module: nn.Module) -> None:
        """The same with T5, whose layers `wo` overflow in fp16 and stay fp32 then."""
        self._settle(module, self.dtype)
        if self.dtype == torch.float16:
            for name, layer in module.named_modules():
                if name.endswith(".wo"):
                    nn.Module.to(layer, torch.float32)

    def _refuse_strangers(
        self, words: str, tokenizer: Any, encoder: Any, reader: str = "text encoder"
    ) -> None:
        """Raises ModelError where `tokenizer` knows more tokens than `encoder`."""
        known, rows = len(tokenizer), encoder.config.vocab_size
        if known > rows:
            raise ModelError(
                f"The {words} of {self.name} has {known} tokens and its {reader} {rows}: they don't belong together. "
                "Take both from one base."
            )

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

    def _graph_of(self, *encoders: nn.Module) -> torch.set_grad_enabled:
        """Records the graph where a parameter of these requires a gradient, and only there."""
        trains = any(parameter.requires_grad for one in encoders for parameter in one.parameters())
        return torch.set_grad_enabled(trains and torch.is_grad_enabled())

    def _check_compute(self) -> None:
        # not even under autocast: its norms want fp32
        if self.dtype == torch.float16 and self.device.type == "cpu":
            check_precision(self.dtype, self.device)

    def fingerprint(self) -> str:
        """See BaseModel. Computed once; of a base built by hand in bf16 it is that of the rounded weights."""
        if not self._fingerprint:
            self._fingerprint = fingerprint(base_state(self.denoiser))
        return self._fingerprint
