"""The law of wrong pairs: an adapter of any family, trained on one base, is refused on every other kind of base, in one
line and before anything is touched."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from scumble.adapters import FAMILIES as ADAPTERS
from scumble.adapters import Adapter, layers_of
from scumble.adapters.state import Metadata
from scumble.errors import FormatError
from scumble.formats import write
from scumble.inference.session import Session
from scumble.models import FAMILIES
from scumble.models.family import BaseModel

BASES = tuple(name for name in FAMILIES if "inpainting" not in name)
"""Inpainting bases take the adapters of the bases that they were made from, and no others."""


@pytest.fixture(scope="module")
def bases() -> dict[str, BaseModel]:
    return {name: FAMILIES.get(name).tiny() for name in FAMILIES}


@pytest.mark.parametrize("kind", ADAPTERS.names())
@pytest.mark.parametrize("trained_on", BASES)
def test_a_wrong_pair_is_refused_in_one_line(
    bases: dict[str, BaseModel], trained_on: str, kind: str, tmp_path: Path
) -> None:
    base = bases[trained_on]
    with Adapter.inject(base.roots, "attention", ADAPTERS.get(kind).settings(rank=2)) as adapter:
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter.add_(0.1)
        state = adapter.state(Metadata(base_name=base.name, base_family=base.family))
    path = write(state, tmp_path / "a.safetensors")
    for name, other in bases.items():
        if other.family == base.family:
            continue
        before = layers_of(other.roots)
        with pytest.raises(FormatError) as refused:
            Session(other, [path])
        assert "\n" not in str(refused.value)
        assert all(layer is before[name] for name, layer in layers_of(other.roots).items())
        assert "Adapted" not in repr(other.denoiser)
