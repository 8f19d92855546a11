"""Forecast: how much memory a run will take at its most, when, and for what, told before a weight is read.

What has shapes is counted: weights, and every tensor that a rehearsal of the run holds. What operations and the
memory's own bookkeeping take besides is estimated (`Around`), from measurements that docs/memory.md tells.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from scumble.data.check import DataReport
from scumble.errors import ModelError
from scumble.methods.parts import PROOF_LEVELS, PROOF_SIDE
from scumble.methods.prior import CLASS_COUNT, PriorSettings
from scumble.models.ghost import size_of
from scumble.models.ledger import Held
from scumble.models.loading import Look, look_at
from scumble.models.precision import find_device
from scumble.models.prepacked import is_ample, size_packed
from scumble.runs.config import RunConfig, is_tight
from scumble.runs.rehearsal import Rehearsal, Size

GIB = 2**30
TRAINING = "training"
"""What the moments and the work of training begin with."""
NARROW_KERNELS = 100 * 2**20
"""What a CPU's compiled kernels for bf16 take, once for the run; measured at SD 1.5's shape."""
KERNELS = 30 * 2**20
"""The same in fp32."""
ON_THE_WAY = 3
"""Blocks that are on the device at once where the others wait on the host."""


def said(size: float) -> str:
    """Bytes for a person."""
    return f"{size / GIB:.2f} GiB" if abs(size) >= GIB / 10 else f"{size / 2**20:.1f} MiB"


@dataclass(frozen=True)
class Share:
    """What one thing takes."""

    name: str
    """"unet", "activations" """
    size: int
    """Bytes."""


@dataclass(frozen=True)
class Moment:
    """Something that a run does, with all that is in memory meanwhile."""

    name: str
    """"training", "proof" """
    shares: tuple[Share, ...]

    @property
    def total(self) -> int:
        """Bytes."""
        return sum(share.size for share in self.shares)

    @property
    def largest(self) -> str:
        """Its largest shares in words: "unet 1.60 GiB, activations 0.52 GiB"."""
        most = sorted(self.shares, key=lambda share: -share.size)[:4]
        return ", ".join(f"{share.name} {said(share.size)}" for share in most)

    def __str__(self) -> str:
        return f"{self.name}: {said(self.total)}"


@dataclass(frozen=True)
class Work:
    """What is computed many times in a run."""

    name: str
    flops: int
    """Of one time, in one process."""
    times: int


@dataclass(frozen=True)
class Forecast:
    """What a run is predicted to take in memory: on a GPU of the GPU's, else of the process, above the interpreter and
    its libraries."""

    moments: tuple[Moment, ...]
    """In the order in which they come; those that don't come are left out."""
    device: str
    recomputed: bool | tuple[str, ...]
    """What is computed again in the backward pass: nothing, all, or these blocks."""
    work: tuple[Work, ...]
    """Optimizer steps of each phase, in order, recomputation included; then pictures that are drawn."""
    budget: int | None
    """Bytes that the run may take; None: nobody said."""

    @property
    def flops(self) -> int:
        """Of all optimizer steps of one process."""
        return sum(work.flops * work.times for work in self.work if work.name.startswith(TRAINING))

    @property
    def training(self) -> tuple[Moment, ...]:
        """The moments in which it trains, one for each phase."""
        return tuple(moment for moment in self.moments if moment.name.startswith(TRAINING))

    @property
    def peak(self) -> Moment:
        """The moment that takes most."""
        return max(self.moments, key=lambda moment: moment.total)

    @property
    def fits(self) -> bool:
        """Whether the budget is kept."""
        return self.budget is None or self.peak.total <= self.budget

    def __str__(self) -> str:
        return f"{said(self.peak.total)}, most of all in {self.peak.name}"


