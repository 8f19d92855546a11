"""tensors: the tensors in a value made of frozen dataclasses, such as a batch, reached without knowing its fields."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

V = TypeVar("V")


def mapped(value: V, function: Callable[[Tensor], Tensor]) -> V:
    """`value` with `function` applied to every tensor in it, in the order of the fields; the rest as it is."""
    if isinstance(value, Tensor):
        return cast(V, function(value))
    if not is_dataclass(value) or isinstance(value, type):
        return value
    changed: dict[str, Any] = {}
    for each in fields(value):
        before = getattr(value, each.name)
        after = mapped(before, function)
        if after is not before:
            changed[each.name] = after
    return replace(value, **changed) if changed else value


def tensors_in(value: object) -> list[Tensor]:
    """Every tensor in `value`, in the order in which `mapped` meets them."""
    found: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    mapped(value, keep)
    return found


def sent(value: V, device: torch.device) -> V:
    """`value` with its tensors on `device`. A GPU fetches them from pinned memory, so that the host need not wait for
    what the GPU still has to do before."""

    def send(tensor: Tensor) -> Tensor:
        if tensor.device == device:
            return tensor
        ready = tensor.pin_memory() if device.type == "cuda" and tensor.device.type == "cpu" else tensor
        return ready.to(device, non_blocking=True)

    return mapped(value, send)
