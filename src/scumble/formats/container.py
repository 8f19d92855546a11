"""The container of an adapter: names, shapes and bytes in files, read with suspicion and written reproducibly.

A safetensors file is 8 bytes of little-endian header length, the header as JSON, the tensors' bytes without
gaps. The library's own writer puts the metadata in random order; two saves of one adapter must be the same
bytes here, so the writer is ours. Pickles are read by `pickles.py`, and never written.

Some adapters are more than one file: peft's have `adapter_config.json` beside the weights, and a folder for
each component of a pipeline; cloneofsimo's have `lora.text_encoder.pt` and `lora.ti.pt` beside `lora.pt`. All
of it is one TensorFile here, in which every name begins with its part's: `unet/base_model.model...`.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import secrets
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

import numpy as np

from scumble.errors import FormatError
from scumble.formats.stored import Stored, bytes_of, code_of
from scumble.tensor_files.dtypes import DTYPES, dtype_of
from scumble.tensor_files.header import Entry, Header, is_pickle, opened, parse

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS_NAME = "pytorch_lora_weights.safetensors"
"""The file name that diffusers looks for in a folder."""

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
"""File names that promise a pickle."""

HEADER_LIMIT = 8 * 2**20
"""Bytes. The longest real headers (years of tag statistics) stay under 4 MiB."""

TENSOR_LIMIT = 20_000
"""An adapter of every layer of SDXL, in the family with the most tensors, has 12,000; a whole base fewer."""

_CONFIG_LIMIT = 2**20

NAME_LIMIT = 300
"""Characters in a tensor's name."""

PEFT_NAME = "adapter_model.safetensors"
"""The file name that peft looks for in a folder."""

PEFT_CONFIG = "adapter_config.json"
"""The file beside it that holds rank and alpha."""


@dataclass(frozen=True)
class TensorFile:
    """Named tensors and string metadata: all that a codec sees of a file. The tensors are torch's, or `Stored`, which
    does for a codec what torch's do."""

    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str] = field(default_factory=dict)
    path: Path | None = None
    """Where it was read from; None for a file that is not written yet."""
    beside: Mapping[str, str] = field(default_factory=dict)
    """Texts of the files that belong to it, by name: adapter_config.json."""
    parts: tuple[str, ...] = ()
    """The parts of an adapter in several files; then every name begins with one of them and a slash."""

    @property
    def label(self) -> str:
        """The file as messages call it."""
        return self.path.name if self.path is not None else "the file"


