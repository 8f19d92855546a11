"""Slider: a pair of prompts ("a small fox", "a big fox") trains an adapter whose strength is a dial, without pictures.

Legend: x_t noisy latents, t noise level, n neutral prompt, + and - the pair's prompts, s strength, eta how far.

The base alone says what to learn (Gandikota et al., "Concept Sliders", 2023, equations 7 and 8). On noisy latents
that it makes itself, the adapter at strength s = 1 learns to answer to the neutral prompt

    base(x_t, n, t) + eta * (base(x_t, +, t) - base(x_t, -, t)),

and at s = -1, where training goes both ways, the same with -eta. Words to preserve are put into all three prompts,
so that what they mean is in both halves of the pair and falls out of the difference.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from scumble.adapters.adapter import Adapter
from scumble.data.problems import Problem
from scumble.data.record import Batch
from scumble.errors import ConfigError
from scumble.methods.method import Ingredients
from scumble.methods.parts import injected, planned, trainables
from scumble.methods.prior import too_long
from scumble.models.family import BaseModel, Conditioning, Frame
from scumble.models.text import Words
from scumble.rng import Streams
from scumble.settings import Settings
from scumble.training.plan import Phase, Plan
from scumble.training.tensors import sent

if TYPE_CHECKING:
    from scumble.data.settings import DataSettings

TOGETHER = 4
"""Paths made in one pass. A path's numbers must not depend on who asks for it first, so the groups are fixed."""


class SliderSettings(Settings):
    """What the dial changes, as a pair of prompts."""

    positive: str = ""
    """What more strength shows: "a big fox". Needed. `{}` stands for the words to preserve, if there are some."""
    negative: str = ""
    """What less strength shows: "a small fox". Needed."""
    neutral: str = ""
    """What is said of neither: "a fox". Needed."""
    preserve: tuple[str, ...] = ()
    """Words that are put into all three prompts, one after the other: what should stay as it is, and where the dial
    should work ("in a meadow", "in the snow"). They replace `{}`, or follow the prompt."""
    eta: float = Field(1.0, gt=0)
    """How far strength 1 goes, in units of the pair's difference."""
    both_ways: bool = True
    """Learn strength -1 as well, as the opposite; half of the samples each."""
    paths: int = Field(48, ge=1)
    """Ways from noise to a picture that the base makes before training; noisy latents are taken from them."""
    path_steps: int = Field(12, ge=2)
    """Denoising steps of a path: each is a noise level to train on."""
    guidance: float = Field(3.0, ge=0)
    """Classifier-free guidance of the paths; 1 or less turns it off."""
    resolution: int | None = Field(None, ge=8)
    """Side of the pictures in pixels. Unset: the base's own."""

    @model_validator(mode="after")
    def _a_pair(self) -> SliderSettings:
        said = {"positive": self.positive, "negative": self.negative, "neutral": self.neutral}
        absent = [name for name, text in said.items() if not text.strip()]
        if absent:
            raise ValueError(
                f"{' and '.join(absent)} not set: a slider needs three prompts, e.g. "
                'positive = "a big fox", negative = "a small fox", neutral = "a fox"'
            )
        if any("{}" in text for text in said.values()) and not self.preserve:
            raise ValueError('{} stands for the words of preserve, which is empty. Fill it, or remove "{}"')
        for _, positive, negative in self.variants():
            if positive == negative:
                put = " with the words of preserve" if self.preserve else ""
                raise ValueError(
                    f'positive and negative are both "{positive}"{put}: there is no difference to learn. '
                    "Say what more strength should show, and what less."
                )
        return self

    def variants(self) -> list[tuple[str, str, str]]:
        """(neutral, positive, negative), once for each of the words to preserve."""
        return [self.prompts(path) for path in range(max(1, len(self.preserve)))]

    def prompts(self, path: int) -> tuple[str, str, str]:
        """(neutral, positive, negative) of a path; paths take the words to preserve in turn."""
        if not self.preserve:
            return self.neutral, self.positive, self.negative
        words = self.preserve[path % len(self.preserve)]

        def put(prompt: str) -> str:
            if "{}" in prompt:
                return prompt.replace("{}", words)
            return prompt + ("" if words.startswith(",") else " ") + words

        return put(self.neutral), put(self.positive), put(self.negative)


@dataclass(frozen=True)
class Path:
    """One way from noise to a picture, with what the base says on it. N levels."""

    latents: Tensor
    """(N, C, h, w): x_t, from noise on."""
    t: Tensor
    """(N,), in the prediction's units, decreasing."""
    neutral: Tensor
    """(N, C, h, w): base(x_t, n, t)."""
    direction: Tensor
    """(N, C, h, w): base(x_t, +, t) - base(x_t, -, t)."""


