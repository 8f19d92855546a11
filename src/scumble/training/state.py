"""TrainState: everything a run needs to go on as if it had never stopped, in a folder that is whole or not
there.

A checkpoint is `checkpoint-000500/` with `adapter.safetensors` (for people: it loads anywhere),
`optimizer.safetensors` (exact weights, optimizer state, running means), `state.json` and `manifest.json`
(sha256 of each). It is written under a hidden name, flushed to the disk and renamed. There is no pickle in
it, and no random-number state: see `rng.Streams`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from scumble.errors import FormatError, ResumeError
from scumble.formats.container import TensorFile
from scumble.formats.container import load as load_tensors
from scumble.formats.container import save as save_tensors

if TYPE_CHECKING:
    from scumble.adapters.state import AdapterState

ADAPTER, OPTIMIZER, STATE, MANIFEST = (
    "adapter.safetensors",
    "optimizer.safetensors",
    "state.json",
    "manifest.json",
)
VERSION = 1


@dataclass(frozen=True)
class Layout:
    """What the files of a run are called."""

    checkpoint: str = "checkpoint-{step:06d}"
    """Folder of one checkpoint; must end in the step."""
    adapter: str = ADAPTER
    """The finished adapter, in the run's folder."""
    best: str = "best"
    """Folder of the adapter with the lowest held-out loss."""

    def checkpoint_folder(self, run: Path, step: int) -> Path:
        return run / self.checkpoint.format(step=step)

    def checkpoints(self, run: Path) -> list[tuple[int, Path]]:
        """(step, folder) of every complete or damaged checkpoint, oldest first. Unfinished ones have another
        name."""
        head, _, tail = self.checkpoint.partition("{")
        pattern = re.compile(re.escape(head) + r"(\d+)" + re.escape(tail.partition("}")[2]))
        found = [(pattern.fullmatch(path.name), path) for path in run.iterdir()] if run.is_dir() else []
        return sorted((int(match[1]), path) for match, path in found if match and path.is_dir())


@dataclass(frozen=True)
class TrainState:
    """A run after `step` optimizer steps."""

    step: int
    phase: str
    """Name of the phase that `step` belongs to."""
    identity: Mapping[str, Any]
    """What a resume must find unchanged; JSON values."""
    parameters: Mapping[str, Tensor]
    """Everything that trains in any phase, exact, fp32."""
    initial: Mapping[str, str]
    """sha256 of each parameter before the first step."""
    optimizer: Mapping[str, Tensor]
    optimizer_values: Mapping[str, Any]
    means: Mapping[str, Tensor] = field(default_factory=dict)
    """Running means of the parameters (EMA); empty when off."""
    scaler: Mapping[str, Any] | None = None
    """Of fp16 loss scaling."""
    skipped_in_a_row: int = 0
    best_step: int | None = None
    best_loss: float | None = None


