"""Parts: what methods share: injecting, learning rates by root, what the file says of itself, held-out loss, proof."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import scumble
from scumble.adapters.adapter import Adapter
from scumble.adapters.state import AdapterState, Metadata
from scumble.errors import NoEffect, TrainingError
from scumble.methods.method import Ingredients
from scumble.models.family import BaseModel, Frame
from scumble.models.heap import give_back
from scumble.rng import Streams
from scumble.settings import Settings
from scumble.tensor_files.dtypes import word_of
from scumble.training.objective import ObjectiveSettings, denoising_loss
from scumble.training.plan import Phase, Plan, Trainable

if TYPE_CHECKING:
    from scumble.data.record import Batch

HELD_OUT_LEVELS = 6
"""Noise levels at which each held-out picture is measured, spread evenly over the schedule."""

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
"""Largest difference between the saved file and the live model, relative to the largest output (about 1), by
the coarsest dtype among the base's. It is 0 on one device; a fresh base may choose other kernels."""

PROOF_LEVELS = (0.2, 0.5, 0.8)
"""Noise levels at which the saved file is proven, at once: shares of all that there are."""

PROOF_SIDE = 16
"""Latents along one side, at most, of the picture that the saved file is proven with: every layer answers, and at
the 64 of SD 1.5 the proof would take as long as several steps."""


def injected(ingredients: Ingredients) -> Adapter:
    """A new adapter in the base, as the ingredients say, and the base's memory as training wants it.

    Raises:
        NoLayerMatches: a target matches no layer.
    """
    base = ingredients.base
    adapter = Adapter.inject(
        base.roots,
        ingredients.targets,
        ingredients.adapter,
        streams=ingredients.streams,
        within=ingredients.within,
    )
    base.train_memory(checkpointing=ingredients.train.gradient_checkpointing)
    return adapter


def planned(
    ingredients: Ingredients, adapter: Adapter, phases: Sequence[Phase], told: Mapping[str, object]
) -> Plan:
    """The plan whose result is `adapter`. `told`: what the method tells a person before the common facts."""
    base, streams, metadata = ingredients.base, ingredients.streams, describe(ingredients)
    held_out = ingredients.held_out
    return Plan(
        phases=tuple(phases),
        export=lambda: adapter.state(metadata),
        verify=lambda state: verify(state, base, ingredients.fresh, streams),
        held_out=HeldOutLoss(base, adapter, held_out, streams) if held_out else None,
        identity=identity(ingredients),
        blocks=base.blocks,
        facts={**told, **facts(adapter, ingredients)},
    )


def trainables(adapter: Adapter, learning_rates: Mapping[str, float]) -> tuple[Trainable, ...]:
    """The adapter's parameters by root, each with the learning rate given for it.

    Raises:
        TrainingError: a rate is given for a root without a layer of the adapter.
    """
    groups: dict[str, dict[str, nn.Parameter]] = defaultdict(dict)
    for name, parameter in adapter.named_parameters():
        root, _, rest = name.partition(".")
        groups[root][rest] = parameter
    idle = [root for root in learning_rates if root not in groups]
    if idle:
        raise TrainingError(
            f"A learning rate is given for {', '.join(idle)}, where the adapter has no layer (it has some in "
            f"{', '.join(groups)}). Add targets there, or remove the rate."
        )
    return tuple(Trainable(root, group, learning_rates.get(root)) for root, group in groups.items())


def describe(ingredients: Ingredients) -> Metadata:
    """What the file will say of itself."""
    base, batches = ingredients.base, ingredients.batches
    return Metadata(
        base_name=base.name,
        base_fingerprint=base.fingerprint(),
        base_family=base.family,
        prediction_type=base.prediction.name,
        dataset_fingerprint=batches.fingerprint if batches else "",
        settings=ingredients.settings,
        version=scumble.__version__,
    )


def identity(ingredients: Ingredients) -> dict[str, Any]:
    """What a resume must find unchanged."""
    base, targets = ingredients.base, ingredients.targets
    return {
        "base": base.fingerprint(),
        "prediction": base.prediction.name,
        "base dtype": word_of(base.dtype),
        **({"quantization": base.quantization} if base.quantization != "none" else {}),
        **({"dtypes": {name: word_of(dtype) for name, dtype in base.dtypes.items()}} if base.dtypes else {}),
        "adapter": ingredients.adapter.model_dump(mode="json"),
        "targets": [targets] if isinstance(targets, str) else list(targets),
        "objective": ingredients.train.objective.model_dump(mode="json"),
        **({"method": options} if (options := _said(ingredients.options)) else {}),
    }


def _said(options: Settings) -> dict[str, Any]:
    """What differs from the defaults: a new setting does not part a run from its checkpoints."""
    return options.model_dump(mode="json", exclude_defaults=True)


