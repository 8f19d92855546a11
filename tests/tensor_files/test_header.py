"""Headers: what is no whole .safetensors file is refused in a sentence, for an adapter as for a base."""

from __future__ import annotations

import json
import pickle
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from scumble.errors import FormatError, ModelError, ScumbleError
from scumble.formats import container
from scumble.models import configs
from scumble.tensor_files.header import is_pickle, read
from scumble.tensor_files.lazy_tensors import LazyTensors

WHOLE = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def written(path: Path, header: Any, content: bytes = b"\0" * 8) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content)
    return path


def test_it_tells_shapes_dtypes_and_places(tmp_path: Path) -> None:
    numbers = {"a": torch.ones(2, 3), "b": torch.zeros(4, dtype=torch.float16), "ids": torch.arange(2)}
    save_file(numbers, tmp_path / "a.safetensors", metadata={"for": "all"})
    header = read(tmp_path / "a.safetensors")
    assert header.shapes == {"a": (2, 3), "b": (4,), "ids": (2,)} and header.metadata == {"for": "all"}
    assert header.entries["b"].code == "F16" and header.parameters == 10 and header.dtype == "F32"
    content = (tmp_path / "a.safetensors").read_bytes()
    entry = header.entries["a"]
    assert content[header.start :][entry.begin : entry.end] == numbers["a"].numpy().tobytes()
    assert header.start + header.size == len(content)


def test_no_tensors_are_a_header_too(tmp_path: Path) -> None:
    header = read(written(tmp_path / "a.safetensors", {"__metadata__": {"a": "b"}}, b""))
    assert (header.size, header.parameters, header.dtype, header.shapes) == (0, 0, "", {})


LIES: list[tuple[Any, str]] = [
    (b"{not json", "its header is not valid JSON"),
    (b'{"a": 1, "a": 2}', "a name occurs twice"),
    ([1, 2], "its header is not a table"),
    ({"a": 3}, "malformed"),
    ({"a": {"dtype": "F32", "shape": [2]}}, "malformed"),
    ({"a": WHOLE | {"data_offsets": [8]}}, "malformed"),
    ({"a": WHOLE | {"data_offsets": [8, 0]}}, "can't have -8 bytes"),
    ({"a": WHOLE | {"data_offsets": [-8, 0]}}, "impossible shape or position"),
    ({"a": WHOLE | {"shape": "large"}}, "impossible shape or position"),
    ({"a": WHOLE | {"shape": [3]}}, "can't have 8 bytes"),
    ({"a": WHOLE | {"dtype": 32}}, "dtype that is no word"),
    ({"a": WHOLE | {"shape": [20], "data_offsets": [0, 80]}}, "cut short"),
    ({"a": WHOLE, "b": WHOLE}, "expected 8"),
    ({"a": {"dtype": "F16", "shape": [2], "data_offsets": [0, 4]}}, "belong to no tensor"),
    ({"a": WHOLE, "__metadata__": {"n": 1}}, "metadata that is not text"),
]


@pytest.mark.parametrize(("header", "said"), LIES)
def test_a_header_that_lies_is_refused_by_file(tmp_path: Path, header: Any, said: str) -> None:
    """Who reads a base hears a ModelError of it, who reads an adapter a FormatError, in the same words."""
    path = written(tmp_path / "one.safetensors", header)
    for reader, error in ((read, FormatError), (configs.read_header, ModelError)):
        with pytest.raises(error, match=rf"one\.safetensors.*{said}.*(Download|copy) it again"):
            reader(path)
    with pytest.raises(FormatError, match=said):
        container.read_header(path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "empty"),
        (b"abc", "no valid header length"),
        (b"version https://git-lfs.github.com/spec/v1\n" * 3, "Git LFS pointer"),
        (b"<!DOCTYPE html><html></html>", "web page"),
        (b"\n<html><body></body></html>", "web page"),
        (b"PK\x03\x04" + b"\0" * 40, "is a pickle"),
        (pickle.dumps({"a": 1}), "is a pickle"),
        ((2**40).to_bytes(8, "little") + b"{}", "its header claims"),
    ],
)
def test_another_kind_of_file_is_called_what_it_is(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "one.safetensors"
    path.write_bytes(content)
    for reader in (read, configs.read_header, container.read_header):
        with pytest.raises(ScumbleError, match=said):
            reader(path)


def test_a_dtype_that_nobody_knows_is_told_and_not_read(tmp_path: Path) -> None:
    path = written(tmp_path / "a.safetensors", {"a": {**WHOLE, "dtype": "F4"}})
    assert read(path).entries["a"].code == "F4"
    for reader in (LazyTensors, container.read_header):
        with pytest.raises(FormatError, match=r"has dtype 'F4'\. Known: F64, F32"):
            reader(path)


def test_a_long_header_begins_like_a_pickle_and_is_none() -> None:
    assert not is_pickle((640).to_bytes(8, "little")) and is_pickle(b"\x80\x02}q\0....")
