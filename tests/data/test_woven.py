"""Woven batches: the formula of prior preservation, the law of Batches, and a later start."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice

import pytest
import torch

from scumble.data.record import Batch
from scumble.data.woven import Onward, Woven, weave
from scumble.errors import DataError
from scumble.models.family import Conditioning, Frame


class Counted:
    """Batches whose rows say which they are: a number by position, of this dataset."""

    def __init__(self, name: str, batch_size: int, *, size: int = 2, embedded: str = "") -> None:
        self.name, self.batch_size, self.samples, self.size = name, batch_size, 5, size
        self.embedded = embedded

    @property
    def fingerprint(self) -> str:
        return self.name

    def start(self, number: int, *, process: int = 0, processes: int = 1) -> Iterator[Batch]:
        while True:
            first = (number * processes + process) * self.batch_size
            positions = range(first, first + self.batch_size)
            values = torch.tensor([float(position) for position in positions])
            latents = values[:, None, None, None].expand(-1, 4, self.size, self.size).clone()
            yield Batch(
                latents=latents,
                conditioning=Conditioning(values[:, None, None]) if self.embedded else None,
                captions=tuple(f"{self.name} {self.embedded}" for _ in positions),
                frame=Frame.plain(self.batch_size, 8, 8),
                weight=torch.ones(self.batch_size),
                keys=tuple(f"{self.name}{position}" for position in positions),
                positions=tuple(positions),
            )
            number += 1

    def with_text_embeddings(self) -> Counted:
        return Counted(self.name, self.batch_size, size=self.size, embedded="embedded")


def rows(batches: list[Batch]) -> list[tuple[str, int, float, float]]:
    return [
        (batch.keys[row], batch.positions[row], batch.weight[row].item(), batch.latents[row].sum().item())
        for batch in batches
        for row in range(len(batch))
    ]


def woven(batch_size: int) -> Woven:
    return Woven(Counted("i", batch_size), Counted("c", batch_size), weight=0.25)


def test_the_mean_of_the_rows_is_the_formula() -> None:
    """mean(instance) + lambda * mean(prior) (Ruiz et al. 2023, eq. 2), over any number of micro-batches."""
    batches = list(islice(woven(3).start(0), 4))
    losses = torch.rand(4, 6, generator=torch.Generator().manual_seed(0))
    total = sum(((batch.weight * loss).sum() for batch, loss in zip(batches, losses, strict=True)), start=0)
    instance, prior = losses[:, 0::2], losses[:, 1::2]
    torch.testing.assert_close(total / 24, instance.mean() + 0.25 * prior.mean())
    assert [key[0] for key in batches[0].keys] == ["i", "c"] * 3


def test_any_division_shows_the_same_pictures() -> None:
    whole = rows(list(islice(woven(4).start(0), 3)))
    assert [position for _, position, _, _ in whole] == list(range(24))
    two = [woven(2).start(0, process=process, processes=2) for process in range(2)]
    assert rows([next(two[number % 2]) for number in range(6)]) == whole
    assert rows(list(islice(woven(1).start(0), 12))) == whole
    assert rows(list(islice(woven(4).start(2), 1))) == whole[16:]


def test_a_mask_counts_for_its_half_only() -> None:
    first, second = next(Counted("i", 2).start(0)), next(Counted("c", 2).start(0))
    assert weave(first, second, 1.0).mask is None
    masked = replace(first, mask=torch.full((2, 1, 2, 2), 0.5))
    mask = weave(masked, second, 1.0).mask
    assert mask is not None and mask[:, 0, 0, 0].tolist() == [0.5, 1.0, 0.5, 1.0]


def test_text_is_woven_too() -> None:
    batch = next(woven(2).with_text_embeddings().start(1))
    assert batch.conditioning is not None and batch.conditioning.tokens.flatten().tolist() == [2, 2, 3, 3]
    assert batch.captions == ("i embedded", "c embedded") * 2
    assert next(woven(2).start(0)).conditioning is None


def test_what_can_not_be_woven_is_refused() -> None:
    with pytest.raises(DataError, match="2 and of 3"):
        Woven(Counted("i", 2), Counted("c", 3), weight=1)
    with pytest.raises(DataError, match=r"i0 and c0.*\(2, 2\) and \(4, 4\)"):
        next(Woven(Counted("i", 1), Counted("c", 1, size=4), weight=1).start(0))


def test_the_weight_is_part_of_what_a_resume_compares() -> None:
    prints = {
        Woven(Counted(a, 1), Counted(b, 1), weight=w).fingerprint
        for a, b, w in (("i", "c", 1.0), ("i", "c", 0.5), ("c", "i", 1.0))
    }
    assert len(prints) == 3 and woven(1).fingerprint == woven(4).fingerprint


def test_onward_continues_with_embedded_text() -> None:
    later = Onward(woven(2), 3)
    assert (later.batch_size, later.samples, later.fingerprint) == (4, 5, woven(2).fingerprint)
    there = list(islice(later.start(1, process=1, processes=2), 2))
    assert rows(there) == rows(list(islice(woven(2).start(4, process=1, processes=2), 2)))
    assert there[0].conditioning is not None
