"""Rework on disk: adapter files in, one adapter file out, with a record in it of what it was made from."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from scumble.adapters.state import AdapterState
from scumble.errors import FormatError
from scumble.formats.codec import Layers, Read, read, write
from scumble.formats.inspection import digest_of
from scumble.inference.find_base import locate

if TYPE_CHECKING:
    import torch

    from scumble.adapters.mix import MixSettings, Part

RECORD = "scumble.made_from"
"""Header entry of a file that was made from others: JSON, newest work last."""


@dataclass(frozen=True)
class Ingredient:
    """An adapter's file, as it takes part in a mix."""

    file: Read
    sha256: str
    strength: float = 1.0
    blocks: Mapping[str, float] | None = None

    @property
    def part(self) -> Part:
        """What `mix` takes."""
        from scumble.adapters.mix import Part

        return Part(self.file.state, self.strength, dict(self.blocks or {}), self.file.path.name)

    @property
    def record(self) -> dict[str, object]:
        """What the made file says of it."""
        said: dict[str, object] = {
            "file": self.file.path.name,
            "sha256": self.sha256,
            "strength": self.strength,
        }
        return said | ({"blocks": dict(self.blocks)} if self.blocks else {})


def ingredient(
    path: str | Path,
    strength: float = 1.0,
    blocks: Mapping[str, float] | None = None,
    layers: Layers | None = None,
) -> Ingredient:
    """Read an adapter (a file, a folder, or a Hub id) for rework; `layers` are those of a base, if one is at hand.

    Raises:
        FormatError: as `formats.read`.
    """
    found = read(locate(path), layers)
    return Ingredient(found, digest_of(found.path), strength, blocks)


def dtype_called(name: str | None) -> torch.dtype | None:
    """The dtype of a file by its name; None for None.

    Raises:
        UnknownName: there is none called so.
    """
    if name is None:
        return None
    from scumble.models import precision

    return precision.dtype_called(name)


def refuse_existing(out: Path, overwrite: bool, inputs: Sequence[Path] = (), option: str = "--out") -> None:
    """Refuse to write over anything that is there, before any work is done. `option` is the one that names `out`.

    Raises:
        FormatError: `out` exists and `overwrite` is False; or it is one of `inputs`.
    """
    if any(out.exists() and path.exists() and out.samefile(path) for path in inputs):
        raise FormatError(f"{out} is what is being read. Write to another place.")
    if out.exists() and not overwrite:
        raise FormatError(f"{out} exists. Add --overwrite to replace it, or choose another {option}.")


def save(
    state: AdapterState,
    out: Path,
    *,
    dialect: str | None = None,
    dtype: torch.dtype | None = None,
    work: Mapping[str, object],
    sources: Sequence[Ingredient] = (),
) -> Path:
    """Write what was made, with a record of how.

    Args:
        dtype: of the tensors; None takes the widest among the sources.
        work: what was done, e.g. {"work": "resize", "rank": 4}.
        sources: what it was made from.

    Raises:
        CannotRepresent, NotFinite, FormatError: as `formats.write`.
    """
    entry = {**work, "of": [source.record for source in sources]}
    extra = {**state.metadata.extra, RECORD: json.dumps([*_records(sources), entry], sort_keys=True)}
    state = replace(state, metadata=replace(state.metadata, extra=extra))
    if dtype is None and sources:
        dtype = widest(source.file.state for source in sources)
    return write(state, out, dialect, dtype)


def mix_record(settings: MixSettings) -> dict[str, object]:
    """The settings of a mix as its file tells them."""
    return {"work": "mix", **settings.model_dump(exclude_defaults=True), "method": settings.method}


def widest(states: Iterable[AdapterState]) -> torch.dtype | None:
    """The widest dtype in which these adapters are stored, at least 16 bits; None of nothing."""
    import torch

    found: torch.dtype | None = None
    for state in states:
        for layer in state.layers.values():
            for tensor in layer.tensors.values():
                # what was made of 8-bit floats is no longer one of their few numbers
                dtype = torch.float16 if tensor.dtype.itemsize == 1 else tensor.dtype
                found = dtype if found is None else torch.promote_types(found, dtype)
    return found


def _records(sources: Sequence[Ingredient]) -> list[object]:
    """What the sources say of their own making, each once."""
    told: list[object] = []
    for source in sources:
        text = source.file.state.metadata.extra.get(RECORD)
        if text is None:
            continue
        try:
            entries = json.loads(text)
        except ValueError as error:
            raise FormatError(
                f"{source.file.path.name}: the header entry {RECORD!r} is not valid JSON."
            ) from error
        told += [
            entry for entry in (entries if isinstance(entries, list) else [entries]) if entry not in told
        ]
    return told
