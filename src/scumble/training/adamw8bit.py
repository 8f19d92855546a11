"""AdamW whose two running means are kept in 8 bits each (after Dettmers et al., 2022, arXiv:2110.02861).

Legend: m and v the running means of the gradient and of its square, in blocks of 256; a the largest m, or root of v, in
a block, in fp32; q a code.

    m     sign and 7 bits:  |m| / a = 2^(-(127 - q) / 8), from 1 down to 2^-15.8; q = 0 is zero
    v     8 bits:       sqrt(v) / a = 2^(-(255 - q) / 16), from 1 down to 2^-15.9; q = 0 is zero

The codes are logarithmic, because Adam divides one by the root of the other: what counts is the relative error, and it
is the same for the small numbers of a block as for its large ones. Rounding is by chance, up or down, so that m and v
are right on average: with beta2 = 0.999 v changes by less in a step than the width of a code, and would stay for ever
where the nearest code is taken. The chance comes from the step and the tensor's number, and so is the same after a
resume and in every process.

Below its least number m becomes that or zero, by chance too; v becomes that and never zero: a small root under m would
be a leap.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, overload

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import Optimizer

BLOCK = 256
"""Numbers that share a scale."""

SMALLEST = 4096
"""Tensors with fewer numbers keep both means in fp32, as bitsandbytes does: they cost nothing, and norms, biases and
the like are what errors are felt in."""

SPREAD = 0x9E3779B1
"""Sets the seeds of neighbouring steps and tensors far apart (2^32 over the golden ratio)."""


class LogCode(NamedTuple):
    """Magnitudes in a block as powers of a step down from the largest."""

    top: int
    """The code of the largest; 0 is zero."""
    octave: int
    """Codes to a factor of two."""
    power: int
    """To which power the magnitudes are to be right on average."""
    sinks: bool
    """Whether what is below the least number may become zero."""

    @property
    def least(self) -> float:
        """The smallest share of the largest that is not zero."""
        return float(2 ** (-(self.top - 1) / self.octave))

    def encode(self, shares: Tensor, chance: Tensor) -> Tensor:
        """Shares of the block's largest, in [0, 1] -> codes, fp32; by `chance`, in [0, 1)."""
        place = self.top + self.octave * torch.log2(shares)
        lower = place.floor()
        width = self.power * math.log(2) / self.octave
        upper = chance < torch.expm1((place - lower) * width) / math.expm1(width)
        codes = (lower + upper).clamp_(1, self.top)
        if self.sinks:
            codes = torch.where(shares < self.least, (chance * self.least < shares).float(), codes)
        return torch.where(shares > 0, codes, 0.0)

    def decode(self, codes: Tensor) -> Tensor:
        """The inverse, on average."""
        return torch.where(codes > 0, torch.exp2((codes - self.top) / self.octave), 0.0)


SIGNED, ROOTS = LogCode(127, 8, power=1, sinks=True), LogCode(255, 16, power=2, sinks=False)
"""The codes of |m| and of sqrt(v)."""


class AdamW8bit(Optimizer):
    """AdamW (Loshchilov & Hutter, 2019) that keeps about 2 bytes for each number that trains, where AdamW keeps 8.

    State of a parameter: `step`; `mean` and `root`, uint8 in blocks, with `mean_scale` and `root_scale`, fp32; of a
    small one `exp_avg` and `exp_avg_sq`, fp32. Parameters are fp32.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Move every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        number = 0
        for group in self.param_groups:
            for parameter in group["params"]:
                number += 1
                if parameter.grad is not None:
                    self._move(parameter, parameter.grad, group, number)
        return loss

    def _move(self, parameter: Tensor, grad: Tensor, group: dict[str, Any], number: int) -> None:
        state, (beta1, beta2) = self.state[parameter], group["betas"]
        small = parameter.numel() < SMALLEST
        if not state:
            state["step"] = 0
            if small:
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(grad), torch.zeros_like(grad)
            else:
                state |= _blank(parameter)
        state["step"] += 1
        step, rate = state["step"], float(group["lr"])
        if small:
            mean, square = state["exp_avg"], state["exp_avg_sq"]
        else:
            mean, square = _means(state, grad)
        mean.lerp_(grad, 1 - beta1)
        square.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        root = square.sqrt()
        if not small:
            _keep(state, mean, root, seed=(step * SPREAD + number) % 2**63)
        parameter.mul_(1 - rate * group["weight_decay"])
        divisor = (root / math.sqrt(1 - beta2**step)).add_(group["eps"])
        parameter.addcdiv_(mean, divisor, value=-rate / (1 - beta1**step))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See torch's, which would turn codes into numbers of the parameter's dtype."""
        super().load_state_dict(state_dict)
        for state in self.state.values():
            for name in ("mean", "root"):
                if name in state:
                    state[name] = state[name].to(torch.uint8)


def _blank(parameter: Tensor) -> dict[str, Tensor]:
    blocks = -(-parameter.numel() // BLOCK)
    codes = {
        name: torch.zeros(blocks, BLOCK, dtype=torch.uint8, device=parameter.device)
        for name in ("mean", "root")
    }
    scales = {f"{name}_scale": torch.zeros(blocks, 1, device=parameter.device) for name in codes}
    return codes | scales


def _means(state: dict[str, Tensor], like: Tensor) -> tuple[Tensor, Tensor]:
    """m and v, in the shape of `like`, new."""
    codes = state["mean"].float()
    negative = codes > SIGNED.top
    mean = SIGNED.decode(codes - 128 * negative).mul_(state["mean_scale"])
    mean = torch.where(negative, -mean, mean)
    root = ROOTS.decode(state["root"].float()).mul_(state["root_scale"])
    return _whole(mean, like), _whole(root, like).square_()


def _keep(state: dict[str, Any], mean: Tensor, root: Tensor, seed: int) -> None:
    """The inverse of `_means`, for m and the root of v."""
    draw = torch.Generator(mean.device).manual_seed(seed)
    for name, code, numbers in (("mean", SIGNED, mean), ("root", ROOTS, root)):
        blocks = _blocks(numbers)
        most = blocks.abs().amax(1, keepdim=True)
        shares = blocks.abs() / most.clamp_min(torch.finfo(most.dtype).tiny)
        chance = torch.rand(blocks.shape, generator=draw, device=blocks.device)
        codes = code.encode(shares, chance)
        if code is SIGNED:
            codes += 128 * ((blocks < 0) & (codes > 0))
        state[name].copy_(codes)
        state[f"{name}_scale"].copy_(most)


def _blocks(numbers: Tensor) -> Tensor:
    flat = numbers.reshape(-1)
    return F.pad(flat, (0, -flat.numel() % BLOCK)).view(-1, BLOCK)


def _whole(blocks: Tensor, like: Tensor) -> Tensor:
    return blocks.view(-1)[: like.numel()].view(like.shape)
