"""train: a run from its settings to its folder; what can be refused is refused before the first step."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scumble.errors import ConfigError, HubError, TrainingError
from scumble.runs import hub
from scumble.runs.card import CardFacts, write_card
from scumble.runs.config import RunConfig, is_tight
from scumble.runs.folder import WORDS, Layout, RunFolder
from scumble.runs.load import load
from scumble.runs.toml import dump
from scumble.training.events import HeldOut, Panel

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator

    from scumble.adapters.state import AdapterState
    from scumble.data.check import DataReport
    from scumble.training.events import Sink
    from scumble.training.processes import Processes

WARNINGS_SHOWN = 10
"""Warnings about the data that are printed before a run; `scumble data check` lists all."""


@dataclass(frozen=True)
class RunResult:
    """How a run ended, and where everything is."""

    folder: Path
    adapter: Path | None
    """The trained adapter; when interrupted, the last checkpoint's. None on processes that are not the main
    one."""
    step: int
    """The last optimizer step."""
    reason: str
    """"complete" or "interrupted"."""
    seconds: float
    exit_code: int
    """0, or 130 when interrupted."""
    report: Path
    card: Path
    best: Path | None = None
    """The adapter with the lowest held-out loss, where that was measured."""
    difference: float | None = None
    """Largest difference between the output of the saved file in a fresh base and that of the live model."""
    url: str | None = None
    """Where it was uploaded."""
    push_error: str | None = None
    """Why the upload failed, with the command to try again. The files are all in `folder`."""


def train(
    config: RunConfig | str | Path | None = None,
    *overrides: str,
    resume: str | Path | None = None,
    overwrite: bool = False,
    accept_changes: bool = False,
    hub_token: str | None = None,
    layout: Layout | None = None,
    quiet: bool = False,
    **settings: object,
) -> RunResult:
    """Train an adapter.

        scumble.train("run.toml", "train.steps=200")
        scumble.train(base="picturebook", data={"images": "pictures/"}, output="runs/first", train__steps=200)

    Args:
        config: a RunConfig, a TOML file, or None when `settings` say everything.
        overrides: texts such as "train.steps=200".
        resume: None, "latest", or a checkpoint's folder.
        overwrite: remove what an earlier run left in the output folder.
        accept_changes: continue although settings differ from the checkpoint's.
        hub_token: for `hub.push`; by default the stored one or HF_TOKEN. It is written nowhere.
        layout: what the run's files are called.
        quiet: print nothing.
        settings: sections by name as mappings, or single settings as `train__steps=200`.

    Raises:
        ScumbleError: see `scumble.errors`. Settings, folder, trackers, Hub and data are checked in this order
            before a model is loaded, so that nothing that could have been known fails later.
    """
    config = resolve_config(config, overrides, settings)
    from scumble.models.heap import tight
    from scumble.models.precision import find_device
    from scumble.training.numerics import make_accelerator
    from scumble.training.processes import Processes

    accelerator = make_accelerator(config.train.precision, find_device(config.device))
    with Processes(accelerator, config.train.process_timeout) as processes:
        main = accelerator.is_main_process
        folder = RunFolder(config.output, layout or Layout(adapter=result_name(config)))
        # what lies on the main process's disk decides; the others may have another
        claimed = processes.gather(folder.claim(resume=resume, overwrite=overwrite) if main else None)[0]
        assert claimed is not None
        checkpoint, notes = claimed
        say = _speaker(quiet or not main)
        repo = ""
        with contextlib.ExitStack() as stack:
            sinks = open_trackers(config, folder) if main else []
            stack.callback(_close_all, sinks)
            if main and config.hub.push:
                repo = hub.prepare(
                    config.hub.id or folder.path.resolve().name,
                    write_card(card_facts(config, folder, folder.path.resolve().name)),
                    private=config.hub.private,
                    token=hub_token,
                )
            if main:
                from scumble.runs.afford import within_memory
                from scumble.runs.build import check_data

                with progress("checking", quiet) as told:
                    _, report, warnings = check_data(config, progress=told)
                if report is not None:
                    say_data(report, say)
                else:
                    for problem in warnings:
                        say(f"warning: {problem}")
            settled = within_memory(config, report, say) if main else None
            config = recomputing(config, processes.gather(settled)[0])
            accelerator.wait_for_everyone()
            stack.pop_all()  # from here on the loop closes the sinks
        for note in notes:
            say(note)
        with tight(accelerator.device.type == "cpu" and is_tight(config)):
            return _run(
                config,
                folder,
                checkpoint,
                accelerator,
                processes,
                sinks,
                say,
                repo,
                hub_token,
                overwrite,
                accept_changes,
                quiet,
            )


def recomputing(config: RunConfig, blocks: bool | tuple[str, ...] | None) -> RunConfig:
    """The settings with what is recomputed, as it was settled."""
    if blocks is None or blocks == config.train.gradient_checkpointing:
        return config
    train = config.train.model_copy(update={"gradient_checkpointing": blocks})
    return config.model_copy(update={"train": train})


def resolve_config(
    config: RunConfig | str | Path | None, overrides: tuple[str, ...], settings: Mapping[str, object]
) -> RunConfig:
    """The RunConfig that the arguments of `train` mean.

    Raises:
        ConfigError: settings are wrong; all mistakes are told.
    """
    if isinstance(config, RunConfig):
        if not overrides and not settings:
            return config
        return load(None, overrides, (), **{**config.model_dump(exclude_unset=True), **settings})
    return load(None if config is None else Path(config), overrides, (), **settings)


def _run(
    config: RunConfig,
    folder: RunFolder,
    checkpoint: Path | None,
    accelerator: Accelerator,
    processes: Processes,
    sinks: list[Sink],
    say: Callable[[str], None],
    repo: str,
    hub_token: str | None,
    overwrite: bool,
    accept_changes: bool,
    quiet: bool,
) -> RunResult:
    from scumble.models.heap import give_back
    from scumble.runs.build import build
    from scumble.training.loop import train as loop
    from scumble.training.sinks import SINKS

    main = accelerator.is_main_process

    built = build(
        config,
        device=accelerator.device,
        together=processes,
        announce=lambda what: progress(what, quiet or not main),
    )
    for note in built.notes:
        say(f"note: {note}")
    first = 0 if checkpoint is None else _step_of(checkpoint)
    per_step = config.train.batch * config.train.accumulate * accelerator.num_processes
    visits = (config.train.steps - first) * per_step
    with progress("encoding", quiet or not main) as told:
        for loader in built.loaders:
            few = visits < loader.samples * 8
            loader.prepare(
                first=first * per_step,
                visits=visits if few else None,
                progress=told,
                together=processes,
            )
    built.base.rest(
        pictures=not any(loader.needs_image_encoder for loader in built.loaders),
        text=not any(loader.needs_text_encoder for loader in built.loaders),
    )
    give_back()
    if main:
        if overwrite:
            folder.clear()
        folder.path.mkdir(parents=True, exist_ok=True)
        folder.settings.write_text(dump(config), encoding="utf-8")
        always = ("jsonl", "report") if quiet else ("console", "jsonl", "report")
        sinks = [*(SINKS.get(name)(folder.path) for name in always), *sinks]
    accelerator.wait_for_everyone()
    result = loop(
        built.plan,
        folder.path,
        built.train,
        sinks,
        built.streams,
        accelerator,
        previewer=built.previewer,  # of which the main process makes use; all know when
        resume=checkpoint,
        accept_changes=accept_changes,
        layout=folder.layout,
        processes=processes,
    )
    url = push_error = None
    adapter, complete = result.adapter, result.reason == "complete"
    if main and adapter is not None:
        if complete:
            adapter = save_as(adapter, config)
            for file in save_beside(adapter, config):
                say(f"The same adapter in another dialect: {file}")
            for file, encoders in export_words(adapter).items():
                reader = "pipe.load_textual_inversion of diffusers"
                if encoders > 1:
                    # which reads the rows of one encoder at a time, and may take the new word for a prompt's end
                    steps = f"in {encoders} steps for {reader}, whose pictures differ a little"
                    reader = f"scumble.load_adapter, and {steps}"
                say(f"The new word alone, for {reader}: {file}")
        facts = card_facts(
            config, folder, repo or folder.path.resolve().name, facts=built.plan.facts, adapter=adapter
        )
        folder.card.write_text(write_card(facts), encoding="utf-8")
        for note in built.previewer.notes if built.previewer else ():
            say(f"preview: {note}")
        say(f"Model card: {folder.card}. Report: {folder.report}")
        if repo and complete:
            try:
                url = hub.push(
                    folder.path,
                    repo,
                    private=config.hub.private,
                    token=hub_token,
                    files=folder.published(),
                    say=say,
                )
                say(f"Uploaded: {url}")
            except HubError as error:  # the training itself went well, and is kept
                push_error = str(error)
                say(f"The run is complete; only its upload failed. {error}")
    accelerator.wait_for_everyone()
    return RunResult(
        folder=folder.path,
        adapter=adapter,
        step=result.step,
        reason=result.reason,
        seconds=result.seconds,
        exit_code=result.exit_code,
        report=folder.report,
        card=folder.card,
        best=result.best,
        difference=result.difference,
        url=url,
        push_error=push_error,
    )


def open_trackers(config: RunConfig, folder: RunFolder) -> list[Sink]:
    """The trackers that were asked for. They write nothing before the run begins.

    Raises:
        ConfigError: a tracker's package isn't installed.
    """
    from scumble.training.sinks import SINKS

    places = {"tensorboard": folder.tensorboard}
    wanted = [name for name in config.trackers if name not in ("console", "jsonl", "report")]
    return [SINKS.get(name)(places.get(name, folder.path)) for name in wanted]


def save_as(adapter: Path, config: RunConfig) -> Path:
    """Write the finished file again in the dialect and numbers that were asked for; fp32 in the first dialect
    that holds the adapter is there already. Returns the path of the adapter.

    The new file is read back and compared with the old one, which was proven against the live model; only then
    does it take the old one's place.

    Raises:
        CannotRepresent: the dialect can't hold this adapter; the file stays as it was.
        NotFinite: a number is too large for the dtype; the file stays as it was.
        TrainingError: the file that was written does not hold the adapter; the file stays as it was.
    """
    if config.save.dialect is None and config.save.dtype == "fp32":
        return adapter
    from scumble.formats import read, write
    from scumble.models.precision import dtype_called

    dtype = dtype_called(config.save.dtype)
    found = read(adapter)
    draft = adapter.parent / f".{adapter.stem}.draft"
    shutil.rmtree(draft, ignore_errors=True)
    try:
        written = write(
            found.state, draft / adapter.name, dialect=config.save.dialect or found.dialect, dtype=dtype
        )
        problem = first_difference(found.state, read(written, list(found.state.layers)).state, dtype)
        if problem:
            raise TrainingError(
                f"{adapter.name} written as {config.save.dialect or found.dialect} in {config.save.dtype} and read "
                f"back is not the adapter that was trained: {problem}. {adapter} stays as it was, in fp32; please "
                "report this with that file."
            )
        if written == draft / adapter.name:
            os.replace(written, adapter)
            return adapter
        for path in draft.iterdir():  # a dialect whose adapters are folders
            shutil.rmtree(adapter.parent / path.name, ignore_errors=True)
            os.replace(path, adapter.parent / path.name)
        adapter.unlink()
        return adapter.parent / written.relative_to(draft)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def result_name(config: RunConfig) -> str:
    """What the trained adapter is called in the run's folder: as its readers expect."""
    from scumble.formats.container import WEIGHTS_NAME
    from scumble.methods.method import METHODS

    return str(getattr(METHODS.get(config.method), "file_name", WEIGHTS_NAME))


