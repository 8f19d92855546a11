"""Dial: how strongly one adapter acts, one object that all of its layers read.

Turning an adapter up, down or off is one assignment, however many layers it has. Layers keep what they read
until some dial was turned.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from scumble.errors import AdapterError


@dataclass(frozen=True)
class Piece:
    """Neighbouring samples at which an adapter acts."""

    rows: slice
    """Of the batch; all of it is `slice(None)`."""
    strength: float | Tensor
    """For all of them, or one for each, (n,)."""


class Dial:
    """The strength of one adapter: a number, or one number per sample (B,).

    Strengths of B samples are repeated as a block over a batch of k B: [s0, s1] for four samples is
    [s0, s1, s0, s1]. That is the order in which classifier-free guidance repeats a batch
    (`torch.cat([latents] * 2)`).
    """

    __slots__ = ("_pieces", "_turn", "_value", "acts", "gain")

    turned = 0
    """How often any dial was turned: what was read at another count is read anew."""

    acts: bool
    """Whether it changes anything; strengths per sample count as acting. Read only: an attribute and no property,
    because every layer asks every resident's dial after a switch."""
    gain: Tensor | None
    """`value` once more, 0-dim fp32, for compiled code (see `compiling.py`). None: nobody asked."""
    _value: float | Tensor
    _turn: int
    _pieces: dict[int, tuple[Piece, ...]]

    def __init__(self, value: float | Tensor = 1.0) -> None:
        self._turn, self.gain = 0, None
        self.value = value

    @property
    def value(self) -> float | Tensor:
        """How much of the change is applied: 0 is the base, bit for bit; 1 as trained."""
        return self._value

    @value.setter
    def value(self, value: float | Tensor) -> None:
        self._value = value
        self.acts = isinstance(value, Tensor) or value != 0.0
        self._pieces = {}
        Dial.turned += 1
        if self.gain is not None:
            self.follow(self.gain.device)

    def follow(self, device: torch.device) -> None:
        """From now on `gain` is kept, on `device`."""
        # a new tensor each time: a backward pass that is still to come may need the old one
        value = 0.0 if isinstance(self._value, Tensor) else self._value
        self.gain = torch.full((), value, device=device)

    @property
    def turn(self) -> int:
        """Layers add the changes of their adapters in the order of their turns, and of one turn in the order in
        which they came in. Sums of floating-point numbers depend on it, in the last digits."""
        return self._turn

    @turn.setter
    def turn(self, turn: int) -> None:
        self._turn = turn
        Dial.turned += 1

    def pieces(self, x: Tensor) -> tuple[Piece, ...]:
        """Where in a batch `x` (N, ..., features) the adapter acts: neighbours at strengths other than 0.

        Raises:
            AdapterError: N is no multiple of the number of strengths.
        """
        if not isinstance(self._value, Tensor):
            return (Piece(slice(None), self._value),)
        samples = x.shape[0]
        found = self._pieces.get(samples)
        if found is None:
            check_samples(self._value, x)
            found = self._pieces[samples] = tuple(_pieces(self._value.to(x.device), samples))
        return found

    def __repr__(self) -> str:
        return f"Dial({self._value!r})"


def _pieces(strengths: Tensor, samples: int) -> list[Piece]:
    numbers, count = strengths.tolist(), len(strengths)
    if all(numbers):
        return [Piece(slice(None), _common(strengths, numbers, samples // count))]
    found = []
    for block in range(0, samples, count):
        start = 0
        while start < count:
            if numbers[start] == 0.0:
                start += 1
                continue
            stop = next((stop for stop in range(start, count) if numbers[stop] == 0.0), count)
            shared = _common(strengths[start:stop], numbers[start:stop])
            found.append(Piece(slice(block + start, block + stop), shared))
            start = stop
    return found


def _common(strengths: Tensor, numbers: list[float], times: int = 1) -> float | Tensor:
    """One number where all are equal."""
    return numbers[0] if len(set(numbers)) == 1 else strengths.repeat(times)


def check_samples(strengths: Tensor, x: Tensor) -> None:
    """
    Raises:
        AdapterError: the strengths (B,) can't be repeated over the samples of `x`.
    """
    if x.dim() < 2 or x.shape[0] % len(strengths):
        raise AdapterError(
            f"{len(strengths)} per-sample strengths can't be shared out over an input of shape "
            f"{tuple(x.shape)}. Give one number, or as many strengths as samples (or a divisor: they are "
            "repeated as a block)."
        )
