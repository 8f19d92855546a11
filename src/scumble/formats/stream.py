"""Streaming: a large safetensors file read, and written again with changes, one tensor at a time."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from scumble.errors import FormatError
from scumble.formats.container import HEADER_LIMIT, _open, _parse, replacing
from scumble.formats.stored import bytes_of, code_of
from scumble.header_dtypes import code_for, dtype_of

CHUNK = 16 * 2**20
"""Bytes copied at once."""


@dataclass(frozen=True)
class Layout:
    """Where everything lies in a file."""

    entries: Mapping[str, tuple[str, tuple[int, ...], int, int]]
    """Tensor name -> (dtype as headers call it, shape, first byte, last byte + 1), bytes counted from `start`; in the
    file's order."""
    metadata: Mapping[str, str]
    start: int
    """Where the tensors' bytes begin."""


def read_layout(path: Path) -> Layout:
    """The header, with the places of all tensors. Reads no weights.

    Raises:
        FormatError: it is no sound safetensors file.
    """
    with _open(path) as stream:
        return Layout(*_parse(stream, path))


class LazyTensors(Mapping[str, Tensor]):
    """A file's tensors by name, each read from disk when it is asked for, and kept by nobody."""

    def __init__(self, path: Path) -> None:
        """Reads the header only.

        Raises:
            FormatError: it is no sound safetensors file.
        """
        self.path = path
        self.layout: Layout = read_layout(path)

    @property
    def metadata(self) -> Mapping[str, str]:
        """The header's own entries."""
        return self.layout.metadata

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, without reading it."""
        return self.layout.entries[name][1]

    def __getitem__(self, name: str) -> Tensor:
        self.layout.entries[name]  # KeyError before the file is opened
        with self.path.open("rb") as stream:
            return _read(stream, self.path, self.layout, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.layout.entries)

    def __len__(self) -> int:
        return len(self.layout.entries)


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
    layout = read_layout(source)
    unknown = changes.keys() - layout.entries.keys()
    assert not unknown, f"no tensors {sorted(unknown)[:3]} in {source}"
    by_place = sorted(layout.entries, key=lambda name: layout.entries[name][2])
    with source.open("rb") as old, replacing(target) as new:
        new.write(_header(layout, metadata))
        for name in by_place:
            code, shape, begin, end = layout.entries[name]
            if name not in changes:
                _copy(old, new, layout.start + begin, end - begin, source)
                continue
            changed = changes[name](_read(old, source, layout, name))
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
    places, position = {}, 0
    # wide dtypes first, so that every tensor is aligned to its item size
    for name in sorted(entries, key=lambda name: (-entries[name][0].itemsize, name)):
        dtype, shape = entries[name]
        code, end = code_for(dtype), position + dtype.itemsize * math.prod(shape)
        assert code is not None, f"safetensors can't hold {dtype}"
        places[name], position = (code, shape, position, end), end
    with replacing(target) as new:
        new.write(_header(Layout(places, metadata, 0), metadata))
        for name, (code, shape, _, _) in places.items():
            tensor = values(name)
            assert code_of(tensor) == code and tuple(tensor.shape) == shape, name
            new.write(bytes_of(tensor))


def _header(layout: Layout, metadata: Mapping[str, str]) -> bytes:
    header: dict[str, Any] = {}
    if metadata:
        header["__metadata__"] = {key: metadata[key] for key in sorted(metadata)}
    for name, (code, shape, begin, end) in layout.entries.items():
        header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    if len(text) > HEADER_LIMIT:
        raise FormatError(f"The header would take {len(text)} bytes; at most {HEADER_LIMIT} are written.")
    return len(text).to_bytes(8, "little") + text


def _read(stream: BinaryIO, path: Path, layout: Layout, name: str) -> Tensor:
    code, shape, begin, end = layout.entries[name]
    content = bytearray(end - begin)
    stream.seek(layout.start + begin)
    if stream.readinto(content) != len(content):  # type: ignore[attr-defined]
        raise FormatError(f"{path.name} was cut short while it was being read, in tensor {name!r}.")
    return torch.frombuffer(content, dtype=dtype_of(code)).view(shape)


def _copy(old: BinaryIO, new: BinaryIO, start: int, count: int, path: Path) -> None:
    old.seek(start)
    while count:
        chunk = old.read(min(CHUNK, count))
        if not chunk:
            raise FormatError(f"{path.name} was cut short while it was being read.")
        new.write(chunk)
        count -= len(chunk)
