"""Cache: tensors found again by what they were made from, in memory and on disk.

A key is the hash of everything that decides the tensors: the picture's bytes, its cut, the encoder's weights.
A changed byte is another key, so that nothing stale is ever found.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import secrets
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor, nn

from scumble.data.together import Shelf
from scumble.errors import DataError
from scumble.models.family import BaseModel, Conditioning

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

VERSION = 1
"""Raised when the meaning of cached tensors changes: older files are then never found."""
MEMORY = 4 << 30
"""Bytes held in memory in front of a folder; without a folder, everything is held."""


def key(*parts: object) -> str:
    """sha256 hex of `parts`, which must be plain data."""
    return hashlib.sha256(json.dumps([VERSION, *parts], sort_keys=True).encode()).hexdigest()


class Cache:
    """A mapping of keys to named tensors, kept in memory and, with a folder, between runs.

    Laws: `get` after `put` returns bit-identical tensors; a file is whole or not there, also when two
    processes write it at once; a damaged file is a miss, told in `notes`.
    """

    def __init__(self, folder: Path | str | None = None, *, memory: int = MEMORY) -> None:
        """`folder` None keeps everything in memory; else at most `memory` bytes are."""
        self.folder = None if folder is None else Path(folder).expanduser()
        self.notes: list[str] = []
        """Damaged files that were found, for the run's report."""
        self._memory: OrderedDict[str, dict[str, Tensor]] = OrderedDict()
        self._budget, self._used = memory, 0

    def __contains__(self, name: str) -> bool:
        return self.get(name) is not None

    def get(self, name: str) -> dict[str, Tensor] | None:
        """The tensors of key `name`, on the CPU, or None. They are shared: do not write to them."""
        if name in self._memory:
            self._memory.move_to_end(name)
            return self._memory[name]
        tensors = self._read(name)
        if tensors is not None:
            self._hold(name, tensors)
        return tensors

    def put(self, name: str, tensors: Mapping[str, Tensor], *, about: str) -> None:
        """Keep `tensors` under key `name`; `about` says for people, in the file's header, what they are.

        Raises:
            DataError: the folder can't be written.
        """
        held = {part: tensor.detach().to("cpu").contiguous().clone() for part, tensor in tensors.items()}
        self._hold(name, held)
        if self.folder is not None:
            self._write(name, held, about)

    def path(self, name: str) -> Path:
        """The file of key `name`."""
        assert self.folder is not None
        return self.folder / name[:2] / f"{name}.safetensors"

    def _hold(self, name: str, tensors: dict[str, Tensor]) -> None:
        if name in self._memory:
            self._used -= _bytes(self._memory.pop(name))
        self._memory[name] = tensors
        self._used += _bytes(tensors)
        while self.folder is not None and self._used > self._budget and len(self._memory) > 1:
            self._used -= _bytes(self._memory.popitem(last=False)[1])

    def _read(self, name: str) -> dict[str, Tensor] | None:
        if self.folder is None or not (path := self.path(name)).is_file():
            return None
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                tensors = {part: file.get_tensor(part) for part in file.keys()}  # noqa: SIM118
                expected = (file.metadata() or {}).get("sha256")
        except (SafetensorError, OSError, ValueError) as error:
            self._damaged(path, str(error))
            return None
        if expected != _digest(tensors):
            self._damaged(path, "its bytes do not match its checksum")
            return None
        return tensors

    def _damaged(self, path: Path, reason: str) -> None:
        note = f"The cache file {path} is damaged ({reason}); it is made again."
        self.notes.append(note)
        log.warning(note)

    def _write(self, name: str, tensors: Mapping[str, Tensor], about: str) -> None:
        from safetensors.torch import save

        path = self.path(name)
        data = save(dict(tensors), {"sha256": _digest(tensors), "about": about})
        temporary = path.with_name(f".{path.stem}.{os.getpid()}.{secrets.token_hex(4)}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(data)
            temporary.replace(path)
        except OSError as error:
            with contextlib.suppress(OSError):  # it may never have been made
                temporary.unlink()
            raise DataError(
                f"The cache folder {self.folder} can't be written: {error}. "
                "Free some space, or choose another cache."
            ) from error


def shelf(cache: Cache, abouts: Mapping[str, str]) -> Shelf[Mapping[str, Tensor]]:
    """`cache` as what several processes fill together. `abouts`: key -> what is said of it (see `Cache.put`)."""

    def get(name: str) -> Mapping[str, Tensor]:
        found = cache.get(name)
        assert found is not None, f"{name} was there a moment ago"
        return found

    def put(name: str, tensors: Mapping[str, Tensor]) -> None:
        cache.put(name, tensors, about=abouts[name])

    return Shelf(has=cache.__contains__, get=get, put=put, size=_bytes)


def _bytes(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _digest(tensors: Mapping[str, Tensor]) -> str:
    import torch

    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


# -- what an encoder is, as a key ----------------------------------------------------------------------------


def image_encoder_fingerprint(base: BaseModel) -> str:
    """sha256 over the weights, dtype and configuration of what turns the base's pixels into latents."""
    modules = base.modules()
    return _fingerprint({name: module for name, module in modules.items() if name.startswith("vae")}, base)


def text_encoder_fingerprint(base: BaseModel) -> str:
    """sha256 over the weights, dtype and configuration of the base's text encoders, and how it cuts a
    sentence."""
    modules, waiting = base.modules(), base.waiting()
    encoders = {name: module for name, module in modules.items() if name.startswith("text_encoder")}
    # what waits to be loaded is known by its files
    kept = sorted({str(base.dtype_of(name)) for name in waiting})
    others = [sorted(waiting.items()), *kept] if waiting else []
    return key(_fingerprint(encoders, base), base.token_counts([_PROBE]), *others)


_PROBE = "A photograph of 2 astronauts, (riding:1.2) the étude's <horse>; 水 \N{UNICORN FACE}"
"""A sentence that two tokenizers rarely cut into equally many tokens."""


def _fingerprint(modules: Mapping[str, nn.Module], base: BaseModel) -> str:
    described = []
    for name, module in sorted(modules.items()):
        tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        digest = _digest({path: tensor.detach().to("cpu") for path, tensor in tensors.items()})
        config = getattr(module, "config", {})
        config = config.to_dict() if hasattr(config, "to_dict") else dict(config)
        facts = {k: repr(v) for k, v in config.items() if not k.startswith("_") and k not in _NOT_MATTERING}
        described.append((name, digest, facts))
    return key(base.family, described)


_NOT_MATTERING = frozenset({"transformers_version", "torch_dtype", "dtype", "name_or_path", "architectures"})


def finite_or_name(tensor: Tensor, what: str, dtype: torch.dtype) -> None:
    """Refuse a tensor with NaN or infinity; `what` names its picture or caption.

    Raises:
        DataError: some number is not finite.
    """
    bad = int((~tensor.isfinite()).sum())
    if bad:
        raise DataError(
            f"{what}: the base's encoder gave {bad} of {tensor.numel()} numbers that are not finite "
            f"(base in {dtype}). "
            "The file may be damaged; or the encoder overflows in this dtype: try precision bf16 or fp32."
        )


def to_tensors(conditioning: Conditioning) -> dict[str, Tensor]:
    """A conditioning as named tensors, for `Cache.put`."""
    parts = {"tokens": conditioning.tokens, "pooled": conditioning.pooled, "mask": conditioning.mask}
    return {name: tensor for name, tensor in parts.items() if tensor is not None}


def to_conditioning(tensors: Mapping[str, Tensor]) -> Conditioning:
    """The inverse of `to_tensors`."""
    return Conditioning(tensors["tokens"], tensors.get("pooled"), tensors.get("mask"))
