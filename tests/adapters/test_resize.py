"""Resizing: the nearest change of a rank, chosen as asked, at no more cost than thin matrices."""

from __future__ import annotations

import pytest
import torch

from scumble.adapters import AdapterState
from scumble.adapters.factors import Factors, Keep, decompose
from scumble.adapters.resize import resize
from scumble.errors import AdapterError, ConfigError
from tests.adapters.test_mix import CONV, SHAPES, K, Q, adapter, change, lora


def test_full_rank_is_the_identity() -> None:
    state = adapter(0)
    for keep in (Keep(rank=3), Keep(rank=50), Keep(energy=1.0), Keep(rank=3, frobenius=1.0)):
        found = resize(state, keep)
        assert all(found.state.layers[path] is layer for path, layer in state.layers.items())
        assert set(found.kept.values()) == {1.0} and set(found.ranks.values()) == {(3, 3)}


@pytest.mark.parametrize("path", SHAPES)
def test_a_fixed_rank_is_the_nearest_change(path: str) -> None:
    state = AdapterState({path: lora(path, rank=6)})
    found = resize(state, Keep(rank=2))
    whole = change(state, path).flatten(1)
    values = torch.linalg.svdvals(whole)
    left = (whole - change(found.state, path).flatten(1)).norm() ** 2
    assert left == pytest.approx(float(values[2:].square().sum()), rel=1e-4)
    assert found.ranks[path] == (6, 2) and found.state.layers[path].scale == 1.0
    assert found.kept[path] == pytest.approx(
        float(values[:2].square().sum() / values.square().sum()), rel=1e-6
    )


def test_shares_choose_the_smallest_rank_that_keeps_them() -> None:
    state = adapter(0, rank=8)
    for share in (0.3, 0.6, 0.9, 0.99):
        by_energy, by_norm = resize(state, Keep(energy=share)), resize(state, Keep(frobenius=share**0.5))
        assert by_energy.ranks == by_norm.ranks
        for path in SHAPES:
            rank = by_energy.ranks[path][1]
            squares = torch.linalg.svdvals(change(state, path).flatten(1)).square()
            kept = squares.cumsum(0) / squares.sum()
            assert kept[rank - 1] >= share - 1e-9 and (rank == 1 or kept[rank - 2] < share)
    limited = resize(state, Keep(energy=0.999, rank=2))
    assert {rank for _, rank in limited.ranks.values()} == {2}


def test_factors_are_equally_large() -> None:
    layer = resize(AdapterState({Q: lora(Q, 6)}), Keep(rank=3)).state.layers[Q]
    assert float(layer.tensors["up"].norm()) == pytest.approx(float(layer.tensors["down"].norm()), rel=1e-5)


def test_layers_that_change_nothing_are_named() -> None:
    state = adapter(0, rank=4)
    state.layers[K].tensors["up"].zero_()
    found = resize(state, Keep(rank=2))
    assert found.vanished == (K,) and set(found.state.layers) == {Q, CONV}
    for path in (Q, CONV):
        state.layers[path].tensors["up"].zero_()
    with pytest.raises(AdapterError, match="zero \\(3 layers\\)"):
        resize(state, Keep(rank=2))


def test_a_thin_product_never_becomes_a_full_matrix() -> None:
    """(60000, 8) @ (8, 60000) would be 29 GB."""
    rng = torch.Generator().manual_seed(0)
    thin = Factors(
        torch.randn(60000, 8, generator=rng, dtype=torch.float64),
        torch.randn(8, 60000, generator=rng, dtype=torch.float64),
    )
    singular = thin.singular()
    assert len(singular.values) == 8
    assert float(singular.values.norm()) == pytest.approx(thin.norm(), rel=1e-9)


def test_more_columns_than_rows_are_no_trouble() -> None:
    rng = torch.Generator().manual_seed(0)
    wide = Factors(
        torch.randn(6, 9, generator=rng, dtype=torch.float64),
        torch.randn(9, 5, generator=rng, dtype=torch.float64),
    )
    found = wide.singular()
    torch.testing.assert_close((found.left * found.values) @ found.right, wide.dense())


@pytest.mark.parametrize("shape", [(30, 20), (20, 30)])
def test_the_decomposition_of_a_full_matrix(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = decompose(matrix)
    torch.testing.assert_close((found.left * found.values) @ found.right, matrix)
    torch.testing.assert_close(found.values, torch.linalg.svdvals(matrix))
    torch.testing.assert_close(found.left.T @ found.left, torch.eye(20, dtype=torch.float64))
    assert len(decompose(torch.zeros(4, 5)).values) == 0


@pytest.mark.parametrize(
    ("keep", "said"),
    [
        ({}, "Say how much"),
        ({"rank": 0}, "rank 0"),
        ({"energy": 1.5}, "energy 1.5 is not a share"),
        ({"frobenius": 0.0}, "frobenius 0 is not a share"),
        ({"energy": 0.5, "frobenius": 0.5}, "two measures"),
    ],
)
def test_what_makes_no_sense_is_said(keep: dict[str, float], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Keep(**keep)  # type: ignore[arg-type]