def facts(adapter: Adapter, ingredients: Ingredients) -> dict[str, object]:
    """What a person is told before the start."""
    batches = ingredients.batches
    return {
        "base": ingredients.base.name,
        "family": ingredients.base.family,
        "prediction": ingredients.base.prediction.name,
        "layers": len(adapter),
        "layers by target": dict(adapter.matched.counts) if adapter.matched else {},
        "parameters": adapter.parameter_count,
        "file bytes": 4 * adapter.parameter_count,
        **({"pictures": batches.samples} if batches else {}),
        "held-out pictures": sum(map(len, ingredients.held_out)),
        "steps": ingredients.train.steps,
    }


class HeldOutLoss:
    """The plain squared error on held-out pictures, at fixed noise and evenly spread noise levels, by
    picture.

    No weighting, no noise offset: numbers of runs with different objectives compare. The base's own losses
    never change, so they are measured once.
    """

    def __init__(
        self,
        base: BaseModel,
        adapter: Adapter,
        pictures: Sequence[Batch],
        streams: Streams,
        count: int = HELD_OUT_LEVELS,
    ) -> None:
        """`count`: noise levels per picture."""
        self._base, self._adapter, self._streams, self._count = base, adapter, streams, count
        self._pictures = [replace(batch, weight=torch.ones(len(batch)), mask=None) for batch in pictures]
        self._base_losses: Tensor | None = None

    def __call__(self) -> tuple[Tensor, Tensor]:
        """(losses with the adapter, losses of the bare base), each (pictures,) fp32 on the CPU."""
        if self._base_losses is None:
            with self._adapter.disabled():
                self._base_losses = self._losses()
        return self._losses(), self._base_losses

    @torch.no_grad()
    def _losses(self) -> Tensor:
        device, settings = next(self._base.denoiser.parameters()).device, ObjectiveSettings()
        found, before = [], 0
        for batch in self._pictures:
            total = torch.zeros(len(batch))
            for level in range(self._count):
                names = [(before + row) * self._count + level for row in range(len(batch))]
                noise = self._streams.normal("held-out noise", names, batch.latents.shape[1:]).to(device)
                fraction = torch.full((len(batch),), (level + 0.5) / self._count)
                t = self._base.prediction.from_uniform(fraction).to(device)
                total += denoising_loss(self._base, batch, noise, t, settings).float().cpu() / self._count
            found.append(total)
            before += len(batch)
        return torch.cat(found)


@torch.no_grad()
def verify(state: AdapterState, base: BaseModel, fresh: Callable[[], BaseModel], streams: Streams) -> float:
    """Load `state` into a fresh base; the largest difference of its answers from those of the live model
    `base`, which is asked first: `fresh` may let go of it, so that no two bases are in memory.

    Raises:
        NoEffect: with and without the adapter, the fresh base answers the same.
        TrainingError: the live model answers otherwise: what was saved is not what was trained.
    """
    prompt = " ".join(["a picture", *(["of", *state.tokens] if state.tokens else [])]) + ", to compare"
    give_back()
    with base.sparing():
        live = _answers(base, streams, prompt)
    other = fresh()
    other.claim(state.roots)
    with other.sparing():
        return _compared(state, live, other, streams, prompt)


def _compared(state: AdapterState, live: Tensor, other: BaseModel, streams: Streams, prompt: str) -> float:
    """See `verify`; `live` is what the trained model answered to `prompt`, `other` the fresh base."""
    bare = _answers(other, streams, prompt)
    with Adapter.load(other.roots, state, name="verify", vocabularies=other.vocabularies):
        saved = _answers(other, streams, prompt)
    if torch.equal(saved, bare):
        raise NoEffect(
            "The saved adapter changes nothing: a fresh base answers bit for bit the same with and without "
            "it. "
            "The learning rate may be too low, or the base's dtype too coarse for so small a change."
        )
    difference = (saved - live).abs().max().item()
    tolerance = max(TOLERANCE[dtype] for dtype in (other.dtype, *other.dtypes.values()))
    limit = tolerance * max(1.0, live.abs().max().item())
    if not difference <= limit:
        raise TrainingError(
            "The saved adapter in a fresh base answers otherwise than the model that was trained: they "
            "differ by "
            f"{difference:.3g}, {limit:.3g} is allowed. The base may have changed on disk during the run."
        )
    return difference


def _answers(base: BaseModel, streams: Streams, prompt: str) -> Tensor:
    """The denoiser's answers at three noise levels to `prompt` and fixed latents, (3, C, h, w) fp32 on the
    CPU."""
    side = base.latent_side(PROOF_SIDE)
    latents = streams.normal("verify", range(len(PROOF_LEVELS)), (base.latent_channels, side, side)).to(
        base.device
    )
    t = base.prediction.from_uniform(torch.tensor(PROOF_LEVELS)).to(base.device)
    conditioning = base.encode_prompts([prompt] * len(PROOF_LEVELS))
    frame = Frame.plain(len(PROOF_LEVELS), side * base.latent_factor, side * base.latent_factor)
    return base.denoise(latents, t, conditioning, frame).float().cpu()
