"""The denoising loss: squared error to what the denoiser should answer, one number per sample.

Legend: B samples; x0 clean latents, n noise, t noise level, x_t = signal(t) x0 + noise(t) n; snr = (signal /
noise)^2. Prior preservation is `batch.weight`, masked loss is `batch.mask`, min-SNR is a weighting: they
combine freely.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional

from scumble.rng import Streams
from scumble.settings import Settings
from scumble.training.timesteps import TimestepSettings, levels

if TYPE_CHECKING:
    from scumble.data.record import Batch
    from scumble.models.family import BaseModel
    from scumble.models.prediction import Prediction


class ObjectiveSettings(Settings):
    """What is minimised."""

    loss: Literal["l2", "huber"] = "l2"
    """l2 (squared error), or huber (squared near 0, linear beyond `huber_delta`: outliers pull less)."""
    huber_delta: float = Field(default=0.1, gt=0)
    """Where huber turns from squared to linear, in units of the latents."""
    snr_gamma: float | None = Field(default=None, gt=0)
    """Min-SNR weighting (Hang et al., 2023): 5 is usual. None weighs all noise levels alike."""
    noise_offset: float = Field(default=0.0, ge=0)
    """Strength of a constant per channel added to the noise, so that very dark and very bright pictures are
    learned (Guttenberg, 2023); 0.05 to 0.1 are usual."""
    timesteps: TimestepSettings = TimestepSettings()
    """Which noise levels are trained on."""

    @model_validator(mode="after")
    def _no_setting_without_effect(self) -> ObjectiveSettings:
        if self.loss != "huber" and "huber_delta" in self.model_fields_set and self.huber_delta != 0.1:
            raise ValueError(f'huber_delta has no effect with loss = "{self.loss}"; set loss = "huber"')
        return self


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
        """`among`: the names of the roots that may train here; None is all. Another phase trains the rest."""
        super().__init__()
        self.base = base
        self.streams = streams
        self.settings = settings or ObjectiveSettings()
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
        device = next(self.base.denoiser.parameters()).device
        noise = self.noise(batch.positions, batch.latents.shape[1:]).to(device)
        return denoising_loss(
            self.base, batch, noise, self.timesteps(batch.positions).to(device), self.settings
        )

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

    def timesteps(self, positions: tuple[int, ...]) -> Tensor:
        """(B,) noise levels in the prediction's units, on the CPU."""
        uniform = self.streams.uniform("timestep", positions)
        return self.base.prediction.from_uniform(levels(self.settings.timesteps, uniform))


def denoising_loss(
    base: BaseModel, batch: Batch, noise: Tensor, t: Tensor, settings: ObjectiveSettings
) -> Tensor:
    """(B,) fp32 losses of `batch` at noise (B, C, h, w) and levels t (B,), times `batch.weight`."""
    x0 = batch.latents.to(noise.device, non_blocking=True)
    conditioning = base.encode_prompts(batch.captions) if batch.conditioning is None else batch.conditioning
    answer = base.denoise(
        base.prediction.noisy(x0, noise, t).to(base.dtype),
        t,
        conditioning.to(noise.device, base.dtype),
        batch.frame,
    )
    losses = compared(answer, base.prediction.target(x0, noise, t), batch.mask, base.prediction, t, settings)
    return losses * batch.weight.to(losses.device, losses.dtype, non_blocking=True)


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
    error = _error(answer.float(), target.float(), settings)
    return _mean(error, mask) * snr_weight(prediction, t, settings.snr_gamma)


def snr_weight(prediction: Prediction, t: Tensor, gamma: float | None) -> Tensor | float:
    """min(snr, gamma) on the error in x0, expressed on the error in what is predicted (Hang et al., 2023, eq.
    8)."""
    if gamma is None:
        return 1.0
    snr = prediction.snr(t)
    return prediction.snr_weight(t, snr) * snr.clamp(max=gamma)


def _error(answer: Tensor, target: Tensor, settings: ObjectiveSettings) -> Tensor:
    """Element-wise error. Huber (1964) is doubled, so that it equals l2 where the difference is below
    delta."""
    if settings.loss == "huber":
        return 2 * functional.huber_loss(answer, target, reduction="none", delta=settings.huber_delta)
    return functional.mse_loss(answer, target, reduction="none")


def _mean(error: Tensor, mask: Tensor | None) -> Tensor:
    """(B, C, h, w) -> (B,): the mean where the mask counts; 0 for a sample whose mask is empty."""
    if mask is None:
        return error.flatten(1).mean(1)
    mask = mask.to(error.device, error.dtype, non_blocking=True).expand_as(error)
    return (error * mask).flatten(1).sum(1) / mask.flatten(1).sum(1).clamp(min=1e-8)
