"""The denoising loss: squared error to what the denoiser should answer, one number per sample.

Legend: B samples; x0 clean latents, n noise, t noise level, x_t = signal(t) x0 + noise(t) n; snr = (signal /
noise)^2; sigma = noise(t). Prior preservation is `batch.weight`, masked loss is `batch.mask`, min-SNR is a weighting:
they combine freely.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional

from scumble.errors import ConfigError
from scumble.models.prediction import shifted, wide
from scumble.rng import Streams
from scumble.settings import Settings
from scumble.training.tensors import sent
from scumble.training.timesteps import TimestepSettings, levels

if TYPE_CHECKING:
    from scumble.data.record import Batch
    from scumble.models.family import BaseModel, Conditioning
    from scumble.models.prediction import Prediction


LOWEST = 1e-3
"""sigma below which weights stay what they are there: the first of a schedule's thousand levels."""

WEIGHTINGS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "sigma-sqrt": lambda sigma: sigma.clamp(min=LOWEST) ** -2,
    "cosmap": lambda sigma: 2 / (math.pi * (1 - 2 * sigma + 2 * sigma**2)),
}
"""Weights on the error by sigma (B,), for flow matching: sigma^-2 (Karras et al., 2022), and that of the cosine
schedule (Esser et al., 2024, eq. 21). Names: those of diffusers' scripts."""


class ObjectiveSettings(Settings):
    """What is minimised."""

    loss: Literal["l2", "huber"] = "l2"
    """l2 (squared error), or huber (squared near 0, linear beyond `huber_delta`: outliers pull less)."""
    huber_delta: float = Field(default=0.1, gt=0)
    """Where huber turns from squared to linear, in units of the latents."""
    snr_gamma: float | None = Field(default=None, gt=0)
    """Min-SNR weighting (Hang et al., 2023): 5 is usual. None weighs all noise levels alike."""
    measured: Literal["prediction", "clean"] = "prediction"
    """Where the error is measured: prediction (in what the denoiser answers), or clean (in the clean latents that its
    answer implies, as diffusers' script for SD 3 does unless told otherwise)."""
    weighting: Literal["none", "sigma-sqrt", "cosmap"] = "none"
    """How errors count by noise level, for flow matching: none (all alike), sigma-sqrt (1 / sigma^2) or cosmap (as
    often as the cosine schedule has them)."""
    noise_offset: float = Field(default=0.0, ge=0)
    """Strength of a constant per channel added to the noise, so that very dark and very bright pictures are
    learned (Guttenberg, 2023); 0.05 to 0.1 are usual."""
    guidance: float | None = Field(default=None, ge=0)
    """The guidance that the denoiser is told while it trains, for bases that are told one (Flux.1 dev). Unset: the
    base's own, which is 1 there."""
    timesteps: TimestepSettings = TimestepSettings()
    """Which noise levels are trained on."""

    @model_validator(mode="after")
    def _no_setting_without_effect(self) -> ObjectiveSettings:
        if self.loss != "huber" and "huber_delta" in self.model_fields_set and self.huber_delta != 0.1:
            raise ValueError(f'huber_delta has no effect with loss = "{self.loss}"; set loss = "huber"')
        if self.weighting != "none" and self.snr_gamma is not None:
            raise ValueError(
                f'weighting = "{self.weighting}" and snr_gamma = {self.snr_gamma:g} both weigh noise levels: give one'
            )
        return self


@dataclass(frozen=True)
class Drawn:
    """A batch with its random numbers: all that its losses depend on beside the weights."""

    batch: Batch
    noise: Tensor
    """(B, C, h, w) fp32"""
    t: Tensor
    """(B,) in the prediction's units"""


