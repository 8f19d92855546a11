"""Lazy tensors: those of the file, of every dtype, each in memory of its own, and nothing of a file that lies."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from scumble.errors import FormatError
from scumble.tensor_files.lazy_tensors import LazyTensors


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.bool])
def test_tensors_of_every_kind(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {
        "a": (torch.arange(6) - 2).to(dtype).view(2, 3),
        "b": torch.ones((), dtype=dtype),
        "c": torch.empty(0, 4),
    }
    save_file(tensors, tmp_path / "x.safetensors", {"who": "ü"})
    lazy = LazyTensors(tmp_path / "x.safetensors")
    assert set(lazy) == set(tensors) and len(lazy) == 3 and lazy.header.metadata == {"who": "ü"}
    for name, tensor in tensors.items():
        assert torch.equal(lazy[name], tensor) and lazy[name].dtype == tensor.dtype
        assert lazy.header.shapes[name] == tuple(tensor.shape)
    assert "nowhere" not in lazy
    with pytest.raises(KeyError):
        lazy["nowhere"]


def test_what_is_read_is_nobody_elses(tmp_path: Path) -> None:
    save_file({"a": torch.ones(3)}, tmp_path / "x.safetensors")
    lazy = LazyTensors(tmp_path / "x.safetensors")
    lazy["a"].zero_()
    assert torch.equal(lazy["a"], torch.ones(3))


def test_a_file_that_shrank_is_one_error(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(300), "b": torch.ones(300)}, path)
    lazy = LazyTensors(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(FormatError, match="cut short while it was being read, in tensor"):
        [lazy[name] for name in lazy]
    path.unlink()
    with pytest.raises(FormatError, match="Can't open"):
        lazy["a"]
