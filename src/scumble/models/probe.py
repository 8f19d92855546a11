"""Probe: whether a denoiser predicts what its scheduler says, by one noised batch.

Legend: x0 clean latents, n noise, x_t = s x0 + r n. Each kind of prediction is a mix of x0 and n, and a trained
denoiser's answer is near one of them; a scheduler config that says another makes mush of every picture.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from scumble.errors import ModelError
from scumble.models.family import BaseModel, Frame
from scumble.models.prediction import wide
from scumble.rng import Streams

LEVELS = (0.4, 0.5, 0.6)
"""Noise levels of the batch, as fractions: between them x0 and n are both told, and the kinds are farthest apart."""

NEAR = 0.5
"""An answer whose relative squared error is below this was meant so; untrained denoisers are at 1 for every kind."""

SIDE = 32
"""Latents along one side, at most."""


@dataclass(frozen=True)
class Verdict:
    """How far the denoiser's answers are from each kind of prediction."""

    said: str
    """What the base takes its denoiser to predict."""
    errors: Mapping[str, float]
    """Kind -> mean squared difference from what it should answer, relative to the mean square of that."""

    @property
    def found(self) -> str:
        """The kind that the answers are nearest to; empty where they are near none."""
        best = min(self.errors, key=lambda kind: self.errors[kind])
        return best if self.errors[best] < NEAR else ""

    @property
    def contradicts(self) -> bool:
        """Whether the answers are plainly of another kind than the base says."""
        own = self.errors[self.said]
        return self.found not in ("", self.said) and own > max(NEAR, 2 * self.errors[self.found])

    def __str__(self) -> str:
        shown = ", ".join(f"{error:.2f} from {kind}" for kind, error in self.errors.items())
        return f"given three noised pictures, the denoiser's answers are {shown} (0 is exact, 1 is nothing in common)"


@torch.no_grad()
def probe(base: BaseModel) -> Verdict:
    """Ask the denoiser for its answer to one noised batch. Takes one forward pass of three small pictures."""
    side = base.latent_side(SIDE)
    pictures = _pictures(side * base.latent_factor)
    # one by one: an image encoder takes much memory, and this is before a run that may have little
    x0 = torch.cat([base.encode_images(one[None], None) for one in pictures])
    x0 = x0 / x0.std()  # as large as the noise, or the kinds would not be far apart
    n = Streams(0).normal("probe", range(len(x0)), x0.shape[1:]).to(x0.device)
    t = base.prediction.from_uniform(torch.tensor(LEVELS)).to(base.device)
    frame = Frame.plain(len(x0), side * base.latent_factor, side * base.latent_factor)
    with base.sparing():
        said = base.encode_prompts([""] * len(x0))
    answer = base.denoise(base.prediction.noisy(x0, n, t).to(base.dtype), t, said, frame).to(x0.device)
    errors = {
        kind: ((answer - target).square().mean() / target.square().mean()).item()
        for kind, target in _kinds(base, x0, n, t).items()
    }
    return Verdict(base.prediction.name, errors)


def check_prediction(base: BaseModel) -> None:
    """Refuse a base whose denoiser plainly predicts something else than its scheduler says.

    Raises:
        ModelError: it does; the text reports what was found.
    """
    verdict = probe(base)
    if verdict.contradicts:
        known = verdict.found in ("epsilon", "v_prediction") and not base.prediction.straight
        advice = (
            f'set prediction = "{verdict.found}"'
            if known
            else "take the scheduler of the base it was made from"
        )
        raise ModelError(
            f"{base.name} is taken to predict {verdict.said}, and its weights predict {verdict.found or 'nothing'}: "
            f"{verdict}. Its scheduler config belongs to another base: {advice}."
        )


def _kinds(base: BaseModel, x0: Tensor, n: Tensor, t: Tensor) -> dict[str, Tensor]:
    """Kind -> what a denoiser of that kind should answer."""
    own = {base.prediction.name: base.prediction.target(x0, n, t)}
    if base.prediction.straight:
        return {**own, "epsilon": n, "sample": x0}
    signal, noise = (wide(factor(t), x0) for factor in (base.prediction.signal, base.prediction.noise))
    return {**own, "epsilon": n, "v_prediction": signal * n - noise * x0, "sample": x0}


def _pictures(side: int) -> Tensor:
    """(3, 3, side, side) in [-1, 1]: two smooth fades and a bright disc, of different colours."""
    along = torch.linspace(-1, 1, side)
    across, down = along.expand(side, side), along.view(-1, 1).expand(side, side)
    disc = (across.square() + down.square() < 0.5).float() * 2 - 1
    return torch.stack(
        [
            torch.stack([across, down, -across]),
            torch.stack([down * 0.5 + 0.5, -down, across * down]),
            torch.stack([disc, disc * 0.3 + 0.2, -disc]),
        ]
    )
