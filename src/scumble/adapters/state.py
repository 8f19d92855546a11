"""AdapterState: an adapter as plain data, between the model it came from and the file it goes to.

Legend: r rank, s scale. A layer path is `"<root>.<module path>"`, with the module names of the live model:
`"unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"`. How a file spells it is the codec's affair.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

from scumble.adapters.memory import runs

if TYPE_CHECKING:
    from torch import Tensor

LayerPath: TypeAlias = str

_AT_ONCE = 2**22
"""Numbers that are looked at together: 8-bit floats are widened for it."""


@dataclass(frozen=True)
class LayerState:
    """The change to one layer.

    `tensors` carry the family's own names. For `lora`: `down` (r, in) or (r, in, k, k), `up` (out, r) or
    (out, r, 1, 1), so that `weight_delta = scale * up @ down`.
    """

    family: str
    rank: int
    alpha: float
    tensors: Mapping[str, Tensor]
    rank_stabilized: bool = False
    """rsLoRA (Kalajdzievski, 2023): s = alpha / sqrt(r) instead of alpha / r."""

    @property
    def scale(self) -> float:
        """s: what the product of the factors is multiplied by."""
        return scale_of(self.rank, self.alpha, self.rank_stabilized)


def scale_of(rank: int, alpha: float, rank_stabilized: bool) -> float:
    """s = alpha / r, or alpha / sqrt(r) when rank-stabilized."""
    return alpha / (math.sqrt(rank) if rank_stabilized else rank)


@dataclass(frozen=True)
class TokenState:
    """Learned embedding rows of one placeholder token: text encoder name -> (vectors, dim)."""

    vectors: Mapping[str, Tensor]


@dataclass(frozen=True)
class Metadata:
    """What an adapter says of itself. Empty strings mean "not said"."""

    base_name: str = ""
    """Where the base came from: a Hub id, a path, or "picturebook"."""
    base_fingerprint: str = ""
    """sha256 over the base's denoiser weights (see `models.family.BaseModel.fingerprint`)."""
    base_family: str = ""
    """"sd1", "sd2", ..."""
    prediction_type: str = ""
    """"epsilon", "v_prediction" or "flow"."""
    dataset_fingerprint: str = ""
    """sha256 over the pictures and captions that it was trained on."""
    settings: str = ""
    """The whole run configuration as JSON."""
    version: str = ""
    """scumble's version that wrote it."""
    extra: Mapping[str, str] = field(default_factory=dict)
    """Every other header entry of the file it was read from, unchanged."""


@dataclass(frozen=True)
class AdapterState:
    """An adapter as data: changes per layer, learned tokens, and what it says of itself.

    Law: `Adapter.load(model, adapter.state())` gives the same outputs as `adapter`.
    """

    layers: Mapping[LayerPath, LayerState]
    tokens: Mapping[str, TokenState] = field(default_factory=dict)
    metadata: Metadata = field(default_factory=Metadata)

    @property
    def roots(self) -> set[str]:
        """The parts of a model that it changes: "unet", "text_encoder", ..."""
        learned = {root for token in self.tokens.values() for root in token.vectors}
        return learned | {path.partition(".")[0] for path in self.layers}

    def equal(self, other: AdapterState) -> bool:
        """Bit-equality of everything but the metadata's `extra`."""
        if self.layers.keys() != other.layers.keys() or self.tokens.keys() != other.tokens.keys():
            return False
        for path, mine in self.layers.items():
            theirs = other.layers[path]
            if (mine.family, mine.rank, mine.alpha, mine.rank_stabilized) != (
                theirs.family,
                theirs.rank,
                theirs.alpha,
                theirs.rank_stabilized,
            ) or not _same_tensors(mine.tensors, theirs.tensors):
                return False
        return all(_same_tensors(t.vectors, other.tokens[n].vectors) for n, t in self.tokens.items())


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """The names of the tensors that hold NaN or infinity; one pass over the numbers."""
    return surveyed(tensors)[0]


def surveyed(tensors: Mapping[str, Tensor]) -> tuple[list[str], float]:
    """(names of the tensors that hold NaN or infinity, a size that no number exceeds); one pass over the numbers."""
    numbers = {name: t for name, t in tensors.items() if t.is_floating_point() and t.numel()}
    # NaN and infinity come through a sum, which may itself become too large: only then they are looked for
    sizes = [
        _size(piece)
        for flat, _ in runs(list(numbers.values()))
        for piece in (flat.split(_AT_ONCE) if flat.numel() > _AT_ONCE else (flat,))
    ]
    if all(map(math.isfinite, sizes)):
        return [], max(sizes, default=0.0)
    return [name for name, tensor in numbers.items() if not _finite(tensor)], math.inf


def _size(piece: Tensor) -> float:
    """What no number of a flat tensor exceeds; not finite where one is not, or where it can't be told."""
    import torch

    if piece.dtype == torch.bfloat16:  # as wide as fp32
        piece = piece.float()
    if piece.dtype in (torch.float32, torch.float64):
        return math.sqrt(float(piece.dot(piece)))
    return torch.finfo(piece.dtype).max if math.isfinite(float(_comparable(piece).sum())) else math.nan


def _finite(tensor: Tensor) -> bool:
    extremes = _comparable(tensor).aminmax()  # NaN comes through both
    return all(map(math.isfinite, map(float, extremes)))


def _same_tensors(mine: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> bool:
    return mine.keys() == theirs.keys() and all(
        t.dtype == theirs[n].dtype and _comparable(t).equal(_comparable(theirs[n])) for n, t in mine.items()
    )


def _comparable(tensor: Tensor) -> Tensor:
    """8-bit floats as 32-bit ones, exactly: torch compares no others."""
    return tensor.float() if tensor.is_floating_point() and tensor.itemsize == 1 else tensor
