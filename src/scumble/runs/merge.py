"""Merging into a base on disk: its weights are read, changed and written one tensor at a time.

Legend: W a weight of the base, s_i and D_i(W) strength and change of adapter i.

    W' = W + sum of s_i D_i(W)      (or what another way to mix makes of the sum), fp32 inside, rounded once to the
                                    dtype in which W is stored

Every other tensor, config and vocabulary is copied bit for bit.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from scumble.adapters.factors import widened
from scumble.adapters.mix import MixSettings, Part, Share, combined_change, method_named, shares_of
from scumble.adapters.state import LayerPath
from scumble.errors import AdapterError, FormatError
from scumble.formats.container import PICKLES
from scumble.formats.keymap import ROOTS
from scumble.formats.stream import rewrite
from scumble.runs.base_files import BaseFiles, open_base
from scumble.runs.rework import RECORD, Ingredient, ingredient, mix_record, refuse_existing
from scumble.tensor_files.lazy_tensors import LazyTensors

STALE = ("modelspec.hash_sha256", "sshs_model_hash", "sshs_legacy_hash")
"""Header entries that speak of the bytes before the merge."""

Progress = Callable[[int, int], None]
"""(tensors changed, of how many)"""


@dataclass(frozen=True)
class MergedBase:
    """A base with adapters in its weights."""

    path: Path
    layers: int
    """Layers that were changed."""
    notes: tuple[str, ...]
    """What a person should know."""


@dataclass(frozen=True)
class Source:
    """An adapter to merge: a file, a folder or a Hub id."""

    path: str | Path
    strength: float = 1.0
    blocks: Mapping[str, float] | None = None
    """As `Part.blocks`."""


def merge_into_base(
    sources: Sequence[Source],
    base: str | Path,
    out: Path,
    *,
    settings: MixSettings | None = None,
    variant: str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> MergedBase:
    """Write `base` with the adapters in its weights to `out`: a folder for a folder, a file for a checkpoint.

    Law: `load_base(out)` predicts what `base` with the adapters attached predicts, to rounding.

    Args:
        base: "picturebook", a folder in diffusers' layout, or a .safetensors checkpoint.
        settings: how several adapters are mixed; "concat" adds their changes. No cut to a rank is made unless
            `settings.rank` asks for one.
        variant: of the weight files of a folder, e.g. "fp16".

    Raises:
        FormatError: an adapter can't be read, or does not fit the base (names what does not); `out` exists.
        ModelError: there is no such base here.
        AdapterError: an adapter holds learned tokens, which no weight can hold; or a merged weight is not finite.
            Nothing is at `out` then.
    """
    settings = settings or MixSettings()
    method_named(settings.method)
    files = open_base(base, variant)
    _refuse_place(files, out, overwrite)
    read = [ingredient(s.path, s.strength, s.blocks, files.shapes) for s in sources]
    parts = [one.part for one in read]
    _refuse_tokens(parts)
    shares = shares_of(parts, files)
    if not shares:
        raise AdapterError("Every strength is 0: the merged base would be the base. Nothing was written.")
    notes = [*_fingerprint_notes(read, files)]
    total = len({(files.spots[path].file, files.spots[path].name) for path in shares})
    done = 0

    def told(_: str) -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total)

    record = {
        **mix_record(settings),
        "work": "merge",
        "into": files.source,
        "of": [one.record for one in read],
    }
    if files.is_folder:
        notes += _write_folder(files, out, shares, settings, record, told)
    else:
        _write_file(files, files.path, out, shares, settings, record, told)
        if any(name.startswith("model_ema.") for name in LazyTensors(files.path)):
            notes.append(
                "The averaged weights in the file (model_ema.) were copied as they are, without the merge."
            )
    return MergedBase(out, len(shares), tuple(notes))


def _refuse_place(files: BaseFiles, out: Path, overwrite: bool) -> None:
    if files.is_folder:
        if out.suffix.lower() == ".safetensors":
            raise FormatError(
                f"{files.source} is a folder, and so is what is made of it; {out} is named like a file."
            )
        source, target = files.path.resolve(), out.resolve()
        if source == target or source in target.parents or target in source.parents:
            raise FormatError(
                f"{out} and the base {files.path} lie inside each other. Write to another place."
            )
        if out.exists() and overwrite and not (out / "model_index.json").is_file():
            raise FormatError(f"{out} is no base (it has no model_index.json): it is not overwritten.")
    elif out.suffix.lower() != ".safetensors":
        raise FormatError(
            f"{files.source} is a single checkpoint, and so is what is made of it: name {out}.safetensors."
        )
    refuse_existing(out, overwrite, [files.path])


def _refuse_tokens(parts: Sequence[Part]) -> None:
    for part in parts:
        if part.state.tokens:
            raise AdapterError(
                f"{part.name} holds learned tokens ({', '.join(part.state.tokens)}), which no weight of a base can "
                "hold: the merged base would not know them. Use the adapter beside the base."
            )


def _fingerprint_notes(read: Sequence[Ingredient], files: BaseFiles) -> list[str]:
    """Which adapters say that they were trained on other weights. Asks for the base's only when one says so."""
    said = {one.file.path.name: mark for one in read if (mark := one.file.state.metadata.base_fingerprint)}
    if not said or not files.fingerprint:
        return []
    return [
        f"{name} was trained on a base with other weights than {files.source}."
        for name, mark in said.items()
        if mark != files.fingerprint
    ]


