"""Inspection: what an adapter file holds, said without a base at hand."""

from __future__ import annotations

import hashlib
import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from operator import mul
from pathlib import Path
from typing import TYPE_CHECKING

from scumble.adapters.families import FAMILIES
from scumble.adapters.names import INPUTS, OUTPUTS, UP_BIAS, apart
from scumble.adapters.shapes import weight_shape
from scumble.adapters.state import AdapterState, LayerPath, LayerState, Metadata, TokenState
from scumble.formats.codec import base_title, cross_attention_width, down_shapes, read
from scumble.formats.container import files_of
from scumble.formats.keymap import ROOTS, split_root
from scumble.formats.kinds import reads_weight
from scumble.formats.stored import dtype_name, numbers_of
from scumble.formats.tables.bases import told_by

if TYPE_CHECKING:
    from torch import Tensor

_MAGNITUDES = {INPUTS, OUTPUTS}


@dataclass(frozen=True)
class Block:
    """One block of the base, and how far the adapter moves it."""

    name: str
    """`"unet.down_blocks.0"`"""
    layers: int
    norm: float | None
    """Frobenius norm of the change to all its weights together, at strength 1; None where that can't be told without
    the base's weights."""


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
    tokens: dict[str, int]
    """Learned token -> number of its vectors."""
    parameters: int
    """Numbers in the tensors."""
    dtypes: tuple[str, ...]
    size: int
    """Bytes of the file."""
    sha256: str
    """See `digest_of`."""
    blocks: tuple[Block, ...]
    metadata: Metadata
    notes: tuple[str, ...]
    """What had to be assumed."""
    unused: tuple[str, ...] = ()
    """Names of the tensors that are of no known kind."""


def inspect(path: str | Path) -> Inspection:
    """What the adapter file at `path` (a file, or a folder that holds one) is.

    Raises:
        FormatError: as `read`; a file of an unknown dialect or family is refused by its name.
    """
    found = read(path, stored=True, allow_partial=True)
    # the denoiser first, whatever the file's order
    order = sorted(found.state.layers, key=lambda layer: ROOTS.index(split_root(layer)[0]))
    state = replace(found.state, layers={layer: found.state.layers[layer] for layer in order})
    layers = list(state.layers.values())
    tensors = [tensor for layer in layers for tensor in layer.tensors.values()]
    tensors += [tensor for token in state.tokens.values() for tensor in token.vectors.values()]
    return Inspection(
        path=found.path,
        dialect=found.dialect,
        base=_base(state),
        families=tuple(sorted({layer.family for layer in layers})),
        ranks=dict(sorted(Counter(layer.rank for layer in layers).items())),
        alphas=dict(sorted(Counter(layer.alpha for layer in layers).items())),
        rank_stabilized=sum(layer.rank_stabilized for layer in layers),
        layers=dict(Counter(split_root(layer)[0] for layer in state.layers)),
        tokens={name: _vectors(token) for name, token in state.tokens.items()},
        parameters=sum(tensor.numel() for tensor in tensors),
        dtypes=tuple(sorted({dtype_name(tensor) for tensor in tensors})),
        size=sum(file.stat().st_size for file in files_of(found.path).values()),
        sha256=digest_of(found.path),
        blocks=blocks_of(state),
        metadata=state.metadata,
        notes=found.notes,
        unused=found.unused,
    )


def digest_of(path: Path) -> str:
    """sha256 of an adapter's file; of an adapter in several files: over the sha256 of each, in order of their names."""
    digests = []
    for _, file in sorted(files_of(path).items()):
        with file.open("rb") as stream:
            digests.append(hashlib.file_digest(stream, "sha256").hexdigest())
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def change_norm(layer: LayerState, weight: Tensor | None = None) -> float | None:
    """Frobenius norm of the change that `layer` makes to its weight and bias, at strength 1.

    ||L R||^2 = sum(L'L * RR'): two (r, r) matrices, so the full change is never built. Families whose change is no
    thin product need the base's `weight`; None is the answer without.
    """
    layer, sides = apart(layer)
    if sides:
        parts = [t.double().norm() * (layer.scale if name == UP_BIAS else 1) for name, t in sides.items()]
        rest = change_norm(layer, weight) if layer.tensors else 0.0
        return None if rest is None else math.hypot(rest, *map(float, parts))
    diff = layer.tensors.get("diff")
    if layer.family == "full" and diff is not None:
        return abs(layer.scale) * float(diff.double().norm())
    if layer.family == "lora":
        return abs(layer.scale) * _product_norm(layer.tensors["up"], layer.tensors["down"])
    thin = FAMILIES.get(layer.family).thin(layer)
    if thin is None:
        from scumble.adapters.factors import change_of

        return None if weight is None else float(change_of("", layer, {"": weight}).norm())
    left, right, _ = thin
    return _product_norm(left, right)