class Paths:
    """Batches (see its law in `data.record`) of noisy latents, partially denoised by the base without the adapter.

    Sample `position` is a level of a path, both drawn from `position` alone; a path is made when it is first asked for.
    """

    def __init__(
        self,
        base: BaseModel,
        adapter: Adapter,
        settings: SliderSettings,
        streams: Streams,
        *,
        batch_size: int,
        cached_text: bool,
    ) -> None:
        self.batch_size, self.samples = batch_size, settings.paths * settings.path_steps
        self._base, self._adapter, self._settings, self._streams = base, adapter, settings, streams
        self._cached_text = cached_text
        side = settings.resolution or base.resolution
        if side % base.size_multiple:
            raise ConfigError(
                f"slider.resolution = {side} doesn't suit {base.name}: it must be a multiple of "
                f"{base.size_multiple}."
            )
        self._side = side
        self._order: tuple[int, list[int]] = -1, []
        self._made: dict[int, Path] = {}
        self._texts: dict[str, Conditioning] = {}

    @property
    def fingerprint(self) -> str:
        """sha256 over what decides the paths."""
        text = f"{self._settings.model_dump_json()}/{self._side}/{self._base.fingerprint()}"
        return hashlib.sha256(text.encode()).hexdigest()

    def start(self, number: int, *, process: int = 0, processes: int = 1) -> Iterator[Batch]:
        """See `Batches.start`."""
        while True:
            first = (number * processes + process) * self.batch_size
            yield self.batch(range(first, first + self.batch_size))
            number += 1

    def batch(self, positions: Sequence[int]) -> Batch:
        """The samples of these positions; their latents are x_t."""
        paths = [self.place(position)[0] for position in positions]
        captions = tuple(self._settings.prompts(path)[0] for path in paths)
        self._make(paths)
        return Batch(
            latents=torch.stack(
                [self._made[p].latents[self.place(n)[1]] for p, n in zip(paths, positions, strict=True)]
            ),
            conditioning=Conditioning.cat([self._text(c) for c in captions]) if self._cached_text else None,
            captions=captions,
            frame=Frame.plain(len(paths), self._side, self._side),
            weight=torch.ones(len(paths)),
            keys=tuple(f"path {path}" for path in paths),
            positions=tuple(positions),
        )

    def place(self, position: int) -> tuple[int, int]:
        """(path, level) of a sample: every level of every path once before any again, in an order of its own."""
        round_, index = divmod(position, self.samples)
        if self._order[0] != round_:
            order = list(range(self.samples))
            self._streams.python("slider order", round_).shuffle(order)
            self._order = round_, order
        return divmod(self._order[1][index], self._settings.path_steps)

    def said(self, positions: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """(t, the base's answer to the neutral prompt, the pair's difference) of samples."""
        places = [self.place(position) for position in positions]
        self._make([path for path, _ in places])
        rows = [(self._made[path], level) for path, level in places]
        return (
            torch.stack([path.t[level] for path, level in rows]),
            torch.stack([path.neutral[level] for path, level in rows]),
            torch.stack([path.direction[level] for path, level in rows]),
        )

    @torch.no_grad()
    def _text(self, prompt: str) -> Conditioning:
        if prompt not in self._texts:
            with self._adapter.disabled():
                self._texts[prompt] = self._base.encode_prompts([prompt])
        return self._texts[prompt]

    def _make(self, paths: Sequence[int]) -> None:
        for path in paths:
            if path not in self._made:
                first = path - path % TOGETHER
                group = range(first, min(first + TOGETHER, self._settings.paths))
                self._made.update(zip(group, self._walk(group), strict=True))

    @torch.no_grad()
    def _walk(self, paths: Sequence[int]) -> list[Path]:
        """DDIM (Song et al., 2021) from noise, on levels that differ from path to path, so that all are met."""
        base, settings, count = self._base, self._settings, len(paths)
        latent = self._side // base.latent_factor
        x = self._streams.normal("slider noise", paths, (base.latent_channels, latent, latent)).to(
            base.device
        )
        offset = self._streams.uniform("slider level", paths)
        levels = [torch.full((count,), 1 - 1e-6)]
        levels += [
            (settings.path_steps - 1 - n + offset) / settings.path_steps
            for n in range(1, settings.path_steps)
        ]
        ts = [base.prediction.from_uniform(level).to(base.device) for level in levels]
        texts = [Conditioning.cat([self._text(p) for p in prompts])
                 for prompts in zip(*(settings.prompts(path) for path in paths), strict=True)]  # fmt: skip
        guided = settings.guidance > 1
        if guided:
            with self._adapter.disabled():
                texts.append(base.unconditional(count))
        conditioning = Conditioning.cat(texts).to(base.device, base.dtype)
        frame = Frame.plain(count * len(texts), self._side, self._side)
        kept: list[tuple[Tensor, Tensor, Tensor]] = []
        with self._adapter.disabled():
            for number, t in enumerate(ts):
                times = len(texts)
                answers = base.denoise(
                    x.repeat(times, 1, 1, 1).to(base.dtype), t.repeat(times), conditioning, frame
                )
                neutral, positive, negative, *free = answers.float().chunk(times)
                kept.append((x.cpu(), neutral.cpu(), (positive - negative).cpu()))
                if number + 1 < len(ts):
                    out = free[0] + settings.guidance * (neutral - free[0]) if guided else neutral
                    x0 = base.prediction.clean(x, out, t)
                    x = base.prediction.noisy(x0, self._noise_in(x, x0, t), ts[number + 1])
        return [
            Path(
                latents=torch.stack([x[row] for x, _, _ in kept]),
                t=torch.stack([t[row].cpu() for t in ts]),
                neutral=torch.stack([neutral[row] for _, neutral, _ in kept]),
                direction=torch.stack([direction[row] for _, _, direction in kept]),
            )
            for row in range(count)
        ]

    def _noise_in(self, x: Tensor, x0: Tensor, t: Tensor) -> Tensor:
        """The n of x = signal(t) x0 + noise(t) n."""
        signal, noise = (
            factor(t).to(x.device).view(-1, 1, 1, 1)
            for factor in (self._base.prediction.signal, self._base.prediction.noise)
        )
        return (x - signal * x0) / noise


class SliderObjective(nn.Module):
    """`forward(batch) -> losses (B,)`, fp32: mean |adapter_s(x_t, n, t) - (base(x_t, n, t) + s eta direction)|^2.

    s is 1 for a sample at an even position, and -1 at an odd one where training goes both ways.
    """

    def __init__(self, base: BaseModel, adapter: Adapter, paths: Paths, settings: SliderSettings) -> None:
        super().__init__()
        self.base, self.adapter, self.paths, self.settings = base, adapter, paths, settings
        self.roots = nn.ModuleDict(
            {
                name: root
                for name, root in base.roots.items()
                if any(parameter.requires_grad for parameter in root.parameters())
            }
        )

    def forward(self, batch: Batch) -> Tensor:
        """(B,) losses."""
        device, base = self.base.device, self.base
        t, neutral, direction = (sent(tensor, device) for tensor in self.paths.said(batch.positions))
        strength, batch = sent(self.strengths(batch.positions), device), sent(batch, device)
        # It stays set: gradient checkpointing runs the forward pass again during the backward pass.
        self.adapter.strength = strength
        conditioning = (
            base.encode_prompts(batch.captions) if batch.conditioning is None else batch.conditioning
        )
        answer = base.denoise(
            batch.latents.to(device, base.dtype), t, conditioning.to(device, base.dtype), batch.frame
        )
        target = neutral + strength.view(-1, 1, 1, 1) * self.settings.eta * direction
        return (answer.float() - target).square().flatten(1).mean(1)

    def strengths(self, positions: Sequence[int]) -> Tensor:
        """(B,): 1, or -1 for every second sample."""
        both = self.settings.both_ways
        return torch.tensor([-1.0 if both and position % 2 else 1.0 for position in positions])

    def train(self, mode: bool = True) -> SliderObjective:
        """Switch what trains (an adapter's dropout); the frozen base keeps its own mode. The strength is 1 again."""
        self.training = mode
        self.adapter.strength = 1.0
        for module in self.roots.modules():
            if any(parameter.requires_grad for parameter in module.parameters(recurse=False)):
                module.training = mode
        return self


class Slider:
    """One phase: the adapter, on the base's own predictions."""

    name = "slider"
    settings = SliderSettings
    needs_pictures = False
    trains_text = False
    takes_objective = False

    def check(
        self, options: Settings, data: DataSettings | None, words: Sequence[Words]
    ) -> Sequence[Problem]:
        """See `method.Checks`."""
        assert isinstance(options, SliderSettings)
        return [problem for said in options.variants() for problem in _unheard(said, words)]

    def plan(self, ingredients: Ingredients) -> Plan:
        """See `Method`."""
        base, train, streams = ingredients.base, ingredients.train, ingredients.streams
        settings = ingredients.options
        assert isinstance(settings, SliderSettings)
        adapter = injected(ingredients)
        groups = trainables(adapter, ingredients.learning_rates)
        paths = Paths(
            base,
            adapter,
            settings,
            streams,
            batch_size=train.batch,
            cached_text={group.name for group in groups} <= {next(iter(base.roots))},
        )
        phase = Phase(
            name="slider",
            trainables=groups,
            batches=paths,
            objective=SliderObjective(base, adapter, paths, settings),
            steps=train.steps,
            optimizer=train.optimizer,
            schedule=train.schedule,
        )
        return planned(ingredients, adapter, [phase], {"method": self.name, "noisy latents": paths.samples})


def _unheard(said: tuple[str, str, str], words: Sequence[Words]) -> Iterator[Problem]:
    """What of (neutral, positive, negative) the base does not read, and a pair that is one to it."""
    for name, prompt in zip(("neutral", "positive", "negative"), said, strict=True):
        yield from too_long(f"slider.{name}", prompt, words, error=False)
    _, positive, negative = said
    if words and all(one.alike(positive, negative) for one in words):
        text = (
            f"{positive[:80]!r} and negative {negative[:80]!r} are the same tokens for the base, as far as it reads "
            "them: there is no difference to learn. Shorten them, or say what tells them apart."
        )
        yield Problem("no difference", "slider.positive", text)


slider = Slider()
