"""Training learns: a small adapter fits what it is shown again and again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from scumble.adapters.lora import LoraSettings
from scumble.rng import Streams
from scumble.training.loop import train
from scumble.training.optimizers import OptimizerSettings
from scumble.training.settings import TrainSettings
from tests.training.world import make_plan


@pytest.mark.parametrize("family", ["sd1", "sd2"])
def test_one_batch_is_learned_to_less_than_four_fifths_of_its_loss(tmp_path: Path, family: str) -> None:
    """One batch with one noise, 60 times: the loss falls by more than a fifth, though only attention is
    adapted."""
    settings = TrainSettings(
        steps=60, batch=4, checkpoint_every=0, optimizer=OptimizerSettings(learning_rate=3e-2)
    )
    plan, _ = make_plan(settings, family=family, adapter=LoraSettings(rank=8), targets="all-linear")
    batch = plan.phases[0].batches.batch([0, 1, 2, 3])  # type: ignore[attr-defined]
    plan.phases[0].batches.batch = lambda positions: batch  # type: ignore[attr-defined]
    objective = plan.phases[0].objective
    with torch.no_grad():
        before = objective(batch).mean().item()
    train(plan, tmp_path, settings, [], Streams(0))
    with torch.no_grad():
        after = objective(batch).mean().item()
    assert after < 0.8 * before
