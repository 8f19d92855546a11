"""Recompute: blocks have names, patterns find them, and what fits none is refused."""

from __future__ import annotations

import pytest

from scumble.errors import ModelError
from scumble.models import FAMILIES
from scumble.models.recompute import selected


def test_blocks_are_called_as_layers_are() -> None:
    base = FAMILIES.get("sd1").tiny()
    paths = list(base.recomputable)
    assert "unet.down_blocks.0.resnets.0" in paths and "unet.mid_block.resnets.1" in paths
    assert any(path.endswith("transformer_blocks.0") for path in paths)
    assert any(path.startswith("text_encoder.") for path in paths)
    assert "unet.mid_block.resnets.0" not in paths  # diffusers always keeps it
    assert selected(("unet.up_blocks.*",), base.recomputable, "x") == tuple(
        path for path in paths if path.startswith("unet.up_blocks.")
    )


def test_what_fits_no_block_is_refused_by_name() -> None:
    base = FAMILIES.get("sd1").tiny()
    with pytest.raises(ModelError, match=r"'unet\.up\.\*' fits none of the \d+ blocks"):
        base.train_memory(checkpointing=("unet.up.*",))
    with pytest.raises(ModelError, match="settled when a run is put together"):
        base.train_memory(checkpointing="auto")
    with pytest.raises(ModelError, match="names no blocks"):
        selected(("*",), {}, "a base")
