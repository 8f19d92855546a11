"""Pickled files: tensors out of `.bin`, `.pt` and `.ckpt`, by the reader of torch that can't run code.

`torch.load(weights_only=True)` builds tensors and plain containers and nothing else, but for torch's ParameterDict,
in which A1111 once kept an embedding: a table as well, of which only the parameters are read. Before it is asked, the
file must be a zip as `torch.save` writes it, not a bomb; after it, what was built must be no larger than the
file. What comes out is named like the tensors of a safetensors file: a table's entries by their keys, those of
a table within by both keys with a dot between, those of a list by `[0]`, `[1]`, ...; texts and numbers become
metadata.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from scumble.errors import FormatError

_SLACK = 16 * 2**20
"""Bytes that small files may unfold to."""
_UNFOLDING = 4
"""How many times its size a larger file may unfold to: fp16 weights deflate by a few per cent."""
_NAMES = 100_000
_WORDS, _WORDS_EACH = 2**16, 2**10
"""Bytes of names and structure: of a whole file, and more for each tensor, which needs about 300."""
_LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
"""How files of `torch.save` began before torch 1.6: a number, pickled."""


def load_pickle(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors by name, texts by name) of the file at `path`, on the CPU, contiguous, sharing no memory.

    Raises:
        FormatError: it holds anything but tensors and plain values (a program, for instance: it is not run),
            is damaged, or unfolds to far more than its size.
    """
    size = path.stat().st_size
    limit = max(_SLACK, _UNFOLDING * size)
    _check_container(path, limit)
    try:
        with _parameter_tables():
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (
        Exception
    ) as error:  # torch raises whatever its unpickler, zip reader or allocator happens to raise
        raise FormatError(_refusal(path, error)) from error
    tensors: dict[str, Tensor] = {}
    texts: dict[str, str] = {}
    for name, value in _walk(content, "", path):
        if name in tensors or name in texts:
            raise FormatError(f"{path.name} holds two entries called {name[:120]!r}.")
        if isinstance(value, Tensor):
            limit -= _bytes(path, name, value)
            if limit < 0:
                raise FormatError(
                    f"{path.name} has {size} bytes, and its tensors claim many times that. It was not used."
                )
            tensors[name] = value.detach().clone(memory_format=torch.contiguous_format)
        else:
            texts[name] = value
        if len(tensors) + len(texts) > _NAMES:
            raise FormatError(f"{path.name} holds more than {_NAMES} entries; no adapter does.")
    return tensors, texts


def _check_container(path: Path, limit: int) -> None:
    """Refuse what must not even be handed to torch."""
    with path.open("rb") as stream:
        start = stream.read(len(_LEGACY))
    if start[:2] != b"PK":
        if start != _LEGACY:
            raise FormatError(
                f"{path.name} is a bare pickle and no file of torch: opening it could run a program, so it was "
                "not opened. Ask for it as .safetensors."
            )
        major, minor = (int(part) for part in torch.__version__.split(".")[:2])
        if (major, minor) < (2, 6):  # its restricted reader could be led around by an old kind of file
            raise FormatError(
                f"{path.name} was saved by torch before 1.6, which torch {torch.__version__} can't read "
                "safely. Use torch 2.6 or newer, or a .safetensors file."
            )
        return
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise FormatError(f"{path.name} is cut short or damaged ({error}). Download it again.") from error
    storages = sum("/data/" in entry.filename for entry in entries)
    words = sum(entry.file_size for entry in entries if entry.filename.endswith("data.pkl"))
    if (
        words > _WORDS + _WORDS_EACH * storages
    ):  # the reader is slow, and what it reads may be made to be slower
        raise FormatError(
            f"{path.name} describes {storages} tensors in {words} bytes, many times more than it takes. It was "
            "not opened."
        )
    if len(entries) > _NAMES or sum(entry.file_size for entry in entries) > limit:
        raise FormatError(
            f"{path.name} would unfold to {sum(entry.file_size for entry in entries)} bytes. It was not opened."
        )


def _parameter_tables() -> AbstractContextManager[object]:
    """Lets the restricted reader build a ParameterDict, which is made of what that reader allows and runs nothing."""
    allow = getattr(
        torch.serialization, "safe_globals", None
    )  # since torch 2.5; before, such files are refused
    return nullcontext() if allow is None else allow([nn.ParameterDict])  # type: ignore[no-any-return]


def _refusal(path: Path, error: Exception) -> str:
    reason = " ".join(str(error).split())
    if "weights_only" in reason or "Unsupported" in reason or "GLOBAL" in reason:
        return (
            f"{path.name} is a pickle that holds more than tensors: opening it could run a program, so it was "
            "not used, and nothing of it was run. Ask for it as .safetensors, or convert it where you trust it."
        )
    return f"{path.name} is damaged, or no file of torch ({type(error).__name__}: {reason[:160]})."


def _walk(value: Any, name: str, path: Path, depth: int = 0) -> Iterator[tuple[str, Tensor | str]]:
    """(name, tensor or text) of everything in `value`."""
    if depth > 8:
        raise FormatError(f"{path.name} nests tables in tables, more than 8 deep; no adapter does.")
    if isinstance(value, Tensor):
        yield name or "[0]", value
    elif type(value) is nn.ParameterDict:
        yield from _walk(vars(value).get("_parameters", {}), name, path, depth + 1)
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            if not isinstance(key, str | int):
                raise FormatError(f"{path.name} has an entry that is called by a {type(key).__name__}.")
            # trainers that save more than the weights put those under this word
            inside = "" if key == "state_dict" and not name else f"{name}.{key}" if name else str(key)
            yield from _walk(inner, inside, path, depth + 1)
    elif isinstance(value, list | tuple) and any(isinstance(inner, Tensor) for inner in value):
        for number, inner in enumerate(value):
            yield from _walk(inner, f"{name}[{number}]", path, depth + 1)
    elif isinstance(value, str):
        yield name, value
    else:
        try:
            yield name, json.dumps(value)
        except (TypeError, ValueError, RecursionError) as error:
            raise FormatError(
                f"{path.name} holds a {type(value).__name__} under {name[:120]!r}, which is no tensor."
            ) from error


def _bytes(path: Path, name: str, tensor: Tensor) -> int:
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
        raise FormatError(f"{path.name}: tensor {name[:120]!r} is sparse, quantized or empty of values.")
    if tensor.numel() == 0:
        raise FormatError(f"{path.name}: tensor {name[:120]!r} is empty, shape {tuple(tensor.shape)}.")
    return tensor.numel() * tensor.itemsize
