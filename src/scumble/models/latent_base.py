"""LatentBase: what every base shares whose denoiser works on the latents of a VAE."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from scumble.adapters.layers import base_state
from scumble.errors import ModelError
from scumble.models.dtypes import accept_any, agree, computing
from scumble.models.family import BaseModel, Components, fingerprint
from scumble.models.latents import LatentSpace
from scumble.models.precision import check_precision
from scumble.models.prediction import prediction_from
from scumble.models.resting import Rest


class LatentBase(BaseModel):
    """A base with a `vae` and its `latents`; the denoiser and what it is told are the family's own."""

    scheduler: Any
    vae: Any
    latents: LatentSpace
    _fingerprint: str
    _again: Mapping[str, Callable[[], nn.Module]]
    _rests: dict[str, Rest]

    def _open(
        self, parts: Components, *, denoiser: str, family: str, dtype: torch.dtype, device: torch.device
    ) -> None:
        """Take from `parts` what every such base has. Each component has the dtype that was asked for it alone, or
        `dtype`; a VAE for which none was asked is fp32 where that would be fp16 on a CPU."""
        self.family, self.name, self.notes = family, parts.name, parts.notes
        self.device, self.dtype = torch.device(device), parts.dtype_of(denoiser, dtype)
        self.scheduler, self.vae = parts.scheduler, parts.modules["vae"]
        common = torch.float32 if dtype == torch.float16 and self.device.type == "cpu" else dtype
        self._settle(self.vae, parts.dtype_of("vae", common))
        if parts.dtypes:
            names = (*parts.modules, *parts.deferred)
            self.dtypes = {name: parts.dtype_of(name, dtype) for name in names} | {"vae": self.vae.dtype}
            accept_any(self.vae)
        self.prediction = prediction_from(self.scheduler.config)
        self.latents = LatentSpace(self.vae)
        self.latent_factor, self.latent_channels = self.latents.factor, self.latents.channels
        self._fingerprint = parts.fingerprint
        self._again, self._rests = parts.again, {}

    def _settle(self, module: nn.Module, dtype: torch.dtype) -> None:
        """Move `module` to the device and freeze it in place."""
        its: Any = module
        if (its.device, its.dtype) != (self.device, dtype):
            nn.Module.to(
                module, self.device, dtype
            )  # diffusers' own `to` warns of fp32 modules that are not there
        module.requires_grad_(False).eval()

    def _settle_t5(self, module: nn.Module, dtype: torch.dtype) -> None:
        """The same with T5, whose layers `wo` overflow in fp16 and stay fp32 then."""
        self._settle(module, dtype)
        if dtype == torch.float16:
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

    def rest(self, *, pictures: bool, text: bool) -> tuple[str, ...]:
        """See BaseModel: the VAE, and the text encoders but for those that are loaded late anyway."""
        encoders = {name: one for name, one in list(self.roots.items())[1:] if name not in self.late}
        for name, module in (
            *({"vae": self.vae} if pictures else {}).items(),
            *(encoders if text else {}).items(),
        ):
            self._rests.setdefault(name, Rest(name, module, self._again.get(name)))
        return tuple(name for name, one in self._rests.items() if one.rest())

    def release(self) -> None:
        """See BaseModel: lets go of what `rest` was told of."""
        for one in self._rests.values():
            one.rest()

    def discard(self) -> None:
        """See BaseModel."""
        for one in self._rests.values():
            one.forget()
        self._rests = {}
        super().discard()

    def modules(self) -> Mapping[str, nn.Module]:
        """See BaseModel; their weights are there."""
        self._wake()
        return super().modules()

    def _wake(self, *names: str) -> None:
        """The weights of these components are there again; of all, where none is named."""
        for name, one in self._rests.items():
            if not names or name in names:
                one.wake()

    def encode_images(self, pixels: Tensor, rng: torch.Generator | None) -> Tensor:
        """See BaseModel. Computed in the VAE's dtype, again in fp32 where that overflowed; the result is fp32."""
        self._check_own("vae")
        self._wake("vae")
        latents = self.latents.encode(pixels, rng)
        self._say_if_widened()
        return latents

    def decode_latents(self, latents: Tensor) -> Tensor:
        self._check_own("vae")
        self._wake("vae")
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

    def _check_compute(self, *components: str) -> None:
        # not even under autocast: its norms want fp32
        for dtype in map(self.dtype_of, components):
            if dtype == torch.float16 and self.device.type == "cpu":
                check_precision(dtype, self.device)

    def _check_own(self, component: str) -> None:
        if self.dtypes:
            self._check_compute(component)

    def _computing(self, component: str) -> AbstractContextManager[Any]:
        """Within it a component computes in its own dtype, if one was asked for some component alone."""
        return computing(self.dtypes.get(component), self.device)

    def _agreed(self, pipeline: Any) -> Any:
        """`pipeline`, whose denoiser is handed what it takes where components differ in their dtypes."""
        if self.dtypes:
            agree(pipeline, self.dtype, self.latents)
        return pipeline

    def fingerprint(self) -> str:
        """See BaseModel. Computed once; of a base built by hand in bf16 it is that of the rounded weights."""
        if not self._fingerprint:
            self._fingerprint = fingerprint(base_state(self.denoiser))
        return self._fingerprint
