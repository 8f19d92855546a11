"""Prediction: what a denoiser is asked to predict, as one algebra with an inverse.

Legend: x0 clean latents, n standard normal noise, t the noise level (B,), x_t = signal(t) x0 + noise(t) n.
All of x0, n, x_t are (B, C, h, w).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from scumble.errors import ModelError


class Prediction(ABC):
    """What a denoiser is asked to predict.

    Law: clean(x_t, target(x0, n, t), t) == x0, for x_t = noisy(x0, n, t) and every t with signal(t) > 0.
    """

    name: str
    """diffusers' word for it: "epsilon", "v_prediction", "flow"."""
    straight: bool = False
    """Whether x_t lies on the straight line from x0 to n, signal(t) + noise(t) = 1: flow matching."""
    shift: float = 1.0
    """How far `from_uniform` moves levels towards noise (see `shifted`); 1 not at all."""

    def shift_at(self, tokens: int, usual: int) -> float:
        """The shift for pictures of `tokens` latent patches, where the base's usual size has `usual`.

        Raises:
            ModelError: this prediction has a fixed schedule of noise levels.
        """
        raise ModelError(
            f"A shift by resolution is for flow matching; this base predicts {self.name}. Give a number, or leave "
            "the shift out."
        )

    @abstractmethod
    def signal(self, t: Tensor) -> Tensor:
        """The factor of x0 at t, (B,), fp32."""

    @abstractmethod
    def noise(self, t: Tensor) -> Tensor:
        """The factor of n at t, (B,), fp32."""

    @abstractmethod
    def from_uniform(self, u: Tensor) -> Tensor:
        """Uniform numbers in [0, 1) -> t in this prediction's own units, (B,); increasing in u from clean to
        noise."""

    @abstractmethod
    def target(self, x0: Tensor, n: Tensor, t: Tensor) -> Tensor:
        """What the denoiser should answer."""

    @abstractmethod
    def clean(self, xt: Tensor, out: Tensor, t: Tensor) -> Tensor:
        """The x0 that the answer `out` implies."""

    def noisy(self, x0: Tensor, n: Tensor, t: Tensor) -> Tensor:
        """x_t, in the dtype of x0."""
        return (wide(self.signal(t), x0) * x0 + wide(self.noise(t), x0) * n).to(x0.dtype)

    def snr(self, t: Tensor) -> Tensor:
        """Signal-to-noise ratio (signal / noise)^2, (B,), fp32."""
        return (self.signal(t) / self.noise(t)).square()

    @abstractmethod
    def snr_weight(self, t: Tensor, snr: Tensor) -> Tensor:
        """The factor that turns a weight on the error in x0, given as a function of `snr`, into a weight on
        the error in this prediction: 1/snr for epsilon, 1/(snr + 1) for velocity (Hang et al. 2023, section
        3.4)."""


def shifted(u: Tensor, factor: float) -> Tensor:
    """Levels u in [0, 1] moved towards noise: the odds u / (1 - u) times `factor` (Esser et al. 2024, eq. 23).

    Law: shifted(shifted(u, a), b) == shifted(u, a * b).
    """
    return u if factor == 1 else factor * u / (1 + (factor - 1) * u)


def wide(factor: Tensor, like: Tensor) -> Tensor:
    """(B,) -> (B, 1, 1, 1), on the device of `like`."""
    return factor.to(like.device).view(-1, *[1] * (like.ndim - 1))


