"""Inspection: what an adapter file holds, said without a base at hand."""

from __future__ import annotations

import hashlib
import math
from collections import Counter, defaultdict
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from scumble.adapters.state import AdapterState, LayerState, Metadata
from scumble.formats.codec import base_title, cross_attention_width, down_shapes, read
from scumble.formats.keymap import ROOTS, split_root


@dataclass(frozen=True)
class Block:
    """One block of the base, and how far the adapter moves it."""

    name: str
    """`"unet.down_blocks.0"`"""
    layers: int
    norm: float
    """Frobenius norm of the change to all its weights together, at strength 1."""


@dataclass(frozen=True)
class Inspection:
    """What an adapter file holds."""

    path: Path
    dialect: str
    base: str
    """What base it is for, as far as its shapes and its header tell; empty when they don't."""
    families: tuple[str, ...]
    """Adapter families: "lora"."""
    ranks: dict[int, int]
    """Rank -> how many layers have it."""
    alphas: dict[float, int]
    """Alpha -> how many layers have it."""
    rank_stabilized: int
    """How many layers are scaled by alpha / sqrt(rank)."""
    layers: dict[str, int]
    """Component -> number of layers."""
    parameters: int
    """Numbers in the factors."""
    dtypes: tuple[str, ...]
    size: int
    """Bytes of the file."""
    sha256: str
    """Of the file."""
    blocks: tuple[Block, ...]
    metadata: Metadata
    notes: tuple[str, ...]
    """What had to be assumed."""


def inspect(path: str | Path) -> Inspection:
    """What the adapter file at `path` (a file, or a folder that holds one) is.

    Raises:
        FormatError: as `read`; a file of an unknown dialect or family is refused by its name.
    """
    found = read(path)
    # the denoiser first, whatever the file's order
    order = sorted(found.state.layers, key=lambda layer: ROOTS.index(split_root(layer)[0]))
    state = replace(found.state, layers={layer: found.state.layers[layer] for layer in order})
    layers = list(state.layers.values())
    tensors = [tensor for layer in layers for tensor in layer.tensors.values()]
    with found.path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return Inspection(
        path=found.path,
        dialect=found.dialect,
        base=_base(state),
        families=tuple(sorted({layer.family for layer in layers})),
        ranks=dict(sorted(Counter(layer.rank for layer in layers).items())),
        alphas=dict(sorted(Counter(layer.alpha for layer in layers).items())),
        rank_stabilized=sum(layer.rank_stabilized for layer in layers),
        layers=dict(Counter(split_root(layer)[0] for layer in state.layers)),
        parameters=sum(tensor.numel() for tensor in tensors),
        dtypes=tuple(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors})),
        size=found.path.stat().st_size,
        sha256=digest,
        blocks=_blocks(state),
        metadata=state.metadata,
        notes=(*found.notes, *(f"unused: {name}" for name in found.unused)),
    )


def change_norm(layer: LayerState) -> float:
    """Frobenius norm of the change that `layer` makes to its weight, at strength 1.

    ||s U D||^2 = s^2 sum(U'U * DD'): two (r, r) matrices, so the full weight is never built.
    """
    return abs(layer.scale) * math.sqrt(
        _gram(layer.tensors["up"].flatten(1).T, layer.tensors["down"].flatten(1))
    )


def _gram(up: Tensor, down: Tensor) -> float:
    up, down = up.to(torch.float64), down.to(torch.float64)
    # rounding may leave a tiny negative number where the exact value is 0
    return max(0.0, float(((up @ up.T) * (down @ down.T)).sum()))


def _base(state: AdapterState) -> str:
    shape = base_title(cross_attention_width(down_shapes(state)), state.metadata.base_family)
    parts = [state.metadata.base_name, shape or state.metadata.base_family]
    return ", ".join(part for part in parts if part)


def _blocks(state: AdapterState) -> tuple[Block, ...]:
    squares: dict[str, list[float]] = defaultdict(list)
    for path, layer in state.layers.items():
        squares[_block(path)].append(change_norm(layer) ** 2)
    return tuple(Block(name, len(found), math.sqrt(sum(found))) for name, found in squares.items())


def _block(path: str) -> str:
    """`unet.down_blocks.0` of a UNet's layer, `text_encoder.layers.0` of a text encoder's."""
    root, rest = split_root(path)
    parts = [part for part in rest.split(".") if part not in ("text_model", "encoder")]
    return ".".join([root, *parts[: 2 if len(parts) > 1 and parts[1].isdigit() else 1]])
