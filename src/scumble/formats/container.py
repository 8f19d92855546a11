"""The safetensors container: names, shapes and bytes in a file, read with suspicion and written reproducibly.

Layout: 8 bytes little-endian header length, the header as JSON, the tensors' bytes without gaps. The
library's own writer puts the metadata in random order; two saves of one adapter must be the same bytes here,
so the writer is ours. Nothing is ever unpickled.
"""

from __future__ import annotations

import json
import math
import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from scumble.errors import FormatError

WEIGHTS_NAME = "pytorch_lora_weights.safetensors"
"""The file name that diffusers looks for in a folder."""

HEADER_LIMIT = 16 * 2**20
"""Bytes. The longest real headers (years of tag statistics) stay under 4 MiB."""

NAME_LIMIT = 300
"""Characters in a tensor's name."""

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class TensorFile:
    """Named tensors and string metadata: all that a codec sees of a file."""

    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str] = field(default_factory=dict)
    path: Path | None = None
    """Where it was read from; None for a file that is not written yet."""

    @property
    def label(self) -> str:
        """The file as messages call it."""
        return self.path.name if self.path is not None else "the file"


def find(path: str | Path) -> Path:
    """The one safetensors file that `path` means: itself, or the one in that folder.

    Raises:
        FormatError: there is none, there are several, or it is a pickle.
    """
    path = Path(path)
    if not path.exists():
        raise FormatError(f"There is no file or folder {str(path)!r}.")
    if path.is_dir():
        return _find_in(path)
    if path.suffix.lower() in PICKLES:
        raise FormatError(_pickle_text(path))
    if not path.is_file():
        raise FormatError(f"{path} is not an ordinary file.")
    return path


def _find_in(folder: Path) -> Path:
    if (folder / WEIGHTS_NAME).is_file():
        return folder / WEIGHTS_NAME
    files = sorted(file for file in folder.iterdir() if file.is_file())
    found = [file for file in files if file.suffix.lower() == ".safetensors"]
    if len(found) == 1:
        return found[0]
    if found:
        shown = ", ".join(file.name for file in found[:8]) + (", ..." if len(found) > 8 else "")
        raise FormatError(f"{folder} holds {len(found)} .safetensors files: {shown}. Name the one to read.")
    pickles = [file for file in files if file.suffix.lower() in PICKLES]
    if pickles:
        raise FormatError(_pickle_text(pickles[0]))
    raise FormatError(f"{folder} holds no .safetensors file.")


def _pickle_text(path: Path) -> str:
    return (
        f"{path.name} is a pickle, which can run any program when it is opened; it was not opened. Convert "
        'it where you trust it: python -c "import torch, safetensors.torch as s; '
        f"s.save_file(torch.load('{path.name}', weights_only=True), '{path.stem}.safetensors')\""
    )


def read_header(path: Path) -> TensorFile:
    """Names, dtypes, shapes and metadata, as tensors on the `meta` device. Reads no weights.

    Raises:
        FormatError: the file is no safetensors file, is cut short, or its header contradicts itself.
    """
    with _open(path) as stream:
        entries, metadata, _ = _parse(stream, path)
    tensors = {
        name: torch.empty(shape, dtype=dtype, device="meta") for name, (dtype, shape, _, _) in entries.items()
    }
    return TensorFile(tensors, metadata, path)


def load(path: Path) -> TensorFile:
    """The whole file in memory, on the CPU. Takes as much memory as the file is long.

    Raises:
        FormatError: as `read_header`.
    """
    tensors = {}
    with _open(path) as stream:
        entries, metadata, start = _parse(stream, path)
        for name, (dtype, shape, begin, end) in entries.items():
            content = bytearray(end - begin)
            stream.seek(start + begin)
            if stream.readinto(content) != len(content):  # type: ignore[attr-defined]
                raise FormatError(f"{path.name} was cut short while it was being read, in tensor {name!r}.")
            tensors[name] = torch.frombuffer(content, dtype=dtype).view(shape)
    return TensorFile(tensors, metadata, path)


