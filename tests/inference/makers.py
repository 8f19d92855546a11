"""Adapters on tiny bases, as files: what the tests of inference draw with."""

from __future__ import annotations

from pathlib import Path

import torch

from scumble.adapters import Adapter, LoraSettings
from scumble.adapters.state import Metadata
from scumble.formats import write
from scumble.models import FAMILIES, BaseModel


def tiny(family: str = "sd1", seed: int = 0) -> BaseModel:
    """A fresh toy base: 16x16 pixels, from a seed."""
    return FAMILIES.get(family).tiny(seed)


def fill(adapter: Adapter, seed: int, size: float = 0.3) -> Adapter:
    """Give a fresh adapter values that show in a picture."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * size)
    return adapter


def adapter_file(
    path: Path,
    seed: int = 1,
    targets: str = "attention",
    base_name: str = "",
    family: str = "sd1",
    size: float = 0.3,
    settings: str = "",
) -> Path:
    """A LoRA for the toy base, written to `path`."""
    adapter = fill(Adapter.inject(tiny(family).roots, targets, LoraSettings(rank=2)), seed, size)
    return write(adapter.state(Metadata(base_name=base_name, settings=settings)), path)
