"""Streaming: a large safetensors file read, and written again with changes, one tensor at a time."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from scumble.errors import FormatError
from scumble.formats.container import HEADER_LIMIT, replacing
from scumble.formats.stored import bytes_of, code_of
from scumble.tensor_files.dtypes import code_for
from scumble.tensor_files.header import Entry
from scumble.tensor_files.lazy_tensors import LazyTensors

CHUNK = 16 * 2**20
"""Bytes copied at once."""


def rewrite(
    source: Path,
    target: Path,
    changes: Mapping[str, Callable[[Tensor], Tensor]],
    metadata: Mapping[str, str],
    progress: Callable[[str], None] | None = None,
) -> None:
    """Write `source` to `target` with some tensors changed and another metadata; the rest is copied bit for bit.

    One tensor is in memory at a time. `target` appears in one step when all is written.

    Args:
        changes: tensor name -> function of the tensor; dtype and shape must stay.
        progress: told each changed tensor's name when it is written.

    Raises:
        FormatError: `source` is no sound safetensors file, or the disk refuses.
    """
    tensors = LazyTensors(source)
    entries = tensors.header.entries
    unknown = changes.keys() - entries.keys()
    assert not unknown, f"no tensors {sorted(unknown)[:3]} in {source}"
    by_place = sorted(entries, key=lambda name: entries[name].begin)
    with source.open("rb") as old, replacing(target) as new:
        new.write(_header(entries, metadata))
        for name in by_place:
            code, shape, begin, end = entries[name]
            if name not in changes:
                _copy(old, new, tensors.header.start + begin, end - begin, source)
                continue
            changed = changes[name](tensors[name])
            assert code_of(changed) == code and tuple(changed.shape) == shape, name
            new.write(bytes_of(changed))
            if progress is not None:
                progress(name)


def write_streamed(
    target: Path,
    entries: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    values: Callable[[str], Tensor],
    metadata: Mapping[str, str],
) -> None:
    """Write a file of tensors that are made one at a time, when their turn comes. It appears in one step at the end.

    Args:
        entries: tensor name -> (dtype, shape).
        values: the tensor of a name, of that dtype and shape.

    Raises:
        FormatError: the disk refuses, or the header grows too long.
    """
    places: dict[str, Entry] = {}
    position = 0
    # wide dtypes first, so that every tensor is aligned to its item size
    for name in sorted(entries, key=lambda name: (-entries[name][0].itemsize, name)):
        dtype, shape = entries[name]
        code, end = code_for(dtype), position + dtype.itemsize * math.prod(shape)
        assert code is not None, f"safetensors can't hold {dtype}"
        places[name], position = Entry(code, shape, position, end), end
    with replacing(target) as new:
        new.write(_header(places, metadata))
        for name, (code, shape, _, _) in places.items():
            tensor = values(name)
            assert code_of(tensor) == code and tuple(tensor.shape) == shape, name
            new.write(bytes_of(tensor))


def _header(entries: Mapping[str, Entry], metadata: Mapping[str, str]) -> bytes:
    header: dict[str, Any] = {}
    if metadata:
        header["__metadata__"] = {key: metadata[key] for key in sorted(metadata)}
    for name, (code, shape, begin, end) in entries.items():
        header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    if len(text) > HEADER_LIMIT:
        raise FormatError(f"The header would take {len(text)} bytes; at most {HEADER_LIMIT} are written.")
    return len(text).to_bytes(8, "little") + text


def _copy(old: BinaryIO, new: BinaryIO, start: int, count: int, path: Path) -> None:
    old.seek(start)
    while count:
        chunk = old.read(min(CHUNK, count))
        if not chunk:
            raise FormatError(f"{path.name} was cut short while it was being read.")
        new.write(chunk)
        count -= len(chunk)