def _changes(
    files: BaseFiles, file: Path, shares: Mapping[LayerPath, Sequence[Share]], settings: MixSettings
) -> dict[str, Callable[[Tensor], Tensor]]:
    """Tensor name -> what the merge makes of it, for one file. A tensor may hold several layers' weights."""
    layers: dict[str, list[LayerPath]] = {}
    for path in shares:
        spot = files.spots[path]
        if spot.file == file:
            layers.setdefault(spot.name, []).append(path)

    def change(paths: Sequence[LayerPath]) -> Callable[[Tensor], Tensor]:
        def changed(weight: Tensor) -> Tensor:
            total = widened(weight).clone()
            for path in paths:
                spot = files.spots[path]
                files.add(total, spot, combined_change(shares[path], settings).view(spot.shape))
            rounded = total.to(weight.dtype)
            if not bool(torch.isfinite(rounded.float()).all()):
                raise AdapterError(
                    f"Merging would make the weight of {paths[0]!r} infinite or NaN in "
                    f"{str(weight.dtype).removeprefix('torch.')}. Nothing was written. Lower the strength, or check "
                    "the adapter."
                )
            return rounded

        return changed

    return {name: change(paths) for name, paths in layers.items()}


def _write_file(
    files: BaseFiles,
    source: Path,
    target: Path,
    shares: Mapping[LayerPath, Sequence[Share]],
    settings: MixSettings,
    record: Mapping[str, object],
    told: Callable[[str], None],
) -> None:
    header = {k: v for k, v in LazyTensors(source).header.metadata.items() if k not in STALE}
    before = header.get(RECORD)
    header["format"] = "pt"  # diffusers refuses a file that does not say it
    header[RECORD] = json.dumps([*(json.loads(before) if before else []), record], sort_keys=True)
    rewrite(source, target, _changes(files, source, shares, settings), header, told)


def _write_folder(
    files: BaseFiles,
    out: Path,
    shares: Mapping[LayerPath, Sequence[Share]],
    settings: MixSettings,
    record: Mapping[str, object],
    told: Callable[[str], None],
) -> list[str]:
    """Fill a folder beside `out`, then give it that name. Returns notes."""
    changed = {files.spots[path].file for path in shares}
    touched = {file.parent for file in changed}
    left_out = []
    temporary = out.with_name(f".{out.name}.{secrets.token_hex(4)}.tmp")
    try:
        temporary.mkdir(parents=True)
        for file in sorted(files.path.rglob("*")):
            relative = file.relative_to(files.path)
            if not file.is_file() or any(part.startswith(".") for part in relative.parts):
                continue
            if file in changed:
                _write_file(files, file, temporary / relative, shares, settings, record, told)
            elif _holds_old_weights(file, relative, touched, files):
                left_out.append(relative.as_posix())
            else:
                (temporary / relative).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, temporary / relative)
        if out.exists():
            old = out.with_name(f".{out.name}.{secrets.token_hex(4)}.old")
            os.replace(out, old)
            os.replace(temporary, out)
            shutil.rmtree(old)
        else:
            os.replace(temporary, out)
    except OSError as error:
        raise FormatError(f"Can't write {out}: {error.strerror or error}.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    if not left_out:
        return []
    return [f"Left out, because they hold weights without the merge: {', '.join(left_out)}."]


def _holds_old_weights(file: Path, relative: Path, touched: set[Path], files: BaseFiles) -> bool:
    """Whether a copy of `file` would offer the weights before the merge: other variants of a changed component, and
    whole checkpoints in the top folder."""
    weights = file.suffix.lower() in (".safetensors", *PICKLES, ".msgpack", ".onnx", ".h5")
    if not weights or file in files.files:
        return False
    return file.parent in touched or len(relative.parts) == 1 or relative.parts[0] not in _COMPONENTS


_COMPONENTS = (*ROOTS, "vae", "safety_checker", "image_encoder", "feature_extractor")
