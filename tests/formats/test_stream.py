"""Streaming: what is not changed is copied bit for bit, and a file is whole or not there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from scumble.errors import FormatError
from scumble.formats.container import TensorFile, save
from scumble.formats.stream import rewrite, write_streamed
from scumble.tensor_files.lazy_tensors import LazyTensors

TENSORS = {
    "a": torch.randn(5, 3),
    "b": torch.randn(7, 2).half(),
    "c.weight": torch.randn(4, 4, 3, 3).bfloat16(),
    "ids": torch.arange(6),
    "one": torch.tensor(3.0),
}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A file as the library writes it."""
    path = tmp_path / "source.safetensors"
    save_file(TENSORS, path, {"format": "pt", "who": "ü"})
    return path


def test_tensors_come_one_by_one(source: Path) -> None:
    lazy = LazyTensors(source)
    assert (
        set(lazy) == set(TENSORS) and len(lazy) == 5 and lazy.header.metadata == {"format": "pt", "who": "ü"}
    )
    for name, tensor in TENSORS.items():
        assert torch.equal(lazy[name], tensor) and lazy.header.shapes[name] == tuple(tensor.shape)
    with pytest.raises(KeyError):
        lazy["nowhere"]


def test_changed_tensors_change_and_the_rest_is_copied(source: Path, tmp_path: Path) -> None:
    target, told = tmp_path / "new" / "target.safetensors", []
    rewrite(source, target, {"b": lambda t: t * 2, "one": lambda t: t + 1}, {"k": "v"}, told.append)
    written = load_file(target)
    expected = {**TENSORS, "b": TENSORS["b"] * 2, "one": TENSORS["one"] + 1}
    assert written.keys() == expected.keys() and sorted(told) == ["b", "one"]
    assert all(torch.equal(written[name], tensor) for name, tensor in expected.items())
    assert LazyTensors(target).header.metadata == {"k": "v"}
    assert [p.name for p in target.parent.iterdir()] == [target.name]


def test_nothing_changed_is_the_same_bytes(tmp_path: Path) -> None:
    source, target = tmp_path / "source.safetensors", tmp_path / "target.safetensors"
    save(TensorFile(TENSORS, {"format": "pt"}), source)
    rewrite(source, target, {}, LazyTensors(source).header.metadata)
    assert target.read_bytes() == source.read_bytes()


def test_an_error_on_the_way_leaves_what_was_there(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "target.safetensors"
    target.write_bytes(b"before")

    def fail(_: torch.Tensor) -> torch.Tensor:
        raise FormatError("no")

    with pytest.raises(FormatError, match=r"^no$"):
        rewrite(source, target, {"b": fail}, {})
    assert target.read_bytes() == b"before" and len(list(tmp_path.iterdir())) == 2


def test_tensors_that_are_made_one_at_a_time_are_the_file_of_all_at_once(tmp_path: Path) -> None:
    target, made = tmp_path / "streamed.safetensors", list[str]()

    def value(name: str) -> torch.Tensor:
        made.append(name)
        return TENSORS[name]

    entries = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in TENSORS.items()}
    write_streamed(target, entries, value, {"format": "pt"})
    assert sorted(made) == sorted(TENSORS)
    save(TensorFile(TENSORS, {"format": "pt"}), tmp_path / "whole.safetensors")
    assert target.read_bytes() == (tmp_path / "whole.safetensors").read_bytes()


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(b"x" * 100)
    with pytest.raises(FormatError, match="not a safetensors file"):
        LazyTensors(path)