class DenoisingObjective(nn.Module):
    """`forward(batch) -> losses (B,)`, fp32: exactly what training differentiates.

    All randomness is drawn on the CPU, each sample's from its own position, so that a sample's loss depends
    neither on the device nor on the batch or process that it is in. The roots that train are registered as
    submodules, so that data parallelism sees their parameters.
    """

    def __init__(
        self,
        base: BaseModel,
        streams: Streams,
        settings: ObjectiveSettings | None = None,
        *,
        among: Collection[str] | None = None,
    ) -> None:
        """`among`: the names of the roots that may train here; None is all. Another phase trains the rest.

        Raises:
            ConfigError: a setting is for flow matching, and the base predicts something else.
        """
        super().__init__()
        self.base = base
        self.streams = streams
        self.settings = settings or ObjectiveSettings()
        self._refuse_for_flow_only()
        self.roots = nn.ModuleDict(
            {
                name: root
                for name, root in base.roots.items()
                if (among is None or name in among)
                and any(parameter.requires_grad for parameter in root.parameters())
            }
        )

    def forward(self, batch: Batch) -> Tensor:
        """(B,) weighted losses. `batch` may be on any device."""
        return self.measured(self.drawn(batch))

    def drawn(self, batch: Batch) -> Drawn:
        """`batch` with its random numbers, on its way to the denoiser's device: the host's part of `forward`."""
        noise = self.noise(batch.positions, batch.latents.shape[1:])
        t = self.timesteps(batch.positions, batch.latents.shape)
        return sent(Drawn(batch, noise, t), next(self.base.denoiser.parameters()).device)

    def measured(self, drawn: Drawn) -> Tensor:
        """(B,) weighted losses of what was drawn: the device's part. A function of the tensors in `drawn` and of the
        weights, and where there is conditioning of nothing else."""
        return denoising_loss(self.base, drawn.batch, drawn.noise, drawn.t, self.settings)

    def train(self, mode: bool = True) -> DenoisingObjective:
        """Switch what trains (an adapter's dropout); the frozen base keeps its own mode."""
        self.training = mode
        for module in self.roots.modules():
            if any(parameter.requires_grad for parameter in module.parameters(recurse=False)):
                module.training = mode
        return self

    def noise(self, positions: tuple[int, ...], shape: torch.Size) -> Tensor:
        """(B, *shape) fp32 on the CPU: standard normal, plus the offset per channel."""
        noise = self.streams.normal("noise", positions, shape)
        if self.settings.noise_offset:
            noise += self.settings.noise_offset * self.streams.normal(
                "noise offset", positions, (shape[0], 1, 1)
            )
        return noise

    def timesteps(self, positions: tuple[int, ...], shape: Sequence[int]) -> Tensor:
        """(B,) noise levels in the prediction's units, on the CPU. `shape` (B, C, h, w): of the latents."""
        uniform = self.streams.uniform("timestep", positions)
        found, own = levels(self.settings.timesteps, uniform), self.base.prediction.shift
        return self.base.prediction.from_uniform(shifted(found, self._shift(shape) / own))

    def _shift(self, shape: Sequence[int]) -> float:
        base, wanted = self.base, self.settings.timesteps.shift
        if wanted is None:
            return base.prediction.shift
        if wanted != "resolution":
            return float(wanted)
        patch = base.size_multiple // base.latent_factor
        tokens = (shape[-2] // patch) * (shape[-1] // patch)
        return base.prediction.shift_at(tokens, (base.resolution // base.size_multiple) ** 2)

    def _refuse_for_flow_only(self) -> None:
        """What has no meaning for this base is found before training."""
        settings, prediction = self.settings, self.base.prediction
        if settings.timesteps.shift == "resolution":
            prediction.shift_at(1, 1)
        if settings.weighting != "none" and not prediction.straight:
            raise ConfigError(
                f'objective.weighting = "{settings.weighting}" is for flow matching; {self.base.name} predicts '
                f"{prediction.name}. Use snr_gamma, or leave it out."
            )
        if settings.guidance is not None and not self.base.guided:
            raise ConfigError(
                f"objective.guidance = {settings.guidance:g} is for bases whose denoiser is told a guidance, such as "
                f"Flux.1 dev; {self.base.name} is told none. Leave it out."
            )


def denoising_loss(
    base: BaseModel, batch: Batch, noise: Tensor, t: Tensor, settings: ObjectiveSettings
) -> Tensor:
    """(B,) fp32 losses of `batch` at noise (B, C, h, w) and levels t (B,), times `batch.weight`."""
    x0 = batch.latents.to(noise.device, non_blocking=True)
    conditioning = base.encode_prompts(batch.captions) if batch.conditioning is None else batch.conditioning
    conditioning = replace(conditioning, shown=batch.shown)
    answer = base.denoise(
        base.prediction.noisy(x0, noise, t).to(base.dtype),
        t,
        with_guidance(conditioning.to(noise.device, base.dtype), settings),
        batch.frame,
    )
    losses = compared(answer, base.prediction.target(x0, noise, t), batch.mask, base.prediction, t, settings)
    return losses * batch.weight.to(losses.device, losses.dtype, non_blocking=True)


def with_guidance(conditioning: Conditioning, settings: ObjectiveSettings) -> Conditioning:
    """What the text says, and beside it the guidance of `settings`, where there is one."""
    if settings.guidance is None:
        return conditioning
    count, device = len(conditioning), conditioning.tokens.device
    return replace(conditioning, guidance=torch.full((count,), settings.guidance, device=device))


def compared(
    answer: Tensor,
    target: Tensor,
    mask: Tensor | None,
    prediction: Prediction,
    t: Tensor,
    settings: ObjectiveSettings,
) -> Tensor:
    """(B,) fp32 losses between what was answered and what should be, each (B, C, h, w), where the mask (B, 1, h, w)
    counts."""
    error = _error(answer.float(), target.float(), settings, _to_measured(prediction, t, settings))
    return _mean(error, mask) * _weight(prediction, t, settings)


def _to_measured(prediction: Prediction, t: Tensor, settings: ObjectiveSettings) -> Tensor | None:
    """The factor (B,) from an error in what is predicted to one where it is measured, but for its sign; None is 1.

    Both are straight functions of the answer, so that their errors are in proportion.
    """
    if settings.measured == "prediction":
        return None
    return prediction.snr_weight(t, prediction.snr(t)).sqrt()


def _weight(prediction: Prediction, t: Tensor, settings: ObjectiveSettings) -> Tensor | float:
    """The weight of each sample's error where it is measured, (B,).

    Min-SNR is min(snr, gamma) on the error in x0, expressed on the error in what is predicted (Hang et al., 2023, eq.
    8)."""
    if settings.weighting != "none":
        return WEIGHTINGS[settings.weighting](prediction.noise(t))
    if settings.snr_gamma is None:
        return 1.0
    snr = prediction.snr(t)
    weight = snr.clamp(max=settings.snr_gamma)
    return weight if settings.measured == "clean" else prediction.snr_weight(t, snr) * weight


def _error(answer: Tensor, target: Tensor, settings: ObjectiveSettings, factor: Tensor | None) -> Tensor:
    """Element-wise error of both times `factor` (B,). Huber (1964) is doubled, so that it equals l2 where the
    difference is below delta."""
    if factor is not None:
        answer, target = wide(factor, answer) * answer, wide(factor, target) * target
    if settings.loss == "huber":
        return 2 * functional.huber_loss(answer, target, reduction="none", delta=settings.huber_delta)
    return functional.mse_loss(answer, target, reduction="none")


def _mean(error: Tensor, mask: Tensor | None) -> Tensor:
    """(B, C, h, w) -> (B,): the mean where the mask counts; 0 for a sample whose mask is empty."""
    if mask is None:
        return error.flatten(1).mean(1)
    mask = mask.to(error.device, error.dtype, non_blocking=True).expand_as(error)
    return (error * mask).flatten(1).sum(1) / mask.flatten(1).sum(1).clamp(min=1e-8)