@dataclass(frozen=True)
class Around:
    """What is taken besides tensors, on one kind of device in one dtype."""

    kernels: int
    """Bytes, once."""
    factor: float
    """Of what tensors hold at most: memory between them that is free and can't be used."""
    reordered: float
    """Of the largest convolution's weights: copies in the order that kernels want."""

    @staticmethod
    def on(device: torch.device, dtype: torch.dtype, *, tight: bool) -> Around:
        """For a device and the denoiser's dtype; `tight`: memory is given back as it is freed (see `models.heap`)."""
        if device.type != "cpu":
            return Around(0, 0.03, 0.0)
        narrow = dtype in (torch.bfloat16, torch.float16)
        return Around(NARROW_KERNELS if narrow else KERNELS, 0.05 if tight else 0.15, 1.5)


def budget_of(config: RunConfig, device: torch.device) -> int | None:
    """Bytes that the run may take: as it is told, else what is free on a GPU; None on a CPU."""
    if config.train.memory_budget is not None:
        return int(config.train.memory_budget * GIB)
    if device.type == "cuda" and torch.cuda.is_available():
        return int(torch.cuda.mem_get_info(device)[0])
    return None


def largest(config: RunConfig, look: Look, report: DataReport | None) -> Size:
    """(height, width) of the largest pictures that are trained on."""
    if report is not None and report.buckets:
        return max((bucket.size for bucket in report.buckets), key=lambda size: size[0] * size[1])
    own = getattr(config.options, "resolution", None)
    side = own or (config.data.resolution if config.data else None) or look.facts.resolution or 512
    return (side, side)


class Forecaster:
    """Forecasts one run, and what becomes of it with other settings."""

    def __init__(self, config: RunConfig, report: DataReport | None = None) -> None:
        """`report`: of the run's data, where it was looked at; else all pictures are taken to be square.

        Raises:
            ModelError: there is no such base.
        """
        self.config, self.device = config, find_device(config.device)
        self.look = look_at(config.base, revision=config.revision, variant=config.variant, rest=config.rest)
        self.size = largest(config, self.look, report)
        self.report = report
        self._rehearsals: dict[str, Rehearsal] = {}
        self._others: dict[tuple[str, ...], dict[tuple[object, ...], Held]] = {}
        """What is no step, and so the same for every batch, is played once."""

    def rehearsal(self, config: RunConfig | None = None) -> Rehearsal:
        """The rehearsal of this run, or of it with the settings of `config`.

        Raises:
            NotPlayable: it can't be played without numbers.
            ModelError: the base can't be built.
        """
        config = config or self.config
        told = config.model_dump_json(
            exclude={"output": True, "train": {"gradient_checkpointing", "memory_budget"}}
        )
        if told not in self._rehearsals:
            samples = len(self.report.pictures) if self.report else 1
            self._rehearsals[told] = made = Rehearsal(
                config, self.look, self.size, device=self.device, samples=samples
            )
            alike = (config.train.precision, config.train.quantization, config.method)
            made.others = self._others.setdefault(alike, made.others)
        return self._rehearsals[told]

    def forecast(
        self, config: RunConfig | None = None, recomputed: bool | Sequence[str] | None = None
    ) -> Forecast:
        """What the run takes.

        Args:
            config: other settings of the same run on the same pictures.
            recomputed: which blocks are recomputed; None is as the settings say.

        Raises:
            NotPlayable: it can't be played without numbers.
            ModelError: the base can't be built, or has no such blocks.
        """
        config = config or self.config
        setting = config.train.gradient_checkpointing if recomputed is None else recomputed
        if setting == "auto":
            raise ModelError('gradient_checkpointing = "auto" is for the search to settle (see runs.afford).')
        blocks: bool | tuple[str, ...] = setting if isinstance(setting, bool) else tuple(setting)
        play = self.rehearsal(config)
        steps = [(phase, play.step(phase, blocks)) for phase in play.plan.phases]
        scene = self._scene(config, play, blocks)
        moments = [scene.loading(), scene.asked()]
        moments += [] if config.pictures is None else [scene.encoding()]
        moments += scene.class_pictures()
        work = []
        for phase, held in steps:
            name = TRAINING if len(steps) == 1 else f"{TRAINING}: {phase.name}"
            moments.append(scene.training(name, phase, held))
            work.append(Work(name, held.flops * config.train.accumulate, phase.steps))
        moments += scene.between()
        moments.append(scene.proof())
        return Forecast(
            tuple(moments),
            str(self.device),
            blocks,
            (*work, *scene.drawn_work()),
            budget_of(config, self.device),
        )

    def trains_within_budget(self, config: RunConfig) -> bool:
        """Whether a step fits, the rest of the run aside: the quick half of `forecast(config).fits`."""
        play, budget = self.rehearsal(config), budget_of(config, self.device)
        blocks = config.train.gradient_checkpointing
        assert not isinstance(blocks, str)
        scene = self._scene(config, play, blocks)
        return budget is None or all(
            scene.training(TRAINING, phase, play.step(phase, blocks)).total <= budget
            for phase in play.plan.phases
        )

    def _scene(self, config: RunConfig, play: Rehearsal, blocks: bool | tuple[str, ...]) -> _Scene:
        tight = is_tight(config, blocks)
        around = Around.on(self.device, play.base.dtype, tight=tight)
        both = size_packed(play.base.denoiser)
        packs = self.device.type == "cpu" and not tight and is_ample(both, after=play.ghost.resident)
        return _Scene(config, play, around, self._kept(play), packs)

    def _kept(self, play: Rehearsal) -> int:
        """Bytes of latents and embeddings that are kept in this process' memory."""
        if self.config.data is None or self.device.type != "cpu":
            return 0
        one = play.batch_bytes
        pictures = len(self.report.pictures) if self.report else 1
        return one * pictures


