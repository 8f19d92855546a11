"""Rehearsal: a run played through without a weight or a picture: how much memory each thing that it does holds.

The method makes its plan with a ghost of the base, so that whatever a method trains, and on whatever losses, is played
as it is; nothing here knows which method that is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from scumble.adapters.targets import named
from scumble.data.record import Batch
from scumble.data.settings import DataSettings
from scumble.errors import ScumbleError
from scumble.methods.method import METHODS, Ingredients
from scumble.models.dtypes import Dtypes, own_dtypes
from scumble.models.family import BaseModel, Frame
from scumble.models.ghost import Ghost, ghost
from scumble.models.ledger import Held, Inside, Ledger, Theatre
from scumble.models.loading import Look
from scumble.models.precision import dtype_named
from scumble.models.probe import LEVELS, SIDE
from scumble.rng import Streams
from scumble.runs.build import text_is_cached
from scumble.runs.config import RunConfig
from scumble.training.optimizers import build_optimizer
from scumble.training.plan import Phase, Plan
from scumble.training.tensors import tensors_in

PROBED = 1 << 14
"""Numbers by which an optimizer is asked what it remembers of each."""

Size = tuple[int, int]


class NotPlayable(ScumbleError):
    """Something in this run can't be played without numbers."""


class StillBatches:
    """Endlessly the same batch of zeros."""

    fingerprint = ""

    def __init__(self, one: Batch, embedded: Batch, samples: int) -> None:
        """`embedded`: the same with text embeddings. `samples`: pictures that it stands for."""
        self.one, self.embedded, self.samples = one, embedded, samples
        self.batch_size = len(one)

    def start(self, number: int, *, process: int = 0, processes: int = 1) -> Iterator[Batch]:
        """See Batches."""
        while True:
            yield self.one

    def with_text_embeddings(self) -> StillBatches:
        """See Embeddable."""
        return StillBatches(self.embedded, self.embedded, self.samples)


