"""Batches made of other batches: two woven into one, and one that goes on from a later place.

Both keep the law of `Batches`, because each batch is made of those of the same number.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol, TypeVar

import torch
from torch import Tensor

from scumble.data.record import Batch, Batches
from scumble.errors import DataError

if TYPE_CHECKING:
    from scumble.models.family import Frame


T = TypeVar("T")


class Embeddable(Batches, Protocol):
    """Batches that can carry text embeddings, or leave the text to the objective."""

    def with_text_embeddings(self) -> Embeddable:
        """The same order, with embeddings by the text encoder as it is now."""


class Woven:
    """Two datasets side by side: rows 0, 2, 4, ... are the first's, rows 1, 3, 5, ... the second's.

    The mean over a step's rows is mean(first) + weight * mean(second): every first row counts 2 times, every second
    one 2 * weight times, and there are equally many. That holds under accumulation and in several processes, where
    means of equal parts are averaged. With class pictures as the second, it is prior preservation (Ruiz et al. 2023,
    "DreamBooth", eq. 2).

    A sample's position becomes 2 * position (+ 1 for the second's), so that no two rows share random numbers.
    """

    def __init__(self, first: Embeddable, second: Embeddable, *, weight: float) -> None:
        """`weight`: lambda of the formula.

        Raises:
            DataError: the batch sizes differ.
        """
        if first.batch_size != second.batch_size:
            raise DataError(
                f"Batches of {first.batch_size} and of {second.batch_size} pictures can't be woven into one."
            )
        self.first, self.second, self.weight = first, second, weight
        self.batch_size = 2 * first.batch_size
        self.samples = first.samples

    @property
    def fingerprint(self) -> str:
        """sha256 over both datasets and the weight."""
        text = f"{self.first.fingerprint} {self.second.fingerprint} {self.weight!r}"
        return hashlib.sha256(text.encode()).hexdigest()

    def start(self, number: int, *, process: int = 0, processes: int = 1) -> Iterator[Batch]:
        """See `Batches`."""
        for first, second in zip(
            self.first.start(number, process=process, processes=processes),
            self.second.start(number, process=process, processes=processes),
            strict=False,  # both are endless
        ):
            yield weave(first, second, self.weight)

    def with_text_embeddings(self) -> Woven:
        """See `Embeddable`."""
        first, second = self.first.with_text_embeddings(), self.second.with_text_embeddings()
        return Woven(first, second, weight=self.weight)


def weave(first: Batch, second: Batch, weight: float) -> Batch:
    """One batch of twice the size, rows in turn; see `Woven`.

    Raises:
        DataError: the pictures of the two are of different sizes.
    """
    from scumble.models.family import Conditioning, Frame

    if first.latents.shape != second.latents.shape:
        raise DataError(
            f"{first.keys[0]} and {second.keys[0]} are trained in different sizes, "
            f"{tuple(first.latents.shape[2:])} and {tuple(second.latents.shape[2:])} latents: one batch has one size."
        )
    count = len(first)
    rows = torch.arange(2 * count).view(2, count).T.flatten()

    def turns(one: Tensor, other: Tensor) -> Tensor:
        return torch.cat([one, other])[rows]

    def side(frame: Frame, other: Frame, name: str) -> Tensor:
        return turns(getattr(frame, name), getattr(other, name))

    said = None
    if first.conditioning is not None and second.conditioning is not None:
        said = Conditioning.cat([first.conditioning, second.conditioning])[rows]
    return Batch(
        latents=turns(first.latents, second.latents),
        conditioning=said,
        captions=_in_turn(first.captions, second.captions),
        frame=Frame(*(side(first.frame, second.frame, name) for name in ("original", "corner", "target"))),
        weight=turns(2 * first.weight, 2 * weight * second.weight),
        keys=_in_turn(first.keys, second.keys),
        positions=_in_turn(
            tuple(2 * position for position in first.positions),
            tuple(2 * position + 1 for position in second.positions),
        ),
        mask=None if first.mask is None and second.mask is None else turns(_mask(first), _mask(second)),
        shown=None if first.shown is None or second.shown is None else turns(first.shown, second.shown),
    )


def _in_turn(first: tuple[T, ...], second: tuple[T, ...]) -> tuple[T, ...]:
    return tuple(item for pair in zip(first, second, strict=True) for item in pair)


def _mask(batch: Batch) -> Tensor:
    return torch.ones_like(batch.latents[:, :1]) if batch.mask is None else batch.mask


class Later:
    """Batches from the `first`-th micro-batch of a process on: a phase does not see again what one before it saw."""

    def __init__(self, batches: Embeddable, first: int) -> None:
        self._batches, self._first = batches, first
        self.batch_size, self.samples = batches.batch_size, batches.samples

    @property
    def fingerprint(self) -> str:
        """That of the batches it goes on with."""
        return self._batches.fingerprint

    def start(self, number: int, *, process: int = 0, processes: int = 1) -> Iterator[Batch]:
        """See `Batches`."""
        return self._batches.start(number + self._first, process=process, processes=processes)

    def with_text_embeddings(self) -> Later:
        """See `Embeddable`."""
        return Later(self._batches.with_text_embeddings(), self._first)


class Onward(Later):
    """The same, with text embeddings by the text encoder as it is when they start: for a phase after the text encoder
    came to rest.

    Nothing that was embedded before is used, since a cache knows an embedding by the weights it was made with.
    """

    def start(self, number: int, *, process: int = 0, processes: int = 1) -> Iterator[Batch]:
        """See `Batches`."""
        return self.with_text_embeddings().start(number, process=process, processes=processes)
