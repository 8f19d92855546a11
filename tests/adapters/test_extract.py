"""Extracting: what was merged comes out again."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from scumble.adapters import AdapterState
from scumble.adapters.extract import extract
from scumble.adapters.factors import Keep
from scumble.errors import AdapterError, NotFinite, WrongBase
from tests.adapters.test_mix import CONV, SHAPES, K, Q, adapter, change


def weights(seed: int = 9) -> dict[str, Tensor]:
    """A base's weights."""
    rng = torch.Generator().manual_seed(seed)
    return {path: torch.randn(shape, generator=rng) for path, shape in SHAPES.items()}


def merged(base: dict[str, Tensor], state: AdapterState) -> dict[str, Tensor]:
    """The base with the adapter in it, in the base's dtype."""
    return {path: (weight.double() + change(state, path)).to(weight.dtype) for path, weight in base.items()}


def test_what_was_merged_comes_out() -> None:
    base, state = weights(), adapter(0, rank=3)
    told: list[tuple[int, int]] = []
    found = extract(merged(base, state), base, Keep(rank=3), progress=lambda *n: told.append(n))
    for path in SHAPES:
        error = (change(found.state, path) - change(state, path)).norm() / change(state, path).norm()
        assert error < 1e-5 and found.state.layers[path].rank == 3
    assert min(found.kept.values()) > 1 - 1e-9 and found.unchanged == () and told == [(1, 3), (2, 3), (3, 3)]


def test_a_share_finds_the_rank() -> None:
    base, state = weights(), adapter(0, rank=2)
    found = extract(merged(base, state), base, Keep(energy=1 - 1e-9))
    assert {layer.rank for layer in found.state.layers.values()} == {2}


def test_equal_layers_are_left_out_and_named() -> None:
    base = weights()
    found = extract(merged(base, adapter(0, paths=(K,))), base, Keep(rank=4))
    assert set(found.state.layers) == {K} and found.unchanged == (Q, CONV)
    with pytest.raises(AdapterError, match="equal in all 3 layers"):
        extract(base, base, Keep(rank=4))


def test_rounding_alone_is_no_change() -> None:
    base = weights()
    half = {path: weight.half() for path, weight in base.items()}
    with pytest.raises(AdapterError, match="equal"):
        extract(half, base, Keep(rank=4))


def test_other_architectures_are_refused() -> None:
    base = weights()
    with pytest.raises(WrongBase, match=f"{K}.*the base"):
        extract({path: w for path, w in base.items() if path != K}, base, Keep(rank=1))
    with pytest.raises(WrongBase, match=r"\(24, 21\) in the fine-tuned"):
        extract({**base, Q: torch.zeros(24, 21)}, base, Keep(rank=1))
    with pytest.raises(NotFinite, match=Q):
        extract({**base, Q: torch.full((24, 20), float("nan"))}, base, Keep(rank=1))