def save(
    state: TrainState,
    adapter: AdapterState,
    folder: Path,
    limit: int | None = None,
    layout: Layout | None = None,
) -> Path:
    """Write the checkpoint `folder`; then, and only then, remove the oldest beyond `limit`.

    Raises:
        NotFinite: the adapter holds NaN or infinity; nothing is written.
        FormatError: the disk is full, ...; checkpoints from before are untouched.
    """
    from scumble.formats import write

    partial = _hidden(folder)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        write(adapter, partial / ADAPTER)
        save_tensors(TensorFile(_pack(state)), partial / OPTIMIZER)
        _write_json(partial / STATE, _values(state))
        files = {name: _sha256(partial / name) for name in (ADAPTER, OPTIMIZER, STATE)}
        _write_json(partial / MANIFEST, {"version": VERSION, "step": state.step, "sha256": files})
        put_in_place(partial, folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if limit is not None:
        # later steps can only be of an earlier run in this folder: not ours to remove
        ours = [path for step, path in (layout or Layout()).checkpoints(folder.parent) if step <= state.step]
        for old in ours[:-limit]:
            shutil.rmtree(old)
    return folder


def mark(folder: Path) -> str:
    """sha256 that two checkpoints share if they are the same; "" where there is none."""
    manifest = folder / MANIFEST
    return _sha256(manifest) if manifest.is_file() else ""


def load(folder: Path) -> TrainState:
    """Read a checkpoint back.

    Raises:
        ResumeError: something is missing or damaged; names it.
    """
    problem = damage(folder)
    if problem:
        raise ResumeError(f"{folder} can't be resumed from: {problem}")
    values = json.loads((folder / STATE).read_text(encoding="utf-8"))
    try:
        tensors = load_tensors(folder / OPTIMIZER).tensors
    except FormatError as error:
        raise ResumeError(f"{folder} can't be resumed from: {error}") from error
    groups: dict[str, Any] = {"parameters": {}, "optimizer": {}, "means": {}}
    for name, tensor in tensors.items():
        group, _, rest = name.partition("/")
        groups[group][rest] = tensor
    return TrainState(**values, **groups)


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, as the end of a sentence; None when it is whole."""
    if not folder.is_dir():
        return "there is no such folder"
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        version, files = manifest["version"], dict(manifest["sha256"])
    except FileNotFoundError:
        return f"it has no {MANIFEST}, so it was never finished or is not a checkpoint of scumble"
    except (ValueError, KeyError, TypeError) as error:
        return f"its {MANIFEST} is unreadable ({error})"
    if version != VERSION:
        return f"it is of version {version}, and this scumble reads version {VERSION}"
    for name in (ADAPTER, OPTIMIZER, STATE):
        if not (folder / name).is_file():
            return f"{name} is missing"
        if files.get(name) != _sha256(folder / name):
            return f"{name} is damaged (its sha256 is not the one in {MANIFEST})"
    return None


def latest_valid(run: Path, layout: Layout | None = None) -> tuple[Path | None, list[str]]:
    """(The newest whole checkpoint of a run or None, a note on each newer one that is damaged or
    unfinished)."""
    notes = [f"{path.name} was never finished; ignored." for path in unfinished(run)]
    for _, folder in reversed((layout or Layout()).checkpoints(run)):
        problem = damage(folder)
        if problem is None:
            return folder, notes
        notes.append(f"{folder.name} is skipped: {problem}.")
    return None, notes


def unfinished(run: Path) -> list[Path]:
    """What a killed save left behind."""
    return sorted(path for path in run.glob(".*.partial") if path.is_dir()) if run.is_dir() else []


def compare(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """One line for each setting that differs: `optimizer.learning_rate: 0.0001 -> 0.0002`."""
    before, after = _flat(saved), _flat(now)
    return [
        f"{key}: {_shown(before.get(key, 'not there'))} -> {_shown(after.get(key, 'not there'))}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
    ]


def put_in_place(partial: Path, folder: Path) -> None:
    """Rename the finished folder `partial` to `folder`, replacing what is there, so that one of both is
    always whole."""
    _sync(partial)
    if folder.exists():
        old = _hidden(folder.with_name(folder.name + ".replaced"))
        shutil.rmtree(old, ignore_errors=True)
        os.rename(folder, old)
        os.rename(partial, folder)
        shutil.rmtree(old)
    else:
        os.rename(partial, folder)
    _sync(folder.parent)


def _hidden(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.partial")


def _pack(state: TrainState) -> dict[str, Tensor]:
    groups = {"parameters": state.parameters, "optimizer": state.optimizer, "means": state.means}
    return {
        f"{group}/{name}": tensor.detach().to("cpu")
        for group, tensors in groups.items()
        for name, tensor in tensors.items()
    }


def _values(state: TrainState) -> dict[str, Any]:
    tensors = ("parameters", "optimizer", "means")
    return {name: value for name, value in vars(state).items() if name not in tensors}


def _write_json(path: Path, value: Any) -> None:
    with path.open("w", encoding="utf-8") as stream:
        json.dump(value, stream, indent=1, sort_keys=True)
        stream.flush()
        os.fsync(stream.fileno())


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _sync(folder: Path) -> None:
    """Make a rename survive a power cut. Windows can't open a folder; its rename is durable by itself."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, Mapping) and value:
        return {k: v for name, inner in value.items() for k, v in _flat(inner, f"{prefix}{name}.").items()}
    return {prefix.removesuffix("."): value}


def _shown(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."