def export_words(adapter: Path) -> dict[Path, int]:
    """The learned words of the file, each in a file of its own beside it, as diffusers reads them, with the number of
    text encoders that the word has rows for.

    Together with the file itself, whose words diffusers passes over, that is the adapter in two files:
    `pipe.load_lora_weights` and `pipe.load_textual_inversion`. An embedding that is one already is left as it is.
    """
    from dataclasses import replace

    from scumble.formats import read, write
    from scumble.formats.embedding import one_by_one

    state = read(adapter).state
    if not state.tokens or (not state.layers and len(state.tokens) == 1):
        return {}
    return {
        write(replace(alone, metadata=state.metadata), adapter.with_name(name), dialect="embedding"): max(
            len(token.vectors) for token in alone.tokens.values()
        )
        for name, alone in one_by_one(state.tokens).items()
    }


def save_beside(adapter: Path, config: RunConfig) -> tuple[Path, ...]:
    """Write the finished adapter in the other dialects that were asked for, each beside it, read back and compared.

    Raises:
        CannotRepresent: a dialect can't hold this adapter.
        TrainingError: the file that was written does not hold the adapter; it is taken away again.
    """
    if not config.save.also:
        return ()
    from scumble.formats import read, write
    from scumble.models.precision import dtype_called

    dtype = dtype_called(config.save.dtype)
    found, files = read(adapter), []
    for dialect in config.save.also:
        path = adapter.with_name(f"{adapter.stem}_{dialect}{adapter.suffix}")
        written = write(found.state, path, dialect=dialect, dtype=dtype)
        problem = first_difference(found.state, read(written, list(found.state.layers)).state, dtype)
        if problem:
            written.unlink()
            raise TrainingError(
                f"{written.name}, written as {dialect} in {config.save.dtype} and read back, is not the adapter that "
                f"was trained: {problem}. {adapter} is whole; please report this with that file."
            )
        files.append(written)
    return tuple(files)