class _Scene:
    """The moments of one run."""

    def __init__(
        self, config: RunConfig, play: Rehearsal, around: Around, kept: int, packs: bool = False
    ) -> None:
        """`packs`: weights of convolutions are also kept in blocks (see `models.prepacked`)."""
        self._config, self._play, self._around, self._kept, self._packs = config, play, around, kept, packs
        self._on_host = play.device.type == "cpu"
        trained = play.trained_bytes()
        self._trained = [Share("what trains", trained)]
        if config.train.ema is not None:
            self._trained.append(Share("its running mean", trained))

    def loading(self) -> Moment:
        """The base is read, component by component."""
        ghost = self._play.ghost
        there = most = 0
        for name, size in ghost.sizes.items():
            if name in ghost.late:
                continue
            # files are mapped: what was read of them counts until the component is whole
            most = max(most, there + size + (self._passing(name, size) if self._on_host else 0))
            there += size
        return self._moment("loading", [*self._weights(), Share("read on the way", max(0, most - there))])

    def _passing(self, name: str, size: int) -> int:
        stored = self._play.ghost.stored.get(name, 0)
        return 0 if abs(stored - size) < 0.02 * size else stored

    def asked(self) -> Moment:
        """The base is asked what it predicts."""
        return self._moment("checking the base", self._weights(), self._play.asking())

    def encoding(self) -> Moment:
        """Pictures and captions go through the encoders."""
        both = [self._play.encoding(), self._play.reading()]
        return self._moment(
            "encoding", [*self._weights(reading=True), *self._trained], max(both, key=lambda held: held.peak)
        )

    def class_pictures(self) -> list[Moment]:
        """Pictures that the bare base draws before training."""
        options = self._config.options
        if (
            not isinstance(options, PriorSettings)
            or options.prior != "images"
            or options.class_prompt is None
        ):
            return []
        count = min(options.class_batch, options.class_count or CLASS_COUNT)
        guided = (options.class_guidance or self._play.base.usual_guidance) > 1
        return [self._drawn("class pictures", count, guided, self._weights(reading=True, packed=1))]

    def training(self, name: str, phase: object, held: Held) -> Moment:
        """A step at the largest size."""
        play = self._play
        moving = play.trained_bytes(phase)  # type: ignore[arg-type]
        remembered, passing = play.state_bytes
        shares = [
            *self._weights(training=True, packed=2),
            *self._trained,
            Share("gradients", moving),
            Share("optimizer", int(moving * (remembered + passing))),
        ]
        acting = replace(held, peak=max(0, held.peak - moving))
        return self._moment(name, shares, acting)

    def between(self) -> list[Moment]:
        """What is measured and drawn between steps."""
        config, play, found = self._config, self._play, []
        remembered, _ = play.state_bytes
        trained = play.trained_bytes()
        beside = [*self._trained, Share("gradients", trained), Share("optimizer", int(trained * remembered))]
        if config.train.held_out_every and config.data and config.data.held_out:
            held = play.answering(config.train.batch, play.size)
            found.append(
                self._moment("held-out loss", [*self._weights(training=True, packed=2), *beside], held)
            )
        if config.preview.prompts:
            # both directions are still there from training
            shares = [
                *self._weights(reading=True, packed=2),
                *beside,
                Share("the file's adapter", 2 * trained),
            ]
            found.append(self._drawn("previews", 1, self._guided, shares))
        return found

    def drawn_work(self) -> list[Work]:
        """Pictures between steps and at the end: the base's once, the adapter's each time."""
        config, play, wanted = self._config, self._play, self._config.preview
        if not wanted.prompts:
            return []
        every = config.train.preview_every
        turns = 1 + (-(-config.train.steps // every) if every else 1)
        rows = 2 if self._guided and not play.base.guided else 1
        one = play.answering(rows, play.size).flops * wanted.steps + play.decoding(1, play.size).flops
        return [Work("previews", one, turns * len(wanted.prompts) * wanted.count)]

    @property
    def _guided(self) -> bool:
        wanted = self._config.preview.guidance
        return (self._play.base.usual_guidance if wanted is None else wanted) > 1

    def proof(self) -> Moment:
        """The file is read back into a fresh base, once the live one was asked and is gone."""
        play = self._play
        trained = play.trained_bytes()
        side = (play.base.latent_side(PROOF_SIDE) * play.base.latent_factor,) * 2
        shares = [*self._weights(packed=1), *self._trained, Share("the file's adapter", 3 * trained)]
        return self._moment("proof", shares, play.answering(len(PROOF_LEVELS), side))

    def _drawn(self, name: str, count: int, guided: bool, shares: Sequence[Share]) -> Moment:
        play = self._play
        rows = 2 * count if guided and not play.base.guided else count
        both = [play.answering(rows, play.size), play.decoding(count, play.size)]
        return self._moment(name, shares, max(both, key=lambda held: held.peak))

    def _weights(self, *, reading: bool = False, training: bool = False, packed: int = 0) -> list[Share]:
        """Of what is resident. What is cached rests in training: the image encoder, and text encoders that nobody asks;
        what is there only while prompts are read is there for `reading`. Where the denoiser computes again and again,
        weights are also in the order of its kernels: for none, one or both directions (`packed`)."""
        play, config = self._play, self._config
        ghost, sizes = play.ghost, dict(play.ghost.sizes)
        denoiser = next(iter(play.base.roots))
        if config.train.offload == "blocks" and not self._on_host:
            blocks = [size_of(block) for block in play.base.blocks]
            sizes[denoiser] -= max(0, sum(blocks) - ON_THE_WAY * max(blocks, default=0))
        away = set() if reading else set(ghost.late)
        if training:
            data = config.pictures
            unbounded = data is not None and not data.center_crop and data.crop_variants == 0
            away = away if play.cached else set()
            resting = not self._on_host or play.from_folder  # a file of all components is not read again
            away |= {"vae"} if resting and not (unbounded or play.base.shown_channels) else set()
            away |= set(sizes) - {denoiser, "vae"} if resting and play.cached else set()
        shares = [Share(name, size) for name, size in sizes.items() if name not in away]
        if self._packs and packed:
            size = size_packed(play.base.denoiser, directions=packed)
            shares.append(Share(f"{denoiser} in the order of kernels", size))
        return shares

    def _moment(self, name: str, shares: Sequence[Share], held: Held | None = None) -> Moment:
        around = self._around
        parts = [*shares, *([Share("kept pictures and captions", self._kept)] if self._kept else [])]
        if held is not None:
            besides = around.kernels + int(around.factor * held.peak + around.reordered * held.heaviest)
            parts += [Share("activations", held.peak), Share("workspace", besides)]
        return Moment(name, tuple(share for share in parts if share.size > 0))
