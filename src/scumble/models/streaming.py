"""Streaming: a denoiser filled from its files one tensor at a time, so that no two copies of it are ever there.

Each tensor is read into memory of its own, goes into the fingerprint as it is stored, and is rounded, or held in few
bits, before the next is read. At the peak there is what was filled so far, and one tensor in the file's dtype.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from scumble.errors import ModelError
from scumble.models.codes import code_named
from scumble.models.configs import of_a_base
from scumble.models.family import Fingerprint
from scumble.models.file_weights import unfilled
from scumble.models.quantized import hold, layers_held, nothing_to_hold
from scumble.tensor_files.lazy_tensors import LazyTensors


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
    code = code_named(quantization)
    with of_a_base():
        stored = {name: file for file in map(LazyTensors, files) for name in file}
    module = unfilled(cls, config, base)
    shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    computed = any(name not in shapes for name, _ in module.named_buffers())
    if shapes != {name: file.header.shapes[name] for name, file in stored.items()} or computed:
        return None
    held = layers_held(module) if code is not None else {}
    if code is not None and not held:
        raise ModelError(nothing_to_hold(cls.__name__, quantization))
    whole = Fingerprint()
    with of_a_base():
        for name in sorted(stored):
            tensor = stored[name][name]
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
    return module.eval(), whole.hex()


def _put(module: nn.Module, name: str, tensor: Tensor) -> None:
    if name in module._parameters:
        module._parameters[name] = nn.Parameter(tensor, requires_grad=False)
    else:
        module._buffers[name] = tensor