class Scheduled(Prediction):
    """Predictions on the discrete, variance-preserving schedule of DDPM: t is an integer index into
    `alphas_cumprod`."""

    def __init__(self, alphas_cumprod: Tensor) -> None:
        """`alphas_cumprod` (T,): squared signal factor of each step, decreasing."""
        self.alphas_cumprod = alphas_cumprod.detach().to("cpu", torch.float32)
        self._on_device = {torch.device("cpu"): self.alphas_cumprod}

    @property
    def steps(self) -> int:
        return len(self.alphas_cumprod)

    def _squared_signal(self, t: Tensor) -> Tensor:
        # kept where it is used: a copy at every step would make the host wait for the device
        if t.device not in self._on_device:
            self._on_device[t.device] = self.alphas_cumprod.to(t.device)
        return self._on_device[t.device][t.long()]

    def signal(self, t: Tensor) -> Tensor:
        return self._squared_signal(t).sqrt()

    def noise(self, t: Tensor) -> Tensor:
        return (1 - self._squared_signal(t)).sqrt()

    def from_uniform(self, u: Tensor) -> Tensor:
        return (u * self.steps).long().clamp(0, self.steps - 1)


class Epsilon(Scheduled):
    """The noise itself (Ho et al. 2020): Stable Diffusion 1, SD 2 base, SDXL."""

    name = "epsilon"

    def target(self, x0: Tensor, n: Tensor, t: Tensor) -> Tensor:
        return n

    def clean(self, xt: Tensor, out: Tensor, t: Tensor) -> Tensor:
        return (xt - wide(self.noise(t), xt) * out) / wide(self.signal(t), xt)

    def snr_weight(self, t: Tensor, snr: Tensor) -> Tensor:
        # at zero terminal SNR the answer is x_t itself and teaches nothing: min(snr, gamma) / snr is 0 there,
        # not NaN
        return 1 / snr.clamp(min=torch.finfo(torch.float32).tiny)


class Velocity(Scheduled):
    """v = signal n - noise x0 (Salimans & Ho 2022): Stable Diffusion 2 at 768 pixels."""

    name = "v_prediction"

    def target(self, x0: Tensor, n: Tensor, t: Tensor) -> Tensor:
        return wide(self.signal(t), x0) * n - wide(self.noise(t), x0) * x0

    def clean(self, xt: Tensor, out: Tensor, t: Tensor) -> Tensor:
        return wide(self.signal(t), xt) * xt - wide(self.noise(t), xt) * out

    def snr_weight(self, t: Tensor, snr: Tensor) -> Tensor:
        return 1 / (snr + 1)


@dataclass(frozen=True)
class TokenShift:
    """A shift that grows with the picture: mu is linear in the number of latent patches, as diffusers' pipelines
    compute it for schedulers with `use_dynamic_shifting`."""

    low: float = 0.5
    """mu at `low_tokens`."""
    high: float = 1.15
    """mu at `high_tokens`."""
    low_tokens: int = 256
    high_tokens: int = 4096
    exponential: bool = True
    """Whether the shift is exp(mu), or mu itself."""

    def __call__(self, tokens: int) -> float:
        """The shift for a picture of so many latent patches."""
        mu = self.low + (self.high - self.low) * (tokens - self.low_tokens) / (
            self.high_tokens - self.low_tokens
        )
        return math.exp(mu) if self.exponential else mu


class Flow(Prediction):
    """The straight path from picture to noise, n - x0 (Lipman et al. 2023; Esser et al. 2024): SD 3 and Flux.

    t is in [0, 1]: x_t = (1 - t) x0 + t n. It is sigma in diffusers' flow-matching schedulers, whose timesteps are
    1000 t.
    """

    name = "flow"
    straight = True

    def __init__(self, shift: float = 1.0, by_tokens: TokenShift | None = None) -> None:
        """`shift`: of the base's own schedule, by which it draws and is trained. `by_tokens`: where it draws by a shift
        of its own for each size of picture; trained is then at `shift`, as diffusers' scripts do."""
        self.shift, self.by_tokens = shift, by_tokens

    def shift_at(self, tokens: int, usual: int) -> float:
        """See Prediction. A base with one fixed shift has it at its usual size, and in proportion to the side at
        others (Esser et al. 2024, section 5.3.2)."""
        if self.by_tokens is not None:
            return self.by_tokens(tokens)
        return self.shift * math.sqrt(tokens / usual)

    def signal(self, t: Tensor) -> Tensor:
        return 1 - t.float()

    def noise(self, t: Tensor) -> Tensor:
        return t.float()

    def from_uniform(self, u: Tensor) -> Tensor:
        return shifted(u, self.shift)

    def target(self, x0: Tensor, n: Tensor, t: Tensor) -> Tensor:
        return n - x0

    def clean(self, xt: Tensor, out: Tensor, t: Tensor) -> Tensor:
        return xt - wide(t.float(), xt) * out

    def snr_weight(self, t: Tensor, snr: Tensor) -> Tensor:
        # error in x0 = t * error in the flow, and snr = ((1 - t) / t)^2
        return t.float().square()


