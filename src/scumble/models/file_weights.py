"""File weights: one component of a single file, built from its config and filled from it tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from scumble.errors import ModelError
from scumble.models.marks import Mark

CLASSIC = "text_model."
"""What names of CLIP's layers begin with in files."""

KEPT_WIDE = ("wo",)
"""Layers of T5 that overflow in fp16: they stay fp32."""


def prepare_part(
    cls: Any,
    config: Mapping[str, Any],
    path: Path,
    marks: Mapping[str, Mark],
    fixed: Mapping[str, Tensor],
    *,
    dtype: torch.dtype | None,
    base: str,
) -> Callable[[], nn.Module]:
    """What loads a component, in eval mode, when it is called. Whether all of it is there is found out before, without
    a weight; no weight is in memory twice.

    Args:
        cls: its class in diffusers or transformers.
        marks: tensor, by the name that the class has for it -> where it is in the file.
        fixed: tensors that no file holds, by such names.
        dtype: of its weights; None leaves each as it is stored.

    Raises:
        ModelError: a tensor is not there, or of another shape than the config says.
    """
    first = unfilled(cls, config, base)
    # transformers 5 has no such level in `CLIPTextModel`, and files do
    strip = "" if any(name.startswith(CLASSIC) for name in first.state_dict()) else CLASSIC
    named = {name.removeprefix(strip): mark for name, mark in marks.items()}
    _compare(first, named, fixed, base)
    unused = [first]

    def load() -> nn.Module:
        from safetensors import safe_open

        module = unused.pop() if unused else unfilled(cls, config, base)
        with safe_open(path, framework="pt") as file:
            state = {name: _rounded(name, read_mark(file, mark), dtype) for name, mark in named.items()}
        stored = next(iter(state.values())).dtype
        state |= {name: _rounded(name, tensor, dtype or stored) for name, tensor in fixed.items()}
        module.load_state_dict(state, strict=False, assign=True)
        tie = getattr(module, "tie_weights", None)
        if tie is not None:
            tie()
        blank = [name for name, one in (*module.named_parameters(), *module.named_buffers()) if one.is_meta]
        if blank:
            raise ModelError(_lacks(base, cls.__name__, blank))
        return module.eval()

    return load


def read_mark(file: Any, mark: Mark) -> Tensor:
    """The tensor at a mark, of an open safetensors file."""
    stored = file.get_slice(mark.name)
    pieces = [stored[begin:end] for begin, end in mark.rows]
    rows: Tensor = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
    return (rows.T if mark.turned else rows).reshape(mark.shape).contiguous()


def unfilled(cls: Any, config: Mapping[str, Any], base: str) -> nn.Module:
    """The module with parameters on the meta device, and what it computes of its config in place."""
    import diffusers
    from accelerate import init_empty_weights

    entries = {key: value for key, value in config.items() if not key.startswith("_")}
    try:
        if issubclass(cls, diffusers.ModelMixin):
            with torch.device("meta"):
                module: nn.Module = cls.from_config(dict(config))
            return module
        with init_empty_weights():
            found: nn.Module = cls(cls.config_class.from_dict(entries))
            return found
    except (TypeError, ValueError, KeyError) as error:
        raise ModelError(
            f"{base}: what the file's shapes tell describes no {cls.__name__}: {error}"
        ) from error


def _compare(module: nn.Module, named: Mapping[str, Mark], fixed: Mapping[str, Tensor], base: str) -> None:
    """Raises ModelError where the file doesn't hold what the module has."""
    shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    held = {
        **{name: mark.shape for name, mark in named.items()},
        **{n: tuple(t.shape) for n, t in fixed.items()},
    }
    tied = {name for names in (getattr(module, "_tied_weights_keys", None) or (),) for name in names}
    kind = type(module).__name__
    absent = sorted(name for name in shapes if name not in held and name not in tied)
    if absent:
        raise ModelError(_lacks(base, kind, absent))
    strange = sorted(name for name in held if name not in shapes)
    if strange:
        raise ModelError(
            f"{base} holds {len(strange)} tensors that a {kind} has no place for, e.g. {strange[0]}: it is of another "
            "make. If diffusers can load it, save it as a folder with save_pretrained and name that folder."
        )
    for name, shape in held.items():
        if shape != shapes[name]:
            raise ModelError(
                f"{base}: {name} of its {kind} has shape {shape} and belongs to one of {shapes[name]}. The file's "
                "parts don't belong together; download it again."
            )


def _lacks(base: str, kind: str, names: list[str]) -> str:
    return (
        f"{base} lacks {len(names)} tensors of its {kind}, e.g. {names[0]}. The file is not a whole checkpoint; "
        "download it again."
    )


def _rounded(name: str, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    if dtype is None or not tensor.is_floating_point():
        return tensor
    wide = dtype == torch.float16 and any(part in KEPT_WIDE for part in name.split("."))
    return tensor.to(torch.float32 if wide else dtype)
