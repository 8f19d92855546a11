"""build: a RunConfig becomes a base, a plan and what surrounds it: the one place that knows all the parts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from scumble.adapters.targets import named, resolve
from scumble.data.check import DataReport, check
from scumble.data.loader import Loader, no_progress, still_batches
from scumble.data.problems import Problem
from scumble.data.settings import DataSettings
from scumble.data.sources import open_dataset
from scumble.data.split import split
from scumble.data.together import ALONE, Together
from scumble.errors import ConfigError, ModelError
from scumble.inference.request import Request
from scumble.methods.method import METHODS, Checks, Ingredients
from scumble.methods.text_encoder import TextEncoderSettings
from scumble.models.configs import DENOISERS, BaseFacts
from scumble.models.dtypes import own_dtypes
from scumble.models.family import BaseModel
from scumble.models.heap import give_back
from scumble.models.loading import describe_base, load_base, load_tokenizers
from scumble.models.offload import refuse_offload
from scumble.models.precision import check_precision, dtype_called, dtype_named, find_device
from scumble.models.prepacked import unpack
from scumble.models.probe import check_prediction
from scumble.models.shortage import telling
from scumble.models.text import Words
from scumble.rng import Streams
from scumble.runs.arithmetic import batches_per_epoch, epochs_of, steps_for_epochs
from scumble.runs.config import RunConfig, is_tight
from scumble.runs.drawn import Announce, Artist
from scumble.runs.folder import PREVIEWS
from scumble.training.plan import Plan
from scumble.training.preview import Previewer
from scumble.training.settings import TrainSettings

if TYPE_CHECKING:
    from scumble.data.check import TokenCounter
    from scumble.data.record import Batch

Progress = Callable[[int, int, str], None]

CACHE = ".cache"
"""Of a run's folder: what it makes before training. It stays when the run's results are removed."""

_LOADED_SMALLER = (
    'What needs less: train.precision = "bf16", train.quantization = "int8" or "nf4", and on a GPU train.offload = '
    '"blocks".'
)


@dataclass(frozen=True)
class Built:
    """Everything that the loop is given."""

    base: BaseModel
    plan: Plan
    train: TrainSettings
    streams: Streams
    loaders: tuple[Loader, ...]
    """Every dataset that is trained on; the first is `config.data`."""
    previewer: Previewer | None
    notes: tuple[str, ...] = ()
    """What was assumed of the base and the data, each as a sentence."""


def check_data(
    config: RunConfig, *, progress: Progress = no_progress
) -> tuple[BaseFacts, DataReport | None, tuple[Problem, ...]]:
    """The base's configuration, every picture and caption (None without pictures) and all warnings, before a model is
    loaded.

    Raises:
        ModelError: there is no such base, or it can't be trained.
        ConfigError: the method's settings, which need no pictures, teach this base nothing.
        DataError: pictures or captions can't be trained on; all of them are listed.
    """
    facts = describe_base(config.base, revision=config.revision, variant=config.variant, rest=config.rest)
    if facts.problems:
        raise ModelError("\n".join(facts.problems))
    for dtype in own_dtypes(config.dtypes, facts.components, facts.name).values():
        check_precision(dtype, find_device(config.device))
    refuse_offload(config.train.offload, find_device(config.device))
    _refuse_unscaled(config, DENOISERS)
    method, words = METHODS.get(config.method), _words(config)
    data = config.pictures
    own = method.check(config.options, data, words) if isinstance(method, Checks) else ()
    if data is None:
        errors = [str(problem) for problem in own if problem.error]
        if errors:
            raise ConfigError("\n".join(errors))
        return facts, None, tuple(own)
    report = check(
        data,
        resolution=facts.resolution or 512,
        size_multiple=facts.size_multiple or 8,
        count_tokens=_token_counter(words),
        cut_off=lambda caption: max(
            (cut.lost for one in words for cut in one.truncated([caption])), default=""
        ),
        seed=config.train.seed,
        progress=progress,
    )
    report = dataclasses.replace(report, problems=(*own, *report.problems))
    report.raise_if_errors()
    return facts, report, report.warnings


def build(
    config: RunConfig,
    *,
    device: torch.device,
    together: Together = ALONE,
    announce: Announce | None = None,
) -> Built:
    """Load the base, open the data, inject the adapter and plan the run. Encodes no picture and trains
    nothing.

    `together`: the processes that build the same, who share what has to be drawn and encoded before the run.
    `announce`: entered around what takes long, such as drawing class pictures; None draws none, for a plan that is
    only looked at.

    Raises:
        ModelError, DataError, NoLayerMatches: a part is not there or does not fit.
    """
    refuse_offload(config.train.offload, device, together.count)
    dtype = dtype_named(config.train.precision)

    def load() -> BaseModel:
        with telling(f"{config.base} was loaded", _LOADED_SMALLER):
            base = load_base(
                config.base,
                dtype=dtype,
                device=device,
                revision=config.revision,
                variant=config.variant,
                prediction=config.prediction,
                rest=config.rest,
                dtypes=config.dtypes,
                quantization=config.train.quantization,
                offload=config.train.offload,
            )
        if is_tight(config) or together.count > 1:  # each of several would see the same free memory
            unpack(base.denoiser)
        return base

    base = load()
    check_prediction(base)
    give_back()

    def load_anew() -> BaseModel:
        base.discard()
        give_back()
        return load()

    base.claim(named(config.adapter.targets, base.late))
    streams = Streams(config.train.seed)
    train, seed = config.train, config.train.seed
    method = METHODS.get(config.method)
    loaders: list[Loader] = []
    held_out: Sequence[Batch] = ()
    notes: tuple[str, ...] = ()

    def open_batches(data: DataSettings, *, batch_size: int, text_embeddings: bool) -> Loader:
        dataset = open_dataset(data, seed=seed)
        loaders.append(
            Loader(dataset, base, data, batch_size=batch_size, seed=seed, text_embeddings=text_embeddings)
        )
        return loaders[-1]

    data, options = config.pictures, config.options
    if data is not None:
        parts = split(open_dataset(data, seed=seed), data.held_out, seed, workers=data.workers)
        cached = text_is_cached(config, base)
        loader = Loader(parts.train, base, data, batch_size=train.batch, seed=seed, text_embeddings=cached)
        loaders.append(loader)
        notes = tuple(parts.notes)
        if len(parts.held_out):
            held_out = still_batches(
                parts.held_out,
                base,
                data,
                batch_size=train.batch,
                text_embeddings=cached,
                cache=loader.cache,
                together=together,
            )
    if config.preview.prompts and not train.preview_every:  # pictures at the end are part of every result
        train = train.model_copy(update={"preview_every": train.steps})
    plan = method.plan(
        Ingredients(
            base=base,
            fresh=load_anew,
            adapter=config.adapter,
            targets=config.adapter.targets,
            batches=loaders[0] if loaders else None,
            train=train,
            streams=streams,
            held_out=held_out,
            # where a file lies does not decide what is in it
            settings=config.model_dump_json(exclude={"output"}),
            options=options,
            data=data,
            captions=lambda: loaders[0].captions if loaders else (),
            open_batches=open_batches,
            draw=None if announce is None else Artist(base, kept_in(config), announce, together),
        )
    )
    _refuse_unscaled(config, [name for name, root in base.roots.items() if _trains(root)])
    refuse_dialect(config, plan)
    plan = dataclasses.replace(plan, facts=_facts(config, plan, loaders, together.count))
    notes = (*getattr(base, "notes", ()), *notes)
    return Built(base, plan, train, streams, tuple(loaders), _previewer(config, base), notes)


def text_is_cached(config: RunConfig, base: BaseModel) -> bool:
    """Whether nothing that reads prompts trains, so that each caption is read once.

    Raises:
        NoLayerMatches: a target matches no layer.
    """
    options = config.options
    roots = {path.partition(".")[0] for path in resolve(base.roots, config.adapter.targets).layers}
    also = isinstance(options, TextEncoderSettings) and options.train_text_encoder
    return roots <= {next(iter(base.roots))} and not also and not METHODS.get(config.method).trains_text


def _refuse_unscaled(config: RunConfig, reached: Collection[str]) -> None:
    """Refuse fp16 for a component that gradients reach where nothing keeps small ones from becoming zero.

    Raises:
        ConfigError: one of `reached` has it.
    """
    for name, dtype in config.dtypes.items():
        if name in reached and dtype == "fp16" != config.train.precision:
            raise ConfigError(
                f'dtypes.{name} = "fp16": gradients that pass through it would round to zero, because they are scaled '
                f'up only with train.precision = "fp16" (it is "{config.train.precision}"). Set that, or choose bf16.'
            )


def _trains(root: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in root.parameters())


def refuse_dialect(config: RunConfig, plan: Plan) -> None:
    """Find out before training, not after, that the adapter can't be written as it was asked for.

    Raises:
        ConfigError: `save.dialect` or one of `save.also` can't hold it; the text names those that can.
        CannotRepresent: no dialect can.
    """
    from scumble.formats import CODECS
    from scumble.formats.codec import cannot_represent, dialect_for

    state, wanted = plan.export(), config.save.dialect
    if wanted is None:
        dialect_for(state)
    asked = [("dialect", wanted)] if wanted is not None else []
    for key, name in (*asked, *(("also", name) for name in config.save.also)):
        if CODECS.get(name)().obstacle(state) is not None:
            raise ConfigError(f'save.{key} = "{name}": {cannot_represent(CODECS.get(name)(), state)}')


def _previewer(config: RunConfig, base: BaseModel) -> Previewer | None:
    wanted = config.preview
    if not wanted.prompts:
        return None
    requests = [
        Request(
            prompt=prompt,
            negative=wanted.negative,
            count=wanted.count,
            seed=wanted.seed,
            steps=wanted.steps,
            guidance=wanted.guidance,
            width=size,
            height=size,
        )
        for prompt in wanted.prompts
        for size in [
            config.data.resolution if config.data else None
        ]  # None is the base's own; else pictures as they are trained
    ]
    return Previewer(base, requests, config.output / PREVIEWS)


def _facts(config: RunConfig, plan: Plan, loaders: Sequence[Loader], processes: int) -> Mapping[str, object]:
    """What a person is told before the start: the method's own facts, and the arithmetic of the run."""
    train = config.train
    size = {"batch": train.batch, "accumulate": train.accumulate, "processes": processes}
    facts: dict[str, Any] = dict(plan.facts)
    parameters = facts.get("parameters")
    if isinstance(parameters, int):
        facts["file bytes"] = dtype_called(config.save.dtype).itemsize * parameters
    facts |= {
        "trains": ", ".join(dict.fromkeys(each.name for phase in plan.phases for each in phase.trainables)),
        "pictures a step": train.batch * train.accumulate * processes,
        "precision": train.precision,
        **({"quantization": train.quantization} if train.quantization != "none" else {}),
        **(
            {"dtypes": ", ".join(f"{name} {dtype}" for name, dtype in config.dtypes.items())}
            if config.dtypes
            else {}
        ),
    }
    for loader in loaders[:1]:
        facts |= {
            "batches an epoch": batches_per_epoch(loader.samples, train.batch, processes),
            "epochs": round(epochs_of(train.steps, loader.samples, **size), 2),
            "shapes": ", ".join(f"{width}x{height}" for height, width in loader.groups),
        }
    return facts