def _product_norm(left: Tensor, right: Tensor) -> float:
    """||L R||, which numpy computes as well as torch, and is there sooner."""
    tall, wide = (numbers_of(tensor).reshape(tensor.shape[0], -1) for tensor in (left, right))
    squares = (tall.T @ tall).astype("f8") * (wide @ wide.T)
    # rounding may leave a tiny negative number where the exact value is 0
    return math.sqrt(max(0.0, float(squares.sum())))


def is_idle(layer: LayerState) -> bool:
    """Whether `layer` changes nothing: `change_norm` is 0, told from one number of the change where that is enough."""
    if layer.family == "lora" and layer.scale and layer.tensors.keys() >= {"up", "down"}:
        row, column = layer.tensors["up"][0].flatten(), layer.tensors["down"].flatten(1).select(1, 0)
        if sum(map(mul, row.tolist(), column.tolist())):
            return False
    norm = change_norm(layer)
    acting = [bool(tensor.any()) for tensor in layer.tensors.values()]
    if norm is None and not all(acting) and not _MAGNITUDES & layer.tensors.keys():
        # products of several tensors, where one that is 0 may make all of it 0: any base's weight will tell
        shape = weight_shape(layer)
        if shape is None or 0 in shape:
            return not any(acting)
        import torch

        return change_norm(layer, torch.ones(shape)) == 0.0
    return norm == 0.0


def _vectors(token: TokenState) -> int:
    return max((vectors.shape[0] for vectors in token.vectors.values()), default=0)


def _base(state: AdapterState) -> str:
    family = state.metadata.base_family or told_by(state.layers)
    shape = base_title(cross_attention_width(down_shapes(state)), family)
    parts = [state.metadata.base_name, shape or state.metadata.base_family]
    return ", ".join(part for part in parts if part)


def blocks_of(state: AdapterState, weights: Mapping[LayerPath, Tensor] | None = None) -> tuple[Block, ...]:
    """The blocks that an adapter changes, in its layers' order; `weights` are the base's, as for `change_norm`."""
    norms: dict[str, list[float | None]] = defaultdict(list)
    for path, layer in state.layers.items():
        norm = change_norm(layer, None if weights is None else weights.get(path))
        if norm is None and weights is None:
            norm = change_norm(layer, _weight_for(layer))
        norms[block_of(path)].append(norm)
    return tuple(Block(name, len(found), _root_of_sum(found)) for name, found in norms.items())


def _weight_for(layer: LayerState) -> Tensor | None:
    """What stands for the base's weight where a change has its shape and does not depend on its values."""
    unknown = _MAGNITUDES & layer.tensors.keys() or reads_weight(layer.family)
    shape = None if unknown else weight_shape(layer)
    if shape is None or 0 in shape:
        return None
    import torch

    return torch.zeros(shape)


def _root_of_sum(norms: Sequence[float | None]) -> float | None:
    known = [norm for norm in norms if norm is not None]
    return math.sqrt(sum(norm**2 for norm in known)) if len(known) == len(norms) else None


def block_of(path: LayerPath) -> str:
    """`unet.down_blocks.0` of a UNet's layer, `text_encoder.layers.0` of a text encoder's."""
    root, rest = split_root(path)
    parts = [part for part in rest.split(".") if part not in ("text_model", "encoder")]
    return ".".join([root, *parts[: 2 if len(parts) > 1 and parts[1].isdigit() else 1]])
