"""Lazy tensors: those of a .safetensors file by name, each read from disk when it is asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scumble.errors import FormatError
from scumble.tensor_files.dtypes import DTYPES, dtype_of
from scumble.tensor_files.header import Header, opened, read


class LazyTensors(Mapping[str, Tensor]):
    """A file's tensors by name, each read from disk when it is asked for, and kept by nobody.

    The file is not mapped: pages of a mapped file would stay in the process until all of it is read.
    """

    def __init__(self, path: Path, header: Header | None = None) -> None:
        """`header`: the file's, where it was read before.

        Raises:
            FormatError: it is no sound safetensors file, or a dtype of it is not known.
        """
        self.path = path
        self.header = header or read(path)
        for name, entry in self.header.entries.items():
            if entry.code not in DTYPES:
                raise FormatError(
                    f"{path}: tensor {name[:60]!r} has dtype {entry.code[:20]!r}. Known: {', '.join(DTYPES)}."
                )

    def __getitem__(self, name: str) -> Tensor:
        """The tensor, in memory of its own.

        Raises:
            KeyError: there is none of that name.
            FormatError: the file is shorter than it was.
        """
        entry = self.header.entries[name]
        content = torch.empty(entry.end - entry.begin, dtype=torch.uint8, device="cpu")
        place: Any = content.numpy()
        with opened(self.path) as stream:
            stream.seek(self.header.start + entry.begin)
            if len(content) and stream.readinto(place) != len(content):  # type: ignore[attr-defined]
                raise FormatError(f"{self.path} was cut short while it was being read, in tensor {name!r}.")
        return content.view(dtype_of(entry.code)).view(entry.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self.header.entries)

    def __len__(self) -> int:
        return len(self.header.entries)