def kept_in(config: RunConfig) -> Path:
    """The folder where a run keeps what it makes before training: the data's cache, or a hidden one of its own."""
    return (
        Path(config.data.cache).expanduser() if config.data and config.data.cache else config.output / CACHE
    )


def _words(config: RunConfig) -> list[Words]:
    """The base's tokenizers; none where it has none of its own (a single file)."""
    return [
        Words(tokenizer, tokenizer.model_max_length)
        for tokenizer in load_tokenizers(config.base, revision=config.revision, rest=config.rest)
    ]


def _token_counter(words: Sequence[Words]) -> TokenCounter | None:
    """Counts tokens by the base's tokenizers; None where there are none."""
    if not words:
        return None

    def count(captions: Any) -> tuple[list[int], int]:
        each = [one.counts(captions) for one in words]
        return [max(counts) for counts in zip(*each, strict=True)], min(one.limit for one in words)

    return count


def steps_of_epochs(config: RunConfig, epochs: float, processes: int = 1) -> int:
    """Optimizer steps in which all pictures of `config.data` are shown `epochs` times.

    Raises:
        DataError: there is no such dataset.
    """
    data = config.pictures
    assert data is not None, f'method "{config.method}" has no pictures to count epochs by'
    dataset = open_dataset(data, seed=config.train.seed)
    pictures = sum(record.repeats for record in dataset.records)
    held_out = data.held_out
    pictures -= round(held_out * pictures) if held_out < 1 else int(held_out)
    return steps_for_epochs(epochs, pictures, config.train.batch, config.train.accumulate, processes)