def _open(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise FormatError(f"Can't open {path}: {error.strerror or error}.") from error


_Entry = tuple[torch.dtype, tuple[int, ...], int, int]


def _parse(stream: BinaryIO, path: Path) -> tuple[dict[str, _Entry], dict[str, str], int]:
    """(entries by name, metadata, where the tensors' bytes start). Checks everything that a header can lie
    about."""
    name = path.name
    size = os.fstat(stream.fileno()).st_size
    if size == 0:
        raise FormatError(f"{name} is empty (0 bytes). Download or copy it again.")
    first = stream.read(8)
    if first[:2] == b"PK" or (first[:1] == b"\x80" and first[1:2] in b"\x02\x03\x04\x05"):
        raise FormatError(_pickle_text(path) + " (It is named like a safetensors file, but is not one.)")
    if first.startswith((b"version", b"<!DOCTY", b"<html", b"<HTML")):
        what = "a Git LFS pointer" if first.startswith(b"version") else "a web page"
        raise FormatError(f"{name} is {what}, not the weights. Download the file itself.")
    length = int.from_bytes(first, "little")
    if len(first) < 8 or length < 2 or length > 2**62:
        raise FormatError(f"{name} is not a safetensors file ({size} bytes, no valid header length).")
    if length > size - 8:
        raise FormatError(
            f"{name} is cut short or not a safetensors file: its header claims {length} bytes, the file has "
            f"{size}."
        )
    if length > HEADER_LIMIT:
        raise FormatError(f"{name} has a header of {length} bytes; more than {HEADER_LIMIT} is refused.")
    try:
        header = json.loads(stream.read(length).decode("utf-8"), object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise FormatError(
            f"{name} is not a safetensors file: its header is not valid JSON ({error})."
        ) from error
    if not isinstance(header, dict):
        raise FormatError(f"{name} is not a safetensors file: its header is not a table.")
    metadata = header.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise FormatError(f"{name} has metadata that is not text by name.")
    entries = {tensor: _entry(tensor, entry, name) for tensor, entry in header.items()}
    _check_tiling(entries, size - 8 - length, name)
    return entries, metadata, 8 + length


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a name occurs twice")
    return table


def _entry(tensor: str, entry: Any, file: str) -> _Entry:
    if len(tensor) > NAME_LIMIT:
        raise FormatError(f"{file}: a tensor's name is {len(tensor)} characters long, {tensor[:60]!r}...")
    try:
        dtype_name, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        whole = all(type(number) is int and 0 <= number < 2**62 for number in (*shape, begin, end))
    except (KeyError, TypeError, ValueError) as error:
        raise FormatError(f"{file}: the header entry of tensor {tensor!r} is malformed.") from error
    if not whole or len(shape) > 8:
        raise FormatError(f"{file}: tensor {tensor!r} has an impossible shape or position.")
    if not isinstance(dtype_name, str) or dtype_name not in _DTYPES:
        raise FormatError(
            f"{file}: tensor {tensor!r} has dtype {str(dtype_name)[:20]!r}. Known: {', '.join(_DTYPES)}."
        )
    dtype = _DTYPES[dtype_name]
    if math.prod(shape) == 0:
        raise FormatError(f"{file}: tensor {tensor!r} is empty, shape {shape}.")
    if math.prod(shape) * dtype.itemsize != end - begin:
        raise FormatError(
            f"{file}: tensor {tensor!r} of shape {shape} and dtype {dtype_name} can't have {end - begin} "
            f"bytes."
        )
    return dtype, shape, begin, end


def _check_tiling(entries: Mapping[str, _Entry], available: int, file: str) -> None:
    """Tensors must cover the bytes after the header once, without gaps."""
    position = 0
    for tensor, (_, _, begin, end) in sorted(entries.items(), key=lambda item: item[1][2]):
        if begin != position:
            raise FormatError(
                f"{file}: tensor {tensor!r} begins at byte {begin}, expected {position}: corrupt header."
            )
        position = end
    if position > available:
        raise FormatError(f"{file} is cut short: its tensors need {position} bytes, {available} are there.")
    if position < available:
        raise FormatError(
            f"{file} has {available - position} bytes that belong to no tensor: corrupt, or not finished."
        )


def to_bytes(file: TensorFile) -> bytes:
    """`file` as safetensors bytes: the same for equal content, in whatever order it was put together.

    Raises:
        FormatError: a dtype or a text that the container can't hold.
    """
    # wide dtypes first, as the library does, so that every tensor is aligned to its item size
    order = sorted(file.tensors, key=lambda name: (-file.tensors[name].dtype.itemsize, name))
    header: dict[str, Any] = {}
    if file.metadata:
        header["__metadata__"] = {key: file.metadata[key] for key in sorted(file.metadata)}
    chunks, position = [], 0
    for name in order:
        tensor = file.tensors[name]
        if tensor.dtype not in _NAMES:
            raise FormatError(f"Tensor {name!r} has dtype {tensor.dtype}, which safetensors can't hold.")
        content = tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [position, position + len(content)],
        }
        chunks.append(content)
        position += len(content)
    try:
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    except (TypeError, UnicodeEncodeError) as error:
        raise FormatError(f"The metadata can't be written as UTF-8 text: {error}.") from error
    text += b" " * (-len(text) % 8)
    if len(text) > HEADER_LIMIT:
        raise FormatError(f"The header would take {len(text)} bytes; at most {HEADER_LIMIT} are written.")
    return b"".join((len(text).to_bytes(8, "little"), text, *chunks))


def save(file: TensorFile, path: Path) -> None:
    """Write `file` to `path` in one step: a reader sees the old file or the whole new one, even after a power
    cut.

    Raises:
        FormatError: the disk is full, the folder is read-only, ...; what was at `path` before is untouched.
    """
    content = to_bytes(file)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise FormatError(
            f"Can't write {path}: {error.strerror or error}. Nothing was changed there."
        ) from error


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":  # Windows can't open a folder; its rename is durable by itself
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
