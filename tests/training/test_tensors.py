"""tensors: those of a nested frozen value, in one order."""

from __future__ import annotations

import torch

from scumble.data.record import Batch
from scumble.models.family import Conditioning, Frame
from scumble.training.objective import Drawn
from scumble.training.tensors import mapped, sent, tensors_in


def drawn(captions: tuple[str, ...] = ("a", "b")) -> Drawn:
    batch = Batch(
        latents=torch.ones(2, 4, 4, 4),
        conditioning=Conditioning(torch.ones(2, 7, 3), pooled=torch.ones(2, 5)),
        captions=captions,
        frame=Frame.plain(2, 8, 8),
        weight=torch.ones(2),
        keys=("x", "y"),
        positions=(0, 1),
    )
    return Drawn(batch, torch.zeros(2, 4, 4, 4), torch.tensor([1, 2]))


def test_every_tensor_is_met_once_and_the_rest_is_kept() -> None:
    value = drawn()
    found = tensors_in(value)
    assert len(found) == 9 and found[0] is value.batch.latents and found[-1] is value.t
    doubled = mapped(value, lambda tensor: tensor * 2)
    assert [torch.equal(a * 2, b) for a, b in zip(found, tensors_in(doubled), strict=True)] == [True] * 9
    assert doubled.batch.captions == ("a", "b") and doubled.batch.mask is None
    assert torch.equal(value.noise, torch.zeros(2, 4, 4, 4)), "the given value is as it was"


def test_what_is_there_already_is_not_copied() -> None:
    value = drawn()
    assert sent(value, torch.device("cpu")) is value
    assert {tensor.device.type for tensor in tensors_in(sent(value, torch.device("meta")))} == {"meta"}
