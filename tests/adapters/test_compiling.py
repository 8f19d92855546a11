"""Compiled code serves other strengths, ranks and sizes; counted on one layer, without a C++ compiler."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from scumble.adapters import Adapter, LoraSettings
from scumble.adapters.compiling import adaptable
from scumble.adapters.dial import Dial
from scumble.training.compiled import open_sizes


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


def layer() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 10), nn.Conv1d(1, 1, 1)).requires_grad_(False)[:1]


def injected(model: nn.Module, rank: int, alpha: float | None = None) -> Adapter:
    adapter = Adapter.inject({"unet": model}, ("unet.0",), LoraSettings(rank=rank, alpha=alpha))
    for delta in adapter.deltas.values():
        nn.init.normal_(delta.up, std=0.1)  # type: ignore[arg-type]
    return adapter


def run(model: nn.Module, adapter: Adapter, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    for parameter in adapter.parameters():
        parameter.grad = None
    y = model(x)
    y.square().sum().backward()
    return y.detach(), [p.grad.clone() for p in adapter.parameters() if p.grad is not None]


def test_strength_rank_alpha_batch_and_length_are_compiled_once() -> None:
    model, counter = layer(), CompileCounter()
    compiled = torch.compile(model, backend=counter, dynamic=True, fullgraph=True)

    def same(adapter: Adapter, *shape: int) -> None:
        x = torch.randn(*shape, 6)
        with open_sizes():
            found = run(compiled, adapter, x)
        expected = run(model, adapter, x)
        assert len(found[1]) == 2 and torch.allclose(found[0], expected[0], atol=1e-6)
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found[1], expected[1], strict=True))

    with injected(model, 4) as adapter, adaptable([model]):
        same(adapter, 3, 5)
        once = counter.frame_count
        for strength in (0.5, 0.7, -2.0):
            adapter.strength = strength
            same(adapter, 3, 5)
        adapter.strength = 1.0
        same(adapter, 2, 9)
        same(adapter, 5, 5)
    for rank, alpha in ((2, None), (3, 1.0), (4, 16.0), (8, None)):
        with injected(model, rank, alpha) as adapter, adaptable([model]):
            same(adapter, 3, 5)
    assert once == counter.frame_count == 1
    with injected(model, 1) as adapter, adaptable([model]):
        same(adapter, 3, 5)
    assert counter.frame_count == 2, "sizes of 1 are compiled apart: the count can fail"


def test_without_it_another_strength_or_rank_compiles_anew() -> None:
    model, counter = layer(), CompileCounter()
    compiled = torch.compile(model, backend=counter, dynamic=True)
    for rank in (4, 2, 3):
        with injected(model, rank) as adapter:
            run(compiled, adapter, torch.randn(3, 5, 6))
    assert counter.frame_count > 1


def test_nothing_is_left_behind() -> None:
    model = layer()
    with injected(model, 2) as adapter:
        before = [sorted(vars(tensor)) for tensor in model.parameters()]
        dials = [part.dials for part in model.modules() if hasattr(part, "dials")]
        with adaptable([model]):
            assert [sorted(vars(tensor)) for tensor in model.parameters()] != before
            assert all(delta.gain is not None for delta in adapter.deltas.values())
            assert [dial.gain is not None for each in dials for dial in each.values()] == [True]
        assert [sorted(vars(tensor)) for tensor in model.parameters()] == before
        assert all(delta.gain is None for delta in adapter.deltas.values())
        assert [dial.gain for each in dials for dial in each.values()] == [None]


def test_a_followed_dial_leaves_old_tensors_alone() -> None:
    """A backward pass that is still to come may need them."""
    dial = Dial(0.5)
    dial.follow(torch.device("cpu"))
    before = dial.gain
    dial.value = 2.0
    assert before is not None and dial.gain is not None
    assert (before.item(), dial.gain.item()) == (0.5, 2.0)
    dial.value = torch.tensor([1.0, 2.0])
    assert dial.gain.shape == ()
