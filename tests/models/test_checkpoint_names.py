"""Checkpoint names: the tensor that is named is the one that the loader reads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from scumble.errors import ModelError
from scumble.models.checkpoint_names import layer_marks
from tests.models import original


@pytest.mark.parametrize("linear", [False, True], ids=["sd1", "sd2"])
def test_every_weight_is_found_where_it_is(tmp_path: Path, linear: bool) -> None:
    tensors = load_file(original.write(tmp_path / "base.safetensors", linear))
    unet, _, text = original.parts(linear)
    marks = layer_marks({name: tuple(tensor.shape) for name, tensor in tensors.items()}, "base")
    expected = {f"unet.{name}": tensor for name, tensor in unet.state_dict().items()}
    prefix = "" if any(name.startswith("text_model.") for name in text.state_dict()) else "text_model."
    expected |= {f"text_encoder.{prefix}{name}": tensor for name, tensor in text.state_dict().items()}
    missing = {name for name in expected if name not in marks}
    assert missing <= {"text_encoder.text_model.embeddings.position_ids"}
    for name, tensor in expected.items():
        if name in marks:
            mark = marks[name]
            ((begin, end),) = mark.rows
            assert torch.equal(tensors[mark.name][begin:end], tensor), name
            assert mark.shape == tuple(tensor.shape)


def test_what_is_laid_out_otherwise_is_refused() -> None:
    with pytest.raises(ModelError, match="not laid out"):
        layer_marks({"model.diffusion_model.input_blocks.0.0.weight": (4, 4, 3, 3)}, "base")
