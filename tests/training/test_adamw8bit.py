"""AdamW with 8-bit means: what it keeps, how far it is from AdamW, and what rounding by chance is for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from scumble.training import adamw8bit
from scumble.training.adamw8bit import BLOCK, ROOTS, SIGNED, SMALLEST, AdamW8bit, LogCode


def kept_bytes(optimizer: Optimizer) -> int:
    return sum(
        t.nbytes for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor)
    )


def gradient(parameter: Tensor, step: int, scale: float | Tensor = 1.0) -> Tensor:
    return scale * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(step))


def test_it_keeps_about_two_bytes_a_number() -> None:
    large, small = nn.Parameter(torch.zeros(512, 300)), nn.Parameter(torch.zeros(SMALLEST - 1))
    optimizer = AdamW8bit([large], lr=1e-3)
    large.grad = gradient(large, 0)
    optimizer.step()
    assert kept_bytes(optimizer) / large.numel() < 2.04
    other = AdamW8bit([small], lr=1e-3)
    small.grad = gradient(small, 0)
    other.step()
    assert kept_bytes(other) == 8 * small.numel(), "fp32, as AdamW's"


@pytest.mark.parametrize("code", [SIGNED, ROOTS], ids=["mean", "root"])
def test_codes_keep_the_relative_size(code: LogCode) -> None:
    shares = torch.logspace(0, torch.log10(torch.tensor(code.least)).item(), 1000)
    for chance in (0.0, 0.3, 0.999):
        again = code.decode(code.encode(shares, torch.full_like(shares, chance)))
        assert ((again / shares).log2().abs() < 1 / code.octave + 1e-4).all()
    assert code.decode(code.encode(torch.tensor([1.0, 0.0]), torch.zeros(2))).tolist() == [1.0, 0.0]


@pytest.mark.parametrize("code", [SIGNED, ROOTS], ids=["mean", "root"])
def test_codes_are_right_on_average(code: LogCode) -> None:
    chance = torch.linspace(0, 1, 20_001)[:-1]
    for share in (0.97, 0.3123, 0.001, 2 * code.least, *([0.3 * code.least] if code.sinks else [])):
        again = code.decode(code.encode(torch.full_like(chance, share), chance)) ** code.power
        assert again.double().mean().item() == pytest.approx(share**code.power, rel=1e-3)
    tiny = ROOTS.decode(ROOTS.encode(torch.tensor([1e-30]), torch.tensor([0.999])))
    assert tiny.item() == pytest.approx(ROOTS.least), (
        "never zero: a small root under the mean would be a leap"
    )


def test_small_tensors_move_as_adamws_do() -> None:
    mine, theirs = (nn.Parameter(torch.linspace(-1, 1, 50)) for _ in range(2))
    eight = AdamW8bit([mine], lr=0.01, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1)
    plain = torch.optim.AdamW([theirs], lr=0.01, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1)
    for step in range(6):
        mine.grad, theirs.grad = gradient(mine, step), gradient(theirs, step)
        eight.step()
        plain.step()
    torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-6)


def test_large_tensors_move_nearly_as_adamws_do() -> None:
    scale = torch.logspace(-2, 2, 256).repeat(20)[:5000]  # numbers of every size in each block
    mine, theirs = (nn.Parameter(torch.zeros(5000)) for _ in range(2))
    eight, plain = AdamW8bit([mine], lr=0.01), torch.optim.AdamW([theirs], lr=0.01)
    for step in range(40):
        mine.grad = gradient(mine, step, scale) + 0.3 * scale
        theirs.grad = mine.grad.clone()
        eight.step()
        plain.step()
    apart = (mine - theirs).detach()
    assert apart.norm() / theirs.detach().norm() < 0.07
    assert abs(apart.mean()) < 0.01 * theirs.detach().abs().mean(), "right on average"


def trained(make: Callable[[Any], Optimizer], steps: int = 300) -> float:
    torch.manual_seed(0)
    student, teacher = (nn.Sequential(nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, 64)) for _ in range(2))
    optimizer, scale, losses = make(student.parameters()), torch.logspace(-2, 1, 64), []
    for _ in range(steps):
        x = torch.randn(64, 64) * scale
        loss = (student(x) - teacher(x).detach()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return sum(losses[-50:]) / 50


def test_a_training_reaches_adamws_loss() -> None:
    eight = trained(lambda parameters: AdamW8bit(parameters, lr=2e-3))
    plain = trained(lambda parameters: torch.optim.AdamW(parameters, lr=2e-3))
    start = trained(lambda parameters: torch.optim.SGD(parameters, lr=0.0))
    assert start > 10 * plain
    assert eight == pytest.approx(plain, rel=0.05)


def forgotten() -> float:
    """What is left of sqrt(v), over what is right, where half of a block's gradients become a hundredth."""
    parameter = nn.Parameter(torch.zeros(SMALLEST))
    optimizer = AdamW8bit([parameter], lr=0.0, betas=(0.9, 0.99))
    even = (torch.arange(SMALLEST) % 2).bool()
    for step in range(320):
        parameter.grad = torch.where(even & torch.tensor(step >= 20), 0.01, 1.0)
        optimizer.step()
    state = optimizer.state[parameter]
    root = (ROOTS.decode(state["root"].float()) * state["root_scale"]).flatten()[even].mean().item()
    right = (1 - 0.99**20) * 0.99**300 + 0.01**2 * (1 - 0.99**300)
    return root / right**0.5


def test_chance_lets_small_changes_through(monkeypatch: pytest.MonkeyPatch) -> None:
    assert forgotten() == pytest.approx(1, abs=0.05)
    encode = LogCode.encode
    monkeypatch.setattr(
        adamw8bit.LogCode,
        "encode",
        lambda code, shares, chance: encode(code, shares, torch.full_like(chance, 0.5)),
    )
    assert forgotten() > 1.5, "the nearest code is the one that it was"


def test_blocks_are_padded_and_signs_kept() -> None:
    parameter = nn.Parameter(torch.zeros(17, 257))
    optimizer = AdamW8bit([parameter], lr=1.0, betas=(0.0, 0.999), weight_decay=0.0)
    parameter.grad = gradient(parameter, 3)
    optimizer.step()
    assert torch.equal(parameter.detach().sign(), -parameter.grad.sign())
    state = optimizer.state[parameter]
    assert state["mean"].shape == (-(-17 * 257 // BLOCK), BLOCK)
    assert state["mean"].flatten()[17 * 257 :].count_nonzero() == 0
    mean, _ = adamw8bit._means(state, parameter)
    torch.testing.assert_close(mean, parameter.grad, rtol=0.095, atol=1e-3)