def first_difference(trained: AdapterState, again: AdapterState, dtype: torch.dtype) -> str | None:
    """Where `again` is not `trained` rounded to `dtype`, in words; None where it is."""
    import torch

    def same(mine: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor]) -> bool:
        return mine.keys() == theirs.keys() and all(
            torch.equal(tensor.to(dtype).double(), theirs[name].double()) for name, tensor in mine.items()
        )

    if trained.layers.keys() != again.layers.keys() or trained.tokens.keys() != again.tokens.keys():
        return f"{len(trained.layers)} layers were written, {len(again.layers)} came back"
    for path, mine in trained.layers.items():
        theirs = again.layers[path]
        if mine.family != theirs.family or not math.isclose(mine.scale, theirs.scale, rel_tol=1e-6):
            return f"{path} was {mine.family} at scale {mine.scale:g}, came back {theirs.family} at {theirs.scale:g}"
        if not same(mine.tensors, theirs.tensors):
            return f"the numbers of {path} differ by more than their rounding"
    for name, token in trained.tokens.items():
        if not same(token.vectors, again.tokens[name].vectors):
            return f"the vectors of {name} differ by more than their rounding"
    return None


def card_facts(
    config: RunConfig,
    folder: RunFolder,
    name: str,
    facts: Mapping[str, object] | None = None,
    adapter: Path | None = None,
) -> CardFacts:
    """What the model card says: before a run what is configured, after it also what its report holds, and what
    `scumble evaluate` left. `adapter`: the file that the card is about; unset, the finished one."""
    from scumble.training.sinks.report import read_record

    facts = dict(facts or {})
    file = adapter or folder.adapter
    pictures = facts.pop("pictures", None)
    common = {
        "name": name,
        "base": config.base,
        "rest": config.rest or "",
        "dataset": config.data.images if config.data else "",
        "prompt": (data.caption or "") if (data := config.pictures) else "",
        "method": config.method,
        "settings": dump(config, changed_only=True),
        "file": file.name,
        "subfolder": _inside(file.parent, folder.path),
        "folder": folder.path,
        "license": config.hub.license or "",
        "word_files": tuple(path.name for path in sorted(folder.path.glob(WORDS)) if path != file),
        **said_by(file),
        "pictures": pictures if isinstance(pictures, int) else None,
        "facts": {
            key: facts[key] for key in ("layers", "parameters", "epochs", "pictures a step") if key in facts
        },
    }
    if not folder.report.exists() or not facts:
        return CardFacts(**common)  # type: ignore[arg-type]
    record = read_record(folder.report)

    def here(picture: str) -> Path:
        """Where a preview is now, also if the folder was moved or copied."""
        own = folder.previews / Path(picture).name
        return own if own.exists() else Path(picture)

    panels = [
        Panel(**{**panel, "base": here(panel["base"]), "adapter": here(panel["adapter"])})
        for panel in (record.previews[-1]["panels"] if record.previews else ())
    ]
    measured = [HeldOut(**row) for row in record.held_out]
    tail = [loss for loss in record.losses[-max(1, len(record.losses) // 10) :] if math.isfinite(loss)]
    return CardFacts(
        **common,  # type: ignore[arg-type]
        panels=panels,
        held_out=measured[-1] if measured else None,
        steps=record.steps[-1] if record.steps else None,
        planned=record.total_steps if record.steps and record.steps[-1] < record.total_steps else None,
        evaluation=_evaluation(folder),
        seconds=sum(record.seconds),
        loss=sum(tail) / len(tail) if tail else None,
    )


def said_by(file: Path) -> dict[str, Any]:
    """What a card must know of the adapter's file to say how it is used; nothing before there is one."""
    from scumble.formats import CODECS, read

    if not file.exists():
        return {}
    found = read(file)
    scales = {layer.scale for layer in found.state.layers.values()}
    in_tensors = any(name.endswith(".alpha") for name in found.used)
    return {
        "scale": scales.pop() if len(scales) == 1 and not in_tensors else 1.0,
        "words": tuple(found.state.tokens),
        "word_encoders": max((len(token.vectors) for token in found.state.tokens.values()), default=1),
        "changes_layers": bool(found.state.layers),
        "diffusers_reads": getattr(CODECS.get(found.dialect), "diffusers_reads", True),
    }


def _inside(path: Path, folder: Path) -> str:
    """`path` as seen from `folder`; empty for the folder itself and for what lies elsewhere."""
    path, folder = path.resolve(), folder.resolve()
    return path.relative_to(folder).as_posix() if path != folder and path.is_relative_to(folder) else ""


def _evaluation(folder: RunFolder) -> dict[str, Any]:
    """What `scumble evaluate` left in the folder.

    Raises:
        ConfigError: it is not JSON.
    """
    if not folder.evaluation.is_file():
        return {}
    try:
        found = json.loads(folder.evaluation.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(
            f"{folder.evaluation} is not JSON ({error}). Remove it, or evaluate the run again."
        ) from error
    return found if isinstance(found, dict) else {}


def say_data(report: DataReport, say: Callable[[str], None]) -> None:
    """What a person should know of the data before the run: its size, three captions with their tokens,
    warnings."""
    from scumble.data.check import summary

    say(f"{report.source}: {summary(report)}")
    for picture in report.pictures[:3]:
        count = "" if picture.tokens is None else f" ({picture.tokens} of {report.token_limit} tokens)"
        say(f"  {picture.key}: {picture.captions[0] or '(no words)'}{count}")
    for problem in report.warnings[:WARNINGS_SHOWN]:
        say(f"  warning: {problem}")
    if len(report.warnings) > WARNINGS_SHOWN:
        say(
            f"  ... and {len(report.warnings) - WARNINGS_SHOWN} more warnings; "
            f"all of them: scumble data check {report.images}"
        )


@contextlib.contextmanager
def progress(what: str, quiet: bool) -> Iterator[Callable[[int, int, str], None]]:
    """A bar on a terminal, nothing elsewhere: (done, total, of what) is told to what the context gives."""
    if quiet or not sys.stderr.isatty():
        yield lambda done, total, name: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total, name: bar.update(
            task, completed=done, total=total, description=f"{what} {name}"
        )


def _speaker(quiet: bool) -> Callable[[str], None]:
    return (lambda text: None) if quiet else (lambda text: print(text, file=sys.stderr))


def _close_all(sinks: list[Any]) -> None:
    for sink in sinks:
        sink.close()


def _step_of(checkpoint: Path) -> int:
    return int("".join(c for c in checkpoint.name if c.isdigit()) or 0)