def join(parts: Mapping[str, TensorFile], path: Path | None = None) -> TensorFile:
    """The parts of an adapter as one file: `"name"` of the part `"unet"` becomes `"unet/name"`."""

    def together(tables: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        return {f"{part}/{name}": value for part, table in tables.items() for name, value in table.items()}

    return TensorFile(
        together({part: file.tensors for part, file in parts.items()}),
        together({part: file.metadata for part, file in parts.items()}),
        path,
        together({part: file.beside for part, file in parts.items()}),
        tuple(parts),
    )


def split(file: TensorFile) -> dict[str, TensorFile]:
    """The inverse of `join`; a file that is not in parts is its only one, `""`."""
    if not file.parts:
        return {"": file}

    def mine(table: Mapping[str, Any], part: str) -> dict[str, Any]:
        start = part + "/"
        return {name.removeprefix(start): value for name, value in table.items() if name.startswith(start)}

    return {
        part: TensorFile(
            mine(file.tensors, part), mine(file.metadata, part), file.path, mine(file.beside, part)
        )
        for part in file.parts
    }


def find(path: str | Path) -> Path:
    """The one adapter that `path` means: a file, the one in that folder, or a folder with a part in each of its
    folders.

    Raises:
        FormatError: there is none, or there are several.
    """
    path = Path(path)
    if not path.exists():
        raise FormatError(f"There is no file or folder {str(path)!r}.")
    if path.is_dir():
        return _find_in(path)
    if not path.is_file():
        raise FormatError(f"{path} is not an ordinary file.")
    return path


def _find_in(folder: Path) -> Path:
    for name in (WEIGHTS_NAME, PEFT_NAME):
        if (folder / name).is_file():
            return folder / name
    if _peft_parts(folder):
        return folder
    files = sorted(file for file in folder.iterdir() if file.is_file())
    for kind, endings in ((".safetensors", (".safetensors",)), ("pickled", PICKLES)):
        found = [file for file in files if file.suffix.lower() in endings]
        # lora.text_encoder.pt is a part of lora.pt
        parts = {part for file in found for part in _beside(file).values() if part != file}
        found = [file for file in found if file not in parts]
        usual = [file for file in found if file.stem in (Path(WEIGHTS_NAME).stem, Path(PEFT_NAME).stem)]
        if len(found) == 1 or usual:
            return (usual or found)[0]
        if found:
            shown = ", ".join(file.name for file in found[:8]) + (", ..." if len(found) > 8 else "")
            raise FormatError(f"{folder} holds {len(found)} {kind} files: {shown}. Name the one to read.")
    raise FormatError(f"{folder} holds no .safetensors file, and none in another format that is read.")


def files_of(path: Path) -> dict[str, Path]:
    """The files of the adapter at `path` (see `find`), by the names of their parts; one file is the part ""."""
    if path.is_dir():
        return _peft_parts(path)
    return _beside(path) or {"": path}


def _peft_parts(folder: Path) -> dict[str, Path]:
    """Folders `unet`, `text_encoder`, `text_encoder_2` with peft's files in each."""
    parts = {}
    for part in ("unet", "text_encoder", "text_encoder_2"):
        for name in (PEFT_NAME, Path(PEFT_NAME).stem + ".bin"):
            if (folder / part / name).is_file() and part not in parts:
                parts[part] = folder / part / name
    return parts


def _beside(path: Path) -> dict[str, Path]:
    """What cloneofsimo's tool reads together with `lora.pt`; empty when there is nothing beside it."""
    if path.suffix.lower() != ".pt" or path.stem.endswith((".text_encoder", ".ti")):
        return {}
    near = {
        "text_encoder": path.with_name(f"{path.stem}.text_encoder{path.suffix}"),
        "ti": path.with_name(f"{path.stem}.ti{path.suffix}"),
    }
    found = {part: file for part, file in near.items() if file.is_file()}
    return {"unet": path, **found} if found else {}


def read_header(path: Path) -> TensorFile:
    """Names, dtypes, shapes and metadata, as tensors without values. Reads no weights of safetensors files; pickles
    have no header and are read whole.

    Raises:
        FormatError: the file is no safetensors file, is cut short, or its header contradicts itself.
    """
    return _gather(path, _read_header)


def load(path: Path, look: Callable[[TensorFile], None] | None = None, *, stored: bool = False) -> TensorFile:
    """The whole adapter in memory, on the CPU. Takes as much memory as its files are long: the tensors of one file
    share theirs.

    `look` is shown what `read_header` gives before any weight is read, and may raise. `stored`: the tensors of
    safetensors files are `Stored`, so that torch is imported only if somebody computes.

    Raises:
        FormatError: as `read_header`.
    """
    if look is not None and set(files_of(path)) == {""}:
        return _load(path, look, stored=stored)
    if look is not None:
        look(read_header(path))
    return _gather(path, partial(_load, stored=stored))


def _gather(path: Path, read_one: Callable[[Path], TensorFile]) -> TensorFile:
    files = files_of(path)
    if set(files) == {""}:
        return read_one(path)
    return join({part: read_one(file) for part, file in files.items()}, path)


def _read_header(path: Path) -> TensorFile:
    if _is_pickle(path):
        return _without_values(_load(path))
    with opened(path) as stream:
        header = _header(stream, path)
    return TensorFile(_Shells(header.entries), header.metadata, path, _sidecars(path))


def _load(
    path: Path, look: Callable[[TensorFile], None] | None = None, *, stored: bool = False
) -> TensorFile:
    if _is_pickle(path):
        from scumble.formats.pickles import load_pickle

        tensors, texts = load_pickle(path)
        file = TensorFile(tensors, texts, path, _sidecars(path))
        if look is not None:
            look(_without_values(file))
        return file
    with opened(path) as stream:
        header = _header(stream, path)
        shells = TensorFile(_Shells(header.entries), header.metadata, path, _sidecars(path))
        if look is not None:
            look(shells)
        size = header.size
        content = np.empty(size, np.uint8) if stored else _aligned(size)
        if stream.readinto(content) != size:  # type: ignore[attr-defined]
            raise FormatError(f"{path.name} was cut short while it was being read.")
    return replace(shells, tensors=(_parts if stored else _views)(content, header.entries))


class _Shells(Mapping[str, "Tensor"]):
    """Tensors without values, each made when it is asked for: names alone tell most of a file."""

    def __init__(self, entries: Mapping[str, Entry]) -> None:
        self._entries = entries

    def __getitem__(self, name: str) -> Tensor:
        code, shape, _, _ = self._entries[name]
        return cast("Tensor", Stored(code, shape, None))

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


def _without_values(file: TensorFile) -> TensorFile:
    return replace(file, tensors={name: tensor.to("meta") for name, tensor in file.tensors.items()})


def _aligned(size: int) -> np.ndarray[Any, Any]:
    """So many bytes where torch would put them, at a multiple of 64."""
    import torch

    content: np.ndarray[Any, Any] = torch.empty(size, dtype=torch.uint8, device="cpu").numpy()
    return content


def _parts(content: np.ndarray[Any, Any], entries: Mapping[str, Entry]) -> dict[str, Tensor]:
    """The tensors that lie in `content`, as they are stored."""
    return {
        name: cast("Tensor", Stored(code, shape, content[begin:end]))
        for name, (code, shape, begin, end) in entries.items()
    }


def _views(numbers: np.ndarray[Any, Any], entries: Mapping[str, Entry]) -> dict[str, Tensor]:
    """The tensors that lie in `numbers`; copies where foreign writers put them at addresses that theirs can't have."""
    import torch

    content = torch.from_numpy(numbers)
    found: dict[str, Tensor] = {}
    by_place = sorted(entries.items(), key=lambda item: item[1][2])
    for code, alike in groupby(by_place, key=lambda item: item[1][0]):
        names, places = zip(*alike, strict=True)
        dtype = dtype_of(code)
        begin, end = places[0][2], places[-1][3]
        mine = content[begin:end]
        whole = (mine.clone() if begin % dtype.itemsize else mine).view(dtype)
        parts = whole.split([math.prod(shape) for _, shape, _, _ in places])
        found |= {name: part.view(place[1]) for name, part, place in zip(names, parts, places, strict=True)}
    return {name: found[name] for name in entries}


def _is_pickle(path: Path) -> bool:
    """By name and content: nothing that is called .safetensors is ever unpickled."""
    if path.suffix.lower() not in PICKLES:
        return False
    with opened(path) as stream:
        return is_pickle(stream.read(8))


def _sidecars(path: Path) -> dict[str, str]:
    """The texts that belong to the file at `path`."""
    config = path.with_name(PEFT_CONFIG)
    if path.stem != Path(PEFT_NAME).stem or not config.is_file():
        return {}
    with opened(config) as stream:
        content = stream.read(_CONFIG_LIMIT + 1)
    if len(content) > _CONFIG_LIMIT:
        raise FormatError(f"{config} is longer than {_CONFIG_LIMIT} bytes; no configuration of peft is.")
    try:
        return {PEFT_CONFIG: content.decode("utf-8")}
    except UnicodeDecodeError as error:
        raise FormatError(f"{config} is not text: {error}.") from error


def _header(stream: BinaryIO, path: Path) -> Header:
    """The header that `stream`, the open file at `path`, begins with, within the limits of an adapter.

    Raises:
        FormatError: it is no sound safetensors file, or no adapter is like that.
    """
    file = path.name
    header = parse(stream, file, longest=HEADER_LIMIT, most=TENSOR_LIMIT)
    for tensor, entry in header.entries.items():
        if len(tensor) > NAME_LIMIT:
            raise FormatError(f"{file}: a tensor's name is {len(tensor)} characters long, {tensor[:60]!r}...")
        if entry.code not in DTYPES:
            raise FormatError(
                f"{file}: tensor {tensor!r} has dtype {entry.code[:20]!r}. Known: {', '.join(DTYPES)}."
            )
        if 0 in entry.shape:
            raise FormatError(f"{file}: tensor {tensor!r} is empty, shape {entry.shape}.")
    return header


def to_bytes(file: TensorFile) -> bytes:
    """`file` as safetensors bytes: the same for equal content, in whatever order it was put together.

    Raises:
        FormatError: a dtype or a text that the container can't hold.
    """
    return b"".join(pieces(file))


def pieces(file: TensorFile) -> list[bytes | memoryview]:
    """What `to_bytes` is made of: the header's length, the header, the tensors' bytes, which are not copied.

    Raises:
        FormatError: as `to_bytes`.
    """
    # wide dtypes first, as the library does, so that every tensor is aligned to its item size
    order = sorted(file.tensors, key=lambda name: (-file.tensors[name].itemsize, name))
    header: dict[str, Any] = {}
    if file.metadata:
        header["__metadata__"] = {key: file.metadata[key] for key in sorted(file.metadata)}
    chunks: list[bytes | memoryview] = []
    position = 0
    for name in order:
        tensor = file.tensors[name]
        code = code_of(tensor)
        if code is None:
            raise FormatError(f"Tensor {name!r} has dtype {tensor.dtype}, which safetensors can't hold.")
        content = bytes_of(tensor)
        header[name] = {
            "dtype": code,
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
    return [len(text).to_bytes(8, "little"), text, *chunks]


def save_text(text: str, path: Path) -> None:
    """Write `text` to `path` in one step, as `save` does.

    Raises:
        FormatError: as `save`.
    """
    with replacing(path) as stream:
        stream.write(text.encode("utf-8"))


def save(file: TensorFile, path: Path) -> None:
    """Write `file` to `path` in one step: a reader sees the old file or the whole new one, even after a power
    cut.

    Raises:
        FormatError: the disk is full, the folder is read-only, ...; what was at `path` before is untouched.
    """
    content = pieces(file)
    with replacing(path) as stream:
        stream.writelines(content)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A stream whose bytes become the file `path` in one step when the block ends well.

    Raises:
        FormatError: the disk is full, the folder is read-only, ...; what was at `path` before is untouched then, as
            after any other error in the block.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise FormatError(
                f"Can't write {path}: {error.strerror or error}. Nothing was changed there."
            ) from error
        raise


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":  # Windows can't open a folder; its rename is durable by itself
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
