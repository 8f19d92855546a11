"""Overlap: its laws at both ends, and what chance gives."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from scumble.adapters import AdapterState, LayerState
from scumble.adapters.overlap import overlap
from scumble.errors import AdapterError, WrongBase
from tests.adapters.test_mix import CONV, SHAPES, K, Q, adapter, lora

ZERO = pytest.approx(0.0, abs=1e-9)
ONE = pytest.approx(1.0, abs=1e-9)


def between(down: slice, up: slice, seed: int = 0) -> LayerState:
    """A change that reads and writes some coordinates only."""
    rng = torch.Generator().manual_seed(seed)
    tensors = {"down": torch.zeros(2, 20), "up": torch.zeros(24, 2)}
    tensors["down"][:, down] = torch.randn(2, 20, generator=rng)[:, down]
    tensors["up"][up] = torch.randn(24, 2, generator=rng)[up]
    return LayerState("lora", 2, 2.0, tensors)


def test_with_itself_it_is_one_and_no_conflict() -> None:
    state = adapter(0)
    for energy in (0.5, 0.99, 1.0):
        found = overlap(state, state, energy=energy)
        assert set(found.layers) == set(SHAPES) and found.only_first == found.only_second == ()
        for layer in found.layers.values():
            assert (
                layer.left == ONE and layer.right == ONE and layer.agreement == ONE and layer.conflict == ZERO
            )


def test_with_its_opposite_it_cancels() -> None:
    state = adapter(0)
    layers = {path: replace(layer, alpha=-layer.alpha) for path, layer in state.layers.items()}
    for layer in overlap(state, replace(state, layers=layers)).layers.values():
        assert layer.left == ONE and layer.right == ONE and -layer.agreement == ONE and layer.conflict == ONE


def test_orthogonal_changes_do_not_meet() -> None:
    first, second = slice(0, 10), slice(10, 24)
    here = AdapterState({Q: between(first, first)})
    cases = ((second, second, False, False), (first, second, True, False), (second, first, False, True))
    for down, up, right, left in cases:
        found = overlap(here, AdapterState({Q: between(down, up, seed=1)})).layers[Q]
        assert (found.right > 0.01, found.left > 0.01) == (right, left)
        assert found.agreement == ZERO and found.conflict == ZERO
        assert right or found.right == ZERO
        assert left or found.left == ZERO


def test_the_same_place_with_unrelated_wishes_is_half_a_conflict() -> None:
    one = LayerState("lora", 2, 2.0, {"down": torch.eye(2, 20), "up": torch.eye(24, 2)})
    turn = torch.tensor([[0.0, -1.0], [1.0, 0.0]])
    other = replace(one, tensors={"down": torch.eye(2, 20), "up": torch.eye(24, 2) @ turn})
    found = overlap(AdapterState({Q: one}), AdapterState({Q: other})).layers[Q]
    assert found.left == ONE and found.right == ONE and found.agreement == ZERO
    assert found.conflict == pytest.approx(0.5)


def test_it_does_not_depend_on_size_nor_on_the_order() -> None:
    a, b = adapter(0), adapter(10, rank=2)
    large = replace(b, layers={path: replace(layer, alpha=50.0) for path, layer in b.layers.items()})
    for path, layer in overlap(a, b).layers.items():
        for other in (overlap(a, large).layers[path], overlap(b, a).layers[path]):
            for name in ("left", "right", "agreement", "conflict", "chance_left", "chance_right"):
                assert getattr(other, name) == pytest.approx(getattr(layer, name), abs=1e-6)


def test_unrelated_changes_overlap_as_much_as_chance() -> None:
    pairs = [
        overlap(AdapterState({Q: lora(Q, 3, seed)}), AdapterState({Q: lora(Q, 3, 1000 + seed)}), energy=1.0)
        for seed in range(100)
    ]
    layers = [pair.layers[Q] for pair in pairs]
    assert sum(layer.left for layer in layers) / 100 == pytest.approx(layers[0].chance_left, rel=0.15)
    assert sum(layer.right for layer in layers) / 100 == pytest.approx(layers[0].chance_right, rel=0.15)
    assert (layers[0].chance_left, layers[0].chance_right) == (3 / 24, 3 / 20)


def test_a_summary_counts_layers_by_their_size() -> None:
    a, b = adapter(0), adapter(10)
    found = overlap(a, b)
    assert found.mean("left", [Q]) == pytest.approx(found.layers[Q].left)
    values = sorted(layer.left for layer in found.layers.values())
    assert values[0] < found.mean("left") < values[-1]
    huge = replace(b, layers={**b.layers, K: replace(b.layers[K], alpha=1e6)})
    assert overlap(a, huge).mean("left") == pytest.approx(found.layers[K].left, rel=1e-3)


def test_layers_of_one_alone_are_told() -> None:
    found = overlap(adapter(0, paths=(Q, K)), adapter(1, paths=(K, CONV)))
    assert (set(found.layers), found.only_first, found.only_second) == ({K}, (Q,), (CONV,))
    with pytest.raises(AdapterError, match="no layer in common"):
        overlap(adapter(0, paths=(Q,)), adapter(1, paths=(CONV,)))


def test_other_bases_and_empty_changes_are_refused() -> None:
    other = LayerState("lora", 1, 1.0, {"down": torch.ones(1, 99), "up": torch.ones(24, 1)})
    with pytest.raises(WrongBase, match=r"\(24, 20\).*\(24, 99\)"):
        overlap(adapter(0), AdapterState({Q: other}))
    empty = adapter(0)
    for layer in empty.layers.values():
        layer.tensors["up"].zero_()
    with pytest.raises(AdapterError, match="changes nothing"):
        overlap(adapter(1), empty)
