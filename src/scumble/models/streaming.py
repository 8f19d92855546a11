"""Streaming: a denoiser filled from its files one tensor at a time, so that no two copies of it are ever there.

Each tensor is read into memory of its own, goes into the fingerprint as it is stored, and is rounded, or held in few
bits, before the next is read. At the peak there is what was filled so far, and one tensor in the file's dtype. Files
are not mapped: pages of a mapped file would stay in the process until all of it is read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from io import BufferedReader
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from scumble.errors import ModelError
from scumble.header_dtypes import DTYPES, dtype_of
from scumble.models.codes import code_named
from scumble.models.configs import read_header
from scumble.models.family import Fingerprint
from scumble.models.file_weights import unfilled
from scumble.models.quantized import hold, layers_held, nothing_to_hold


class Stored(Mapping[str, Tensor]):
    """The tensors of some .safetensors files by name, each read anew when it is asked for."""

    def __init__(self, files: Sequence[Path]) -> None:
        """Reads the headers.

        Raises:
            ModelError: a file is not a whole .safetensors file.
        """
        self._places: dict[str, tuple[Path, int, int, torch.dtype]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        """Name -> shape."""
        for file in files:
            header = read_header(file)
            for name, (kind, shape) in header.tensors.items():
                if kind not in DTYPES:
                    raise ModelError(f"{file}: tensor {name!r} has dtype {kind}. Known: {', '.join(DTYPES)}.")
                self._places[name] = (file, *header.spans[name], dtype_of(kind))
                self.shapes[name] = shape
        self._open: dict[Path, BufferedReader] = {}

    def __getitem__(self, name: str) -> Tensor:
        path, begin, end, dtype = self._places[name]
        if path not in self._open:
            self._open[path] = path.open("rb")
        content = torch.empty(end - begin, dtype=torch.uint8)
        file = self._open[path]
        file.seek(begin)
        place: Any = content.numpy()
        if end > begin and file.readinto(place) != end - begin:
            raise ModelError(f"{path} ends within its tensor {name!r}. Download it again.")
        return content.view(dtype).view(self.shapes[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def close(self) -> None:
        """Close the files."""
        for file in self._open.values():
            file.close()
        self._open = {}


@torch.no_grad()
def stream(
    cls: Any,
    config: Mapping[str, Any],
    files: Sequence[Path],
    *,
    dtype: torch.dtype,
    quantization: str = "none",
    base: str,
) -> tuple[nn.Module, str] | None:
    """The denoiser in eval mode, and its fingerprint; None where the files don't hold exactly what the class has, by
    the names that it has for it: then the library's own loader knows what to do, or says what is wrong.

    Args:
        cls: its class in diffusers.
        dtype: of its weights, or what they are read in where they are quantised.
        base: what the base is called.

    Raises:
        ModelError: the config describes no such module, a file is damaged, a weight can't be held so, or nothing would
            be.
        UnknownName: no quantisation is called so.
    """
    code, stored = code_named(quantization), Stored(files)
    module = unfilled(cls, config, base)
    shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    computed = any(name not in shapes for name, _ in module.named_buffers())
    if shapes != stored.shapes or computed:
        return None
    held = layers_held(module) if code is not None else {}
    if code is not None and not held:
        raise ModelError(nothing_to_hold(cls.__name__, quantization))
    whole = Fingerprint()
    try:
        for name in sorted(stored):
            tensor = stored[name]
            whole.add(name, tensor)
            path, _, last = name.rpartition(".")
            if code is not None and path in held and last == "weight":
                hold(module, path, code, tensor, dtype)
            else:
                _put(
                    module.get_submodule(path),
                    last,
                    tensor.to(dtype) if tensor.is_floating_point() else tensor,
                )
    finally:
        stored.close()
    return module.eval(), whole.hex()


def _put(module: nn.Module, name: str, tensor: Tensor) -> None:
    if name in module._parameters:
        module._parameters[name] = nn.Parameter(tensor, requires_grad=False)
    else:
        module._buffers[name] = tensor