class Rehearsal:
    """A run that is played. What is asked for is played once."""

    def __init__(
        self,
        config: RunConfig,
        look: Look,
        size: Size,
        *,
        device: torch.device,
        samples: int = 1,
    ) -> None:
        """
        Args:
            config: of the run. Its `gradient_checkpointing` counts for nothing: see `step`.
            look: at its base.
            size: (height, width) of the largest pictures that it trains on.
            device: that it runs on, which need not be there.
            samples: pictures that it trains on.

        Raises:
            NotPlayable: the base can't be built without weights, or the method needs numbers to make its plan.
        """
        if not look.tokenizers:
            raise NotPlayable(f"{look.configs.name} holds no vocabulary, so that nothing can be said to it.")
        train = config.train.model_copy(update={"gradient_checkpointing": False})
        self.config, self.size, self.device = config, size, device
        self.from_folder = look.folder is not None
        """Whether each component lies in files of its own."""
        self._steps: dict[tuple[str, bool | tuple[str, ...]], Held] = {}
        self.others: dict[tuple[object, ...], Held] = {}
        """All that was played and is no step."""
        own = own_dtypes(config.dtypes, look.facts.components, look.facts.name)
        dtypes = Dtypes(dtype_named(train.precision), own, train.quantization)
        self.ghost: Ghost = ghost(look, dtypes, config.variant)
        self.base: BaseModel = self.ghost.base
        self.base.claim(named(config.adapter.targets, self.base.late))
        self.cached = config.pictures is None or text_is_cached(config, self.base)
        self._one = self._batch(1, embedded=self.cached)
        batches = self._batches(train.batch, samples, embedded=self.cached)
        try:
            self.plan: Plan = METHODS.get(config.method).plan(
                Ingredients(
                    base=self.base,
                    fresh=lambda: self.base,
                    adapter=config.adapter,
                    targets=config.adapter.targets,
                    batches=batches if config.pictures is not None else None,
                    train=train,
                    streams=Streams(train.seed),
                    options=config.options,
                    data=config.pictures,
                    open_batches=self._open_batches,
                    draw=_nothing_drawn,
                )
            )
        except (NotImplementedError, RuntimeError, ValueError, TypeError) as error:
            raise NotPlayable(f"The plan of this method can't be made without numbers: {error}") from error
        self.base.device = device

    # -- what is played ------------------------------------------------------------------------------------------

    def step(self, phase: Phase, checkpointing: bool | Sequence[str] = False) -> Held:
        """Forward and backward of one batch of the largest size."""
        asked = (phase.name, checkpointing if isinstance(checkpointing, bool) else tuple(checkpointing))
        if asked not in self._steps:
            self._ready(phase, checkpointing)
            self._steps[asked] = self._played(
                f"a training step of {phase.name}", self.theatre.play, lambda: self._step(phase)
            )
        return self._steps[asked]

    def step_by_blocks(self, phase: Phase) -> tuple[Held, dict[str, Inside]]:
        """The same without recomputation, and what each block that can be recomputed keeps."""
        self._ready(phase, False)
        blocks = self.base.recomputable
        with_blocks = lambda work: self.theatre.play_blocks(work, blocks)  # noqa: E731
        found: tuple[Held, dict[str, Inside]] = self._played(
            "a training step", with_blocks, lambda: self._step(phase)
        )
        self._steps[phase.name, False] = found[0]
        return found

    def encoding(self) -> Held:
        """One picture of the largest size through the image encoder."""
        return self._encoding(1, self.size)

    def asking(self) -> Held:
        """What a base is asked before it is trained (see `models.probe`)."""
        side = self.base.latent_side(SIDE)
        pixels = (side * self.base.latent_factor,) * 2
        first, second = self._encoding(1, pixels), self.answering(len(LEVELS), pixels)
        return max(first, second, key=lambda held: held.peak)

    def reading(self) -> Held:
        """One caption through the text encoders."""
        return self._quiet("reading a caption", lambda: self.base.encode_prompts(["a picture"]))

    def answering(self, rows: int, pixels: Size) -> Held:
        """So many rows through the denoiser, without a graph."""
        return self._quiet("an answer of the denoiser", lambda: self._answer(rows, pixels), rows, pixels)

    def decoding(self, rows: int, pixels: Size) -> Held:
        """So many pictures out of the image encoder."""
        base, vae = self.base, self._vae

        def work() -> Tensor:
            size = (rows, base.latent_channels, *self._side(pixels))
            latents = torch.zeros(size, device=self.device, dtype=vae.dtype)
            pictures: Tensor = vae.decode(latents).sample.float()
            return pictures.clamp(-1, 1)

        return self._quiet("drawing", work, rows, pixels)

    @cached_property
    def state_bytes(self) -> tuple[float, float]:
        """(what the optimizer remembers, what it takes besides while it steps) in bytes for each byte that trains."""
        own = nn.ParameterList([nn.Parameter(torch.zeros(PROBED)) for _ in range(4)])
        groups = [{"params": list(own), "lr": self.config.train.optimizer.learning_rate, "name": "all"}]
        optimizer = build_optimizer(self.config.train.optimizer, groups)
        for parameter in own:
            parameter.grad = torch.ones_like(parameter)
        ledger = Ledger()
        with ledger:
            optimizer.step()
        kept = sum(
            one.numel() * one.element_size()
            for state in optimizer.state.values()
            for one in state.values()
            if isinstance(one, Tensor)
        )
        whole = 4 * 4 * PROBED
        return kept / whole, max(0.0, (ledger.peak - kept) / whole)

    @property
    def batch_bytes(self) -> int:
        """Of one picture's latents and one caption's embeddings."""
        one = self._one
        said = [] if one.conditioning is None else tensors_in(one.conditioning)
        return sum(tensor.numel() * tensor.element_size() for tensor in (one.latents, *said))

    def trained_bytes(self, phase: Phase | None = None) -> int:
        """Of what trains, in one phase or in any."""
        phases = self.plan.phases if phase is None else [phase]
        found = {p: None for one in phases for t in one.trainables for p in t.parameters.values()}
        return sum(parameter.numel() * parameter.element_size() for parameter in found)

    # -- how -----------------------------------------------------------------------------------------------------

    @cached_property
    def theatre(self) -> Theatre:
        """Where it is played."""
        return Theatre(self.ghost.modules.values(), self.device)

    @property
    def _vae(self) -> Any:
        return self.base.vae  # type: ignore[attr-defined]

    def _ready(self, phase: Phase, checkpointing: bool | Sequence[str]) -> None:
        self.base.train_memory(checkpointing=checkpointing)
        moving = {p for t in phase.trainables for p in t.parameters.values()}
        for one in self.plan.phases:
            for trainable in one.trainables:
                for parameter in trainable.parameters.values():
                    parameter.requires_grad_(parameter in moving)

    def _step(self, phase: Phase) -> None:
        batch = next(phase.batches.start(0))
        precision = self.config.train.precision
        dtype = None if precision == "no" else dtype_named(precision)
        phase.objective.train()
        try:
            with torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None):
                losses = phase.objective(batch)
            losses.float().sum().backward()
        finally:
            phase.objective.eval()

    def _encoding(self, rows: int, pixels: Size) -> Held:
        vae = self._vae

        def work() -> Tensor:
            pictures = torch.zeros(rows, 3, *pixels, device=self.device)
            found: Tensor = vae.encode(pictures.to(vae.dtype)).latent_dist.mode().float()
            return found

        return self._quiet("encoding a picture", work, rows, pixels)

    def _answer(self, rows: int, pixels: Size) -> Tensor:
        base = self.base
        latents = torch.zeros(rows, base.latent_channels, *self._side(pixels), device=self.device)
        t = base.prediction.from_uniform(torch.full((rows,), 0.5)).to(self.device)
        with base.sparing():
            said = base.encode_prompts(["a picture"] * rows)
        return base.denoise(latents, t, said, Frame.plain(rows, *pixels))

    def _quiet(self, what: str, work: Any, *about: object) -> Held:
        """`about`: all that tells this from other work that is called so."""

        def unrecorded() -> Any:
            with torch.no_grad():
                return work()

        if (what, *about) not in self.others:
            self.others[what, *about] = self._played(what, self.theatre.play, unrecorded)
        return self.others[what, *about]

    def _played(self, what: str, play: Any, work: Any) -> Any:
        try:
            return play(work)
        except ScumbleError:
            raise
        except (NotImplementedError, RuntimeError, ValueError, TypeError, AttributeError) as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise NotPlayable(f"{what} can't be played without numbers: {reason}") from error

    def _side(self, pixels: Size) -> Size:
        """(height, width) of a picture's latents."""
        height, width = pixels
        return height // self.base.latent_factor, width // self.base.latent_factor

    # -- batches of zeros ----------------------------------------------------------------------------------------

    def _batches(self, count: int, samples: int, *, embedded: bool) -> StillBatches:
        full, plain = self._batch(count, embedded=True), self._batch(count, embedded=False)
        return StillBatches(full if embedded else plain, full, samples)

    def _open_batches(self, data: DataSettings, *, batch_size: int, text_embeddings: bool) -> StillBatches:
        return self._batches(batch_size, 1, embedded=text_embeddings)

    def _batch(self, count: int, *, embedded: bool) -> Batch:
        base, side = self.base, self._side(self.size)
        said = None
        if embedded:
            with torch.no_grad():
                said = base.encode_prompts(["a picture"] * count).map(
                    lambda one: torch.zeros(one.shape, dtype=one.dtype)
                )
        masked = self.config.pictures is not None and self.config.pictures.masks is not None
        return Batch(
            latents=torch.zeros(count, base.latent_channels, *side),
            conditioning=said,
            captions=("a picture",) * count,
            frame=Frame.plain(count, *self.size),
            weight=torch.ones(count),
            keys=("a picture",) * count,
            positions=tuple(range(count)),
            mask=torch.ones(count, 1, *side) if masked else None,
            shown=torch.zeros(count, base.shown_channels, *side) if base.shown_channels else None,
        )


def _nothing_drawn(prompt: str, count: int, **settings: Any) -> Path:
    """Class pictures that are taken to be there (see `methods.method.DrawPictures`)."""
    return Path()
