"""build: a RunConfig becomes a base, a plan and what surrounds it: the one place that knows all the parts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from scumble.adapters.targets import resolve
from scumble.data.check import DataReport, check
from scumble.data.loader import Loader, no_progress, still_batches
from scumble.data.settings import DataSettings
from scumble.data.sources import open_dataset
from scumble.data.split import split
from scumble.errors import ModelError
from scumble.inference.request import Request
from scumble.methods.method import METHODS, Ingredients
from scumble.models.configs import BaseFacts
from scumble.models.family import BaseModel
from scumble.models.loading import describe_base, load_base, load_tokenizers
from scumble.models.precision import dtype_named
from scumble.models.text import Words
from scumble.rng import Streams
from scumble.runs.arithmetic import batches_per_epoch, epochs_of, steps_for_epochs
from scumble.runs.config import RunConfig
from scumble.runs.folder import PREVIEWS
from scumble.training.plan import Plan
from scumble.training.preview import Previewer
from scumble.training.settings import TrainSettings

if TYPE_CHECKING:
    from scumble.data.check import TokenCounter
    from scumble.data.record import Batch

Progress = Callable[[int, int, str], None]

BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}
"""Bytes of a number in the final file."""


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


def check_data(config: RunConfig, *, progress: Progress = no_progress) -> tuple[BaseFacts, DataReport | None]:
    """The base's configuration and every picture and caption (None without pictures), looked at before a model is
    loaded.

    Raises:
        ModelError: there is no such base, or it can't be trained.
        DataError: pictures or captions can't be trained on; all of them are listed.
    """
    facts = describe_base(config.base, revision=config.revision, variant=config.variant)
    if facts.problems:
        raise ModelError("\n".join(facts.problems))
    if config.data is None:
        return facts, None
    report = check(
        config.data,
        resolution=facts.resolution or 512,
        size_multiple=facts.size_multiple or 8,
        count_tokens=_token_counter(config),
        seed=config.train.seed,
        progress=progress,
    )
    report.raise_if_errors()
    return facts, report


def build(config: RunConfig, *, device: torch.device, processes: int = 1) -> Built:
    """Load the base, open the data, inject the adapter and plan the run. Encodes no picture and trains
    nothing.

    Raises:
        ModelError, DataError, NoLayerMatches: a part is not there or does not fit.
    """
    dtype = dtype_named(config.train.precision)

    def load() -> BaseModel:
        return load_base(
            config.base,
            dtype=dtype,
            device=device,
            revision=config.revision,
            variant=config.variant,
            prediction=config.prediction,
        )

    base = load()
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

    if config.data is not None:
        parts = split(
            open_dataset(config.data, seed=seed), config.data.held_out, seed, workers=config.data.workers
        )
        roots = {path.partition(".")[0] for path in resolve(base.roots, config.adapter.targets).layers}
        cached = roots <= {next(iter(base.roots))} and not method.trains_text
        loader = Loader(
            parts.train, base, config.data, batch_size=train.batch, seed=seed, text_embeddings=cached
        )
        loaders.append(loader)
        notes = tuple(parts.notes)
        if len(parts.held_out):
            held_out = still_batches(
                parts.held_out, base, config.data, batch_size=train.batch, cache=loader.cache
            )
    if config.preview.prompts and not train.preview_every:  # pictures at the end are part of every result
        train = train.model_copy(update={"preview_every": train.steps})
    plan = method.plan(
        Ingredients(
            base=base,
            fresh=load,
            adapter=config.adapter,
            targets=config.adapter.targets,
            batches=loaders[0] if loaders else None,
            train=train,
            streams=streams,
            held_out=held_out,
            settings=config.model_dump_json(),
            options=config.options,
            data=config.data,
            open_batches=open_batches,
        )
    )
    plan = dataclasses.replace(plan, facts=_facts(config, plan, loaders, processes))
    notes = (*getattr(base, "notes", ()), *notes)
    return Built(base, plan, train, streams, tuple(loaders), _previewer(config, base), notes)


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
        facts["file bytes"] = BYTES[config.save.dtype] * parameters
    facts |= {
        "trains": ", ".join(trainable.name for phase in plan.phases for trainable in phase.trainables),
        "pictures a step": train.batch * train.accumulate * processes,
        "precision": train.precision,
    }
    for loader in loaders[:1]:
        facts |= {
            "batches an epoch": batches_per_epoch(loader.samples, train.batch, processes),
            "epochs": round(epochs_of(train.steps, loader.samples, **size), 2),
            "shapes": ", ".join(f"{width}x{height}" for height, width in loader.groups),
        }
    return facts


def _token_counter(config: RunConfig) -> TokenCounter | None:
    """Counts tokens by the base's tokenizers; None where it has none of its own (a single file)."""
    words = [
        Words(tokenizer, tokenizer.model_max_length)
        for tokenizer in load_tokenizers(config.base, revision=config.revision)
    ]
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
    assert config.data is not None, f'method "{config.method}" has no pictures to count epochs by'
    dataset = open_dataset(config.data, seed=config.train.seed)
    pictures = sum(record.repeats for record in dataset.records)
    held_out = config.data.held_out
    pictures -= round(held_out * pictures) if held_out < 1 else int(held_out)
    return steps_for_epochs(epochs, pictures, config.train.batch, config.train.accumulate, processes)
