"""Headers of a base's weights: what is no whole file is refused in a sentence."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from scumble.errors import ModelError
from scumble.models.configs import read_header

WHOLE = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def written(path: Path, header: Any, content: bytes = b"\0" * 8) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content)
    return path


def test_it_tells_shapes_dtypes_and_places(tmp_path: Path) -> None:
    numbers = {"a": torch.ones(2, 3), "b": torch.zeros(4, dtype=torch.float16)}
    save_file(numbers, tmp_path / "a.safetensors", metadata={"for": "all"})
    header = read_header(tmp_path / "a.safetensors")
    assert header.shapes == {"a": (2, 3), "b": (4,)} and header.metadata == {"for": "all"}
    assert header.tensors["b"][0] == "F16" and header.parameters == 10 and header.dtype == "F32"
    content = (tmp_path / "a.safetensors").read_bytes()
    begin, end = header.spans["a"]
    assert content[begin:end] == numbers["a"].numpy().tobytes()


@pytest.mark.parametrize(
    ("header", "said"),
    [
        (b"{not json", "its header is not JSON"),
        ([1, 2], "no table of tensors"),
        ({"a": 3}, "no table of tensors"),
        ({"a": {"dtype": "F32", "shape": [2]}}, "no table of tensors.*data_offsets"),
        ({"a": WHOLE | {"data_offsets": [8]}}, "no table of tensors"),
        ({"a": WHOLE | {"data_offsets": [8, 0]}}, "no table of tensors.*from 8 to 0"),
        ({"a": WHOLE | {"data_offsets": [-8, 0]}}, "no table of tensors"),
        ({"a": WHOLE | {"shape": "large"}}, "no table of tensors"),
        ({"a": WHOLE | {"data_offsets": [0, 80]}}, "cut off: it has"),
    ],
)
def test_a_header_that_is_none_is_refused_by_file(tmp_path: Path, header: Any, said: str) -> None:
    path = written(tmp_path / "base.safetensors", header)
    with pytest.raises(ModelError, match=rf"base\.safetensors is.*{said}"):
        read_header(path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "its size is 0 bytes"),
        (b"version https://git-lfs.github.com/spec/v1\n" * 3, "git-lfs pointer"),
        (b"<!DOCTYPE html><html></html>", "web page"),
        (b"PK\x03\x04" + b"\0" * 40, "never opened"),
    ],
)
def test_another_kind_of_file_is_called_what_it_is(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "base.safetensors"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=said):
        read_header(path)
