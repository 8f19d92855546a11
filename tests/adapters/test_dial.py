"""Dial: one strength for all layers of an adapter, and where in a batch it acts."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from scumble.adapters import Adapted, Adapter, Delta, LoraSettings
from scumble.adapters.dial import Dial
from scumble.errors import AdapterError


def where(strengths: list[float], samples: int) -> list[tuple[list[int], object]]:
    """(rows, strength) of each piece."""
    pieces = Dial(torch.tensor(strengths)).pieces(torch.zeros(samples, 3))
    return [
        (
            list(range(samples))[piece.rows],
            piece.strength.tolist() if isinstance(piece.strength, Tensor) else piece.strength,
        )
        for piece in pieces
    ]


def test_samples_of_strength_zero_are_in_no_piece() -> None:
    assert where([0.0, 0.5, 0.5, 0.0, 2.0], 5) == [([1, 2], 0.5), ([4], 2.0)]
    assert where([0.0, 0.5, 1.0], 3) == [([1, 2], [0.5, 1.0])]
    assert where([0.0, 0.0], 4) == []


def test_a_block_is_repeated_over_the_batch() -> None:
    assert where([1.0, 0.0], 4) == [([0], 1.0), ([2], 1.0)]
    assert where([0.5, 1.0], 4) == [([0, 1, 2, 3], [0.5, 1.0, 0.5, 1.0])]
    assert where([1.0, 1.0], 4) == [([0, 1, 2, 3], 1.0)]


def test_a_number_acts_everywhere() -> None:
    (piece,) = Dial(0.5).pieces(torch.zeros(3, 3))
    assert (piece.rows, piece.strength) == (slice(None), 0.5)
    assert Dial(0.5).acts and not Dial(0.0).acts and Dial(torch.zeros(2)).acts


def test_samples_that_are_no_multiple() -> None:
    for x in (torch.zeros(4, 3), torch.zeros(3)):
        with pytest.raises(AdapterError, match="3 per-sample strengths"):
            Dial(torch.ones(3)).pieces(x)


def test_an_adapter_has_one_dial_for_all_layers(
    roots: dict[str, nn.Module], run: Callable[[], Tensor], stir: Callable[..., Adapter]
) -> None:
    adapter = stir(Adapter.inject(roots, "attention", LoraSettings(rank=2)))
    layers = [module for module in roots["unet"].modules() if isinstance(module, Adapted)]
    assert len(layers) == len(adapter) > 1
    assert len({id(dial) for layer in layers for dial in layer.dials.values()}) == 1
    with torch.no_grad():
        whole = run()
        adapter.strength = 0.0
        assert not torch.equal(run(), whole)
        adapter.strength = 1.0
        assert torch.equal(run(), whole)
        with adapter.disabled():
            assert not torch.equal(run(), whole)
        assert torch.equal(run(), whole)


def test_a_dial_turned_is_heard_with_gradients_and_without(
    roots: dict[str, nn.Module], run: Callable[[], Tensor], stir: Callable[..., Adapter]
) -> None:
    adapter = stir(Adapter.inject(roots, "attention", LoraSettings(rank=2)))
    for strength in (0.5, 0.0, -1.0, torch.tensor([0.0, 1.0]), 1.0):
        adapter.strength = strength
        with torch.no_grad():
            without = run()
        torch.testing.assert_close(run(), without, rtol=1e-5, atol=1e-6)


def test_turns_decide_the_order_whatever_came_first(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, calls = Adapted(nn.Linear(4, 4)), []
    rng = torch.Generator().manual_seed(0)
    for name in ("first", "second", "third"):
        from scumble.adapters import Lora

        shapes = Lora.shapes(layer.base, 2)
        delta = Lora({n: torch.randn(s, generator=rng) for n, s in shapes.items()}, rank=2, alpha=2)

        def add_to(*args: object, name: str = name, delta: Delta = delta) -> None:
            calls.append(name)
            type(delta).add_to(delta, *args)  # type: ignore[arg-type]

        monkeypatch.setattr(delta, "add_to", add_to)
        layer.add(name, delta)
    layer.dials["first"].turn = 2
    with torch.no_grad():
        layer(torch.randn(2, 4, generator=rng))
    assert calls == ["second", "third", "first"]
