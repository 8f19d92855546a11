"""Needs: what is counted on the meta device is what is there on a real one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from scumble.models import FAMILIES
from scumble.models.loading import look_at
from scumble.models.needs import TRAINED_BYTES, kept_by, needs_of
from scumble.models.tiny import save


@pytest.mark.parametrize("family", ["sd1", "flux"])
def test_what_is_counted_without_weights_is_what_a_real_step_keeps(family: str, tmp_path: Path) -> None:
    look = look_at(save(family, tmp_path / "base"))
    found = needs_of(look.configs, look.facts, torch.float32, look.tokenizers)
    real = FAMILIES.get(family).tiny()
    pipeline = real.pipeline()
    modules = {name: getattr(pipeline, name) for name in ("vae", *real.roots)}
    assert {part.name: part.parameters for part in found.parts} == {
        name: sum(p.numel() for p in module.parameters()) for name, module in modules.items()
    }
    assert found.parts[0].name == next(iter(real.roots))
    assert found.weights == 4 * sum(part.parameters for part in found.parts)
    for checkpointing in (False, True):
        assert found.kept[checkpointing] == pytest.approx(kept_by(real, checkpointing), rel=0.02)
    assert found.kept[True] < found.kept[False]
    least, fastest = found.training(checkpointing=True), found.training(checkpointing=False)
    assert least is not None and fastest is not None and found.drawing() < least < fastest
    assert fastest == found.weights + TRAINED_BYTES * found.trained + found.kept[False]


def test_without_a_vocabulary_training_is_left_open(tmp_path: Path) -> None:
    look = look_at(save("sd1", tmp_path / "base"))
    found = needs_of(look.configs, look.facts)
    assert found.training(checkpointing=True) is None and found.drawing() == found.weights