FLOW_SAMPLED = "flow_prediction"
"""What diffusers' samplers call it that were not made for flow matching alone."""

SCHEDULED: dict[str, type[Scheduled]] = {"epsilon": Epsilon, "v_prediction": Velocity}
"""diffusers' word -> the prediction, for schedulers of the DDPM kind."""


def prediction_type(scheduler: Mapping[str, Any]) -> tuple[str, str]:
    """(prediction type, note) of a diffusers scheduler config; the note is empty when the config says it.

    Raises:
        ModelError: the config names a prediction that this release doesn't train.
    """
    said = scheduler.get("prediction_type")
    # a scheduler that was never saved doesn't name its class; those of flow matching have a shift, and no betas
    unnamed = "shift" in scheduler and "beta_start" not in scheduler
    if "FlowMatch" in str(scheduler.get("_class_name", "")) or unnamed or said == FLOW_SAMPLED:
        return Flow.name, ""
    if said is None:
        return (
            Epsilon.name,
            "The scheduler config names no prediction_type: epsilon is assumed, as diffusers does.",
        )
    if said not in SCHEDULED:
        raise ModelError(
            f"The base predicts {said!r} (prediction_type in its scheduler config); this release trains "
            f"{', '.join(SCHEDULED)} and flow matching."
        )
    return str(said), ""


def prediction_from(scheduler: Mapping[str, Any]) -> Prediction:
    """The prediction of a base, with its noise schedule, from its diffusers scheduler config (any
    scheduler's).

    The schedule is computed by diffusers' own DDPMScheduler, zero-terminal-SNR rescaling (Lin et al. 2023)
    included.

    Raises:
        ModelError: the prediction or the schedule is none that this release trains.
    """
    name, _ = prediction_type(scheduler)
    if name == Flow.name:
        return _flow(scheduler)
    if "EDM" in str(scheduler.get("_class_name", "")):
        raise ModelError(
            f"The base's noise schedule is {scheduler['_class_name']} (Karras et al. 2022); this release "
            f"trains bases on the DDPM schedule and on flow matching."
        )
    from diffusers import DDPMScheduler

    wanted = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas")
    said = {
        key: scheduler[key] for key in (*wanted, "rescale_betas_zero_snr") if scheduler.get(key) is not None
    }
    try:
        schedule = DDPMScheduler(**said)
    except (NotImplementedError, TypeError, ValueError) as error:
        raise ModelError(
            f"The base's noise schedule can't be built from its scheduler config: {error}"
        ) from error
    return SCHEDULED[name](schedule.alphas_cumprod)


def _flow(scheduler: Mapping[str, Any]) -> Flow:
    if scheduler.get("use_dynamic_shifting"):
        names = {
            "low": "base_shift",
            "high": "max_shift",
            "low_tokens": "base_image_seq_len",
            "high_tokens": "max_image_seq_len",
        }
        said = {
            ours: scheduler[theirs] for ours, theirs in names.items() if scheduler.get(theirs) is not None
        }
        exponential = scheduler.get("time_shift_type", "exponential") == "exponential"
        return Flow(by_tokens=TokenShift(**said, exponential=exponential))
    return Flow(float(scheduler.get("shift", scheduler.get("flow_shift", 1.0))))
