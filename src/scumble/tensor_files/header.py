"""The header of a .safetensors file, checked for everything that it can lie about.

Such a file is 8 bytes of little-endian header length, the header as JSON, the tensors' bytes without gaps. Importing
this does not import torch.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from scumble.errors import FormatError
from scumble.tensor_files.dtypes import DTYPES

LONGEST = 100 * 2**20
"""Bytes of header that the library accepts."""
_AGAIN = "Download or copy it again."


class Entry(NamedTuple):
    """One tensor, as the header tells it."""

    code: str
    """Its dtype, as headers call it: "F16"."""
    shape: tuple[int, ...]
    begin: int
    """Its first byte, counted from the end of the header."""
    end: int
    """The byte after its last."""


@dataclass(frozen=True)
class Header:
    """Names, dtypes, shapes and places of a file's tensors, and its texts, without the numbers."""

    entries: Mapping[str, Entry]
    """By the tensor's name, in the file's order."""
    metadata: Mapping[str, str]
    start: int
    """Where the tensors' bytes begin."""

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape."""
        return {name: entry.shape for name, entry in self.entries.items()}

    @property
    def size(self) -> int:
        """Bytes of all tensors."""
        return max((entry.end for entry in self.entries.values()), default=0)

    @property
    def parameters(self) -> int:
        """Number of floating-point values (position ids and other integers are not parameters)."""
        return sum(math.prod(one.shape) for one in self.entries.values() if one.code.startswith(("F", "BF")))

    @property
    def dtype(self) -> str:
        """The dtype that holds most values, "" for an empty file."""
        counts: dict[str, int] = {}
        for entry in self.entries.values():
            counts[entry.code] = counts.get(entry.code, 0) + math.prod(entry.shape)
        return max(counts, key=lambda code: counts[code], default="")


def opened(path: Path) -> BinaryIO:
    """The file, to be read.

    Raises:
        FormatError: it can't be opened.
    """
    try:
        return path.open("rb")
    except OSError as error:
        raise FormatError(f"Can't open {path}: {error.strerror or error}.") from error


def read(path: Path) -> Header:
    """The header of the file at `path`; see `parse`.

    Raises:
        FormatError: as `parse`.
    """
    with opened(path) as stream:
        return parse(stream, str(path))


def parse(stream: BinaryIO, name: str, *, longest: int = LONGEST, most: int | None = None) -> Header:
    """The header that `stream`, an open file, begins with; afterwards it stands where the tensors' bytes begin.

    Args:
        name: what messages call the file.
        longest: bytes of header that are accepted.
        most: tensors that are accepted; None is any number.

    Raises:
        FormatError: the file is no safetensors file, is cut short, or its header contradicts itself or is too long. A
            dtype that is not in `DTYPES` is no contradiction.
    """
    size = os.fstat(stream.fileno()).st_size
    if size == 0:
        raise FormatError(f"{name} is empty (0 bytes). {_AGAIN}")
    first = stream.read(8)
    if is_pickle(first):
        raise FormatError(
            f"{name} is a pickle, which can run any program when it is opened, under the name of a safetensors "
            "file; it was not opened. Ask for the real file."
        )
    if first.startswith(b"version"):
        raise FormatError(
            f"{name} is a Git LFS pointer, not the weights. Download the file itself (git lfs pull)."
        )
    if first.lstrip().lower().startswith((b"<!doc", b"<html")):
        raise FormatError(f"{name} is a web page, not the weights. Download the file itself.")
    length = int.from_bytes(first, "little")
    if len(first) < 8 or length < 2 or length > 2**62:
        raise FormatError(
            f"{name} is not a safetensors file ({size} bytes, no valid header length). {_AGAIN}"
        )
    if length > size - 8:
        raise FormatError(
            f"{name} is cut short or not a safetensors file: its header claims {length} bytes, the file has "
            f"{size}. {_AGAIN}"
        )
    if length > longest:
        raise FormatError(f"{name} has a header of {length} bytes; more than {longest} is refused.")
    try:
        header = json.loads(stream.read(length).decode("utf-8"), object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise FormatError(
            f"{name} is not a safetensors file: its header is not valid JSON ({error}). {_AGAIN}"
        ) from error
    if not isinstance(header, dict):
        raise FormatError(f"{name} is not a safetensors file: its header is not a table. {_AGAIN}")
    metadata = header.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise FormatError(f"{name} has metadata that is not text by name. {_AGAIN}")
    if most is not None and len(header) > most:
        raise FormatError(f"{name} holds {len(header)} tensors; no adapter has more than {most}.")
    entries = {tensor: _entry(tensor, entry, name) for tensor, entry in header.items()}
    _check_tiling(entries, size - 8 - length, name)
    return Header(entries, metadata, 8 + length)


def is_pickle(start: bytes) -> bool:
    """Whether a file that begins with these 8 bytes is a pickle, or a zip as `torch.save` writes it.

    A safetensors file begins with the length of its header, which may look like the first two bytes of either;
    but read as such a length, theirs would be beyond any that is accepted.
    """
    if start[:4] == b"PK\x03\x04":
        return True
    protocol = start[:1] == b"\x80" and start[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05")
    return protocol and int.from_bytes(start[:8], "little") >= 2**24


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a name occurs twice")
    return table


def _entry(tensor: str, entry: Any, file: str) -> Entry:
    try:
        code, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        numbers = (*shape, begin, end)
        whole = set(map(type, numbers)) == {int} and min(numbers) >= 0 and max(numbers) < 2**62
    except (KeyError, TypeError, ValueError) as error:
        raise FormatError(
            f"{file}: the header entry of tensor {tensor[:60]!r} is malformed. {_AGAIN}"
        ) from error
    if not whole or len(shape) > 8:
        raise FormatError(f"{file}: tensor {tensor[:60]!r} has an impossible shape or position. {_AGAIN}")
    if not isinstance(code, str):
        raise FormatError(f"{file}: tensor {tensor[:60]!r} has a dtype that is no word. {_AGAIN}")
    known = DTYPES.get(code)
    if begin > end or (known is not None and math.prod(shape) * known.itemsize != end - begin):
        raise FormatError(
            f"{file}: tensor {tensor[:60]!r} of shape {shape} and dtype {code[:20]} can't have {end - begin} bytes. "
            f"{_AGAIN}"
        )
    return Entry(code, shape, begin, end)


def _check_tiling(entries: Mapping[str, Entry], available: int, file: str) -> None:
    """Tensors must cover the bytes after the header once, without gaps."""
    position = 0
    for tensor, entry in sorted(entries.items(), key=lambda item: item[1][2:]):
        if entry.begin != position:
            raise FormatError(
                f"{file}: tensor {tensor[:60]!r} begins at byte {entry.begin}, expected {position}: corrupt header. "
                f"{_AGAIN}"
            )
        position = entry.end
    if position > available:
        raise FormatError(
            f"{file} is cut short: its tensors need {position:,} bytes, {available:,} are there. {_AGAIN}"
        )
    if position < available:
        raise FormatError(
            f"{file} has {available - position:,} bytes that belong to no tensor: corrupt, or not finished. {_AGAIN}"
        )
