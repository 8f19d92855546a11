"""The running mean of the weights."""

from __future__ import annotations

import torch
from torch import nn

from scumble.training.ema import EMA


def test_the_mean_follows_the_parameters_by_its_formula() -> None:
    parameter = nn.Parameter(torch.tensor([1.0, 2.0]))
    ema = EMA({"p": parameter}, decay=0.9)
    expected = parameter.detach().clone()
    for step in range(1, 6):
        with torch.no_grad():
            parameter += step
        ema.update(step)
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * parameter.detach()
    assert torch.allclose(ema.means["p"], expected)


def test_a_skipped_step_leaves_the_mean() -> None:
    parameter = nn.Parameter(torch.tensor([1.0]))
    ema = EMA({"p": parameter}, decay=0.9)
    with torch.no_grad():
        parameter += 1
    ema.update(1, torch.tensor(1.0))
    assert ema.means["p"].item() == 1.0


def test_swapped_gives_the_parameters_back_bit_for_bit_also_after_an_error() -> None:
    parameter = nn.Parameter(torch.randn(5))
    ema = EMA({"p": parameter}, decay=0.9)
    with torch.no_grad():
        parameter.mul_(3.3)
    before = parameter.detach().clone()
    try:
        with ema.swapped():
            assert torch.equal(parameter, ema.means["p"])
            raise KeyError
    except KeyError:
        pass
    assert torch.equal(parameter, before)


def test_load_takes_over_saved_means() -> None:
    parameter = nn.Parameter(torch.zeros(2))
    ema = EMA({"p": parameter}, decay=0.5)
    ema.load({"p": torch.tensor([4.0, 5.0])})
    assert ema.means["p"].tolist() == [4.0, 5.0] and parameter.tolist() == [0.0, 0.0]


def test_what_rests_keeps_its_mean_and_takes_it_over() -> None:
    parameters = {name: nn.Parameter(torch.tensor([1.0])) for name in "ab"}
    ema = EMA(parameters, decay=0.5)
    with torch.no_grad():
        for parameter in parameters.values():
            parameter += 1
    ema.update(100, names=["a"])
    assert {name: mean.item() for name, mean in ema.means.items()} == {"a": 1.5, "b": 1.0}
    ema.settle(["a"])
    assert [parameter.item() for parameter in parameters.values()] == [1.5, 2.0]
