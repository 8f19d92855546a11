"""Extracting: a LoRA from the difference between a fine-tuned model's weights and its base's, layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from scumble.adapters.factors import Keep, Weights, decompose
from scumble.adapters.state import AdapterState, LayerPath, LayerState, Metadata
from scumble.errors import AdapterError, NotFinite, WrongBase


@dataclass(frozen=True)
class Extracted:
    """A LoRA from a full fine-tune."""

    state: AdapterState
    kept: Mapping[LayerPath, float]
    """Layer -> share of the difference's squared Frobenius norm that is in the state, in [0, 1]."""
    unchanged: tuple[LayerPath, ...]
    """Layers that are equal in both, bit for bit."""


def extract(
    tuned: Weights,
    base: Weights,
    keep: Keep,
    *,
    metadata: Metadata | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Extracted:
    """The LoRA whose change is nearest to `tuned` - `base` in every layer (Eckart and Young, 1936).

    Law: `extract(merge(base, L), base)` at L's rank gives L's change back, to the rounding of the weights.

    Args:
        tuned, base: weights by layer path, (out, in) or (out, in / groups, k, k); each is asked for once, so that
            they may be read from disk one at a time. Where one is stored in fewer bits, both are compared in
            those, so that rounding alone is no change.
        keep: a rank, a share of each layer's difference, or both.
        progress: told (layers done, layers in all).

    Raises:
        WrongBase: the two have different layers or shapes.
        NotFinite: a difference is infinite or NaN.
        AdapterError: nothing differs.
    """
    alone = sorted(tuned.keys() ^ base.keys())
    if alone:
        where = "the fine-tuned model" if alone[0] in tuned else "the base"
        raise WrongBase(
            f"These two are not of one architecture: {len(alone)} layers are in one of them only, e.g. "
            f"{alone[0]!r} in {where}. Nothing was extracted."
        )
    layers: dict[LayerPath, LayerState] = {}
    kept: dict[LayerPath, float] = {}
    unchanged = []
    for number, path in enumerate(tuned):
        difference = _difference(path, tuned[path], base[path])
        if difference is None:
            unchanged.append(path)
        else:
            singular = decompose(difference.flatten(1))
            rank = keep.choose(singular.values)
            layers[path] = singular.layer(rank, difference.shape)
            kept[path] = singular.energy(rank)
        if progress is not None:
            progress(number + 1, len(tuned))
    if not layers:
        raise AdapterError(
            f"The two models are equal in all {len(unchanged)} layers: there is nothing to extract."
        )
    return Extracted(AdapterState(layers, metadata=metadata or Metadata()), kept, tuple(unchanged))


def _difference(path: LayerPath, tuned: Tensor, base: Tensor) -> Tensor | None:
    """tuned - base in fp64, None when they are equal."""
    if tuned.shape != base.shape:
        raise WrongBase(
            f"These two are not of one architecture: {path!r} is {tuple(tuned.shape)} in the fine-tuned model and "
            f"{tuple(base.shape)} in the base. Nothing was extracted."
        )
    coarse = min(tuned.dtype, base.dtype, key=lambda dtype: dtype.itemsize)
    tuned, base = tuned.to(coarse).double(), base.to(coarse).double()
    difference = tuned - base
    if not bool(torch.isfinite(difference).all()):
        raise NotFinite(f"The weight of {path!r} holds NaN or infinity. Nothing was extracted.")
    return difference if bool(difference.any()) else None
