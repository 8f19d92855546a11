"""Scales: rank and alpha of every layer of a file, from all places that speak of them; they must agree."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from scumble.errors import FormatError
from scumble.formats.container import TensorFile
from scumble.formats.metadata import LAYERS, LayerFacts, layer_facts
from scumble.formats.stored import code_of
from scumble.tensor_files.dtypes import DTYPES

if TYPE_CHECKING:
    from torch import Tensor

ALPHA_TENSOR = "the alpha tensor"


def settle(
    file: TensorFile,
    ranks: Mapping[str, int],
    *,
    headers: Mapping[str, Mapping[str, LayerFacts]] | None = None,
    zero_means_rank: bool = False,
) -> tuple[dict[str, LayerFacts], tuple[str, ...]]:
    """(facts by layer, notes) of the layers whose ranks are given, all spelled as in the file.

    In this order: our own header entry, the foreign `headers` (source -> layer -> facts), the tensor
    `<layer>.alpha`, else alpha = rank, which the notes then say. `zero_means_rank`: an alpha tensor of 0 is no
    alpha, as in kohya's scripts.

    Raises:
        FormatError: two places contradict each other or the tensors, or an alpha is not one finite number.
    """
    sources = dict(headers or {})
    ours = layer_facts(file.metadata, ranks)
    if ours is not None:
        sources = {LAYERS: ours, **sources}
    facts, absent, zero = {}, 0, 0
    for layer, rank in ranks.items():
        said = {source: found[layer] for source, found in sources.items() if layer in found}
        tolerance = 1e-5
        if layer + ".alpha" in file.tensors:
            alpha = alpha_of(file, layer + ".alpha")
            if alpha == 0 and zero_means_rank and not _limits(file, layer):
                zero += 1
                alpha = float(rank)
            said[ALPHA_TENSOR] = LayerFacts(rank, alpha)
            tolerance = max(tolerance, _rounding(file.tensors[layer + ".alpha"]))
        if said:
            _check(file, layer, rank, said, tolerance)
        elif _limits(file, layer):
            said["no limit"] = LayerFacts(rank, 0.0)
        absent += not said
        facts[layer] = next(iter(said.values())) if said else LayerFacts(rank, float(rank))
    notes = []
    if absent and absent == len(ranks):
        notes.append("alpha absent: using alpha = rank")
    elif absent:
        notes.append(f"alpha absent on {absent} of {len(ranks)} layers: using alpha = rank there")
    if zero:
        notes.append(f"alpha 0 on {zero} of {len(ranks)} layers means alpha = rank in this dialect")
    return facts, tuple(notes)


def _limits(file: TensorFile, layer: str) -> bool:
    """Whether a layer's alpha is a limit, which 0 takes away, and not a scale."""
    return any(layer + ending in file.tensors for ending in (".oft_blocks", ".oft_R.weight"))


def alpha_of(file: TensorFile, name: str) -> float:
    """The one number in the tensor called `name`, whatever its shape and dtype.

    Raises:
        FormatError: it is not one finite number.
    """
    tensor = file.tensors[name]
    if tensor.numel() != 1:
        raise FormatError(f"Tensor {name!r} should be one number, its shape is {tuple(tensor.shape)}.")
    alpha = float(tensor.item())
    if not math.isfinite(alpha):
        raise FormatError(f"Tensor {name!r} is {alpha}. Not applied.")
    return alpha


def _check(file: TensorFile, layer: str, rank: int, said: Mapping[str, LayerFacts], tolerance: float) -> None:
    for source, fact in said.items():
        if fact.rank != rank:
            raise FormatError(
                f"{file.label} contradicts itself: {source} gives {layer!r} rank {fact.rank}, its tensors "
                f"have rank {rank}. Not applied."
            )
    scales = [fact.scale for fact in said.values()]
    if any(not math.isclose(scale, scales[0], rel_tol=tolerance, abs_tol=1e-12) for scale in scales):
        listed = ", ".join(f"{source}: alpha {fact.alpha:g}" for source, fact in said.items())
        raise FormatError(
            f"{file.label} contradicts itself about the scale of {layer!r} ({listed}). Not applied."
        )


def _rounding(tensor: Tensor) -> float:
    """How far rounding to a tensor's dtype may move a number, as a share of it."""
    return DTYPES[code_of(tensor) or "F64"].eps
