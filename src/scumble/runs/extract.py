"""Extracting from disk: a LoRA from two bases' files, read one layer at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from scumble.adapters.extract import Extracted, extract
from scumble.adapters.factors import Keep
from scumble.adapters.state import Metadata
from scumble.models.loading import describe_base
from scumble.runs.base_files import BaseFiles, open_base


@dataclass(frozen=True)
class ExtractedFromFiles:
    """A LoRA from two bases on disk."""

    lora: Extracted
    notes: tuple[str, ...]
    """What differs and is not in the LoRA."""


def extract_from_base(
    tuned: str | Path,
    base: str | Path,
    keep: Keep,
    *,
    variant: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> ExtractedFromFiles:
    """The LoRA that turns `base` into `tuned`, as near as `keep` allows; two layers are in memory at a time.

    Args:
        tuned, base: "picturebook", folders in diffusers' layout, or .safetensors checkpoints, in any combination.

    Raises:
        ModelError: one of them is not here.
        WrongBase, AdapterError, NotFinite: as `adapters.extract`.
    """
    fine, plain = open_base(tuned, variant), open_base(base, variant)
    facts = describe_base(
        base, variant=None if plain.source == "picturebook" or not plain.is_folder else variant
    )
    metadata = Metadata(
        base_name=str(base),
        base_family=facts.adapters or facts.family,
        base_fingerprint=plain.fingerprint,
        prediction_type=facts.prediction,
    )
    # transformers renamed CLIP's layers; two folders may be of different ages
    renamed = _renamed(fine, plain)
    found = extract(renamed, plain, keep, metadata=metadata, progress=progress)
    return ExtractedFromFiles(found, tuple(_left_out(fine, plain)))


def _renamed(fine: BaseFiles, plain: BaseFiles) -> BaseFiles:
    """`fine` under the layer paths of `plain`, where only the spelling differs."""
    from scumble.formats.keymap import LayerNames

    names = LayerNames(plain.spots.keys())
    spots = {names.resolve(path) or path: spot for path, spot in fine.spots.items()}
    return BaseFiles(fine.source, fine.path, spots, fine.other)


def _left_out(fine: BaseFiles, plain: BaseFiles) -> list[str]:
    """What differs and can't be in a LoRA: biases, norms, embeddings."""
    different = [
        name
        for name, spot in fine.other.items()
        if name in plain.other
        and spot.shape == plain.other[name].shape
        and not torch.equal(fine.tensor(spot).float(), plain.tensor(plain.other[name]).float())
    ]
    if not different:
        return []
    return [
        f"{len(different)} biases, norms or embeddings differ too, which a LoRA can't hold, e.g. {different[0]}. "
        "The LoRA leaves them as they are in the base."
    ]
