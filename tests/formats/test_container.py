"""The safetensors container: reproducible bytes, atomic writes, and headers that lie."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as some

from scumble.errors import FormatError
from scumble.formats import container, read
from scumble.formats.container import TensorFile, find, load, read_header, save, to_bytes


def packed(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(dtype: str = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def sample() -> TensorFile:
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(3, 4, generator=generator)
    tensors = {
        "b": wide.to(torch.float16)[:, :1],  # 6 bytes: misaligns what follows, and is not contiguous
        "a": wide,
        "d": wide.double(),
        "t": wide.T,
        "n": torch.tensor(3),
        "f8": wide.to(torch.float8_e4m3fn),
        "bf": wide.bfloat16(),
        "yes": wide > 0,
        "ümlaut": wide.to(torch.int8),
    }
    return TensorFile(tensors, {"z": "1", "a": 'ä\n"', "format": "pt"})


def test_our_bytes_load_with_the_library(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save(sample(), path)
    loaded = safetensors.torch.load_file(path)
    for name, tensor in sample().tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name].float(), tensor.float())
    with safetensors.safe_open(path, "pt") as opened:
        assert opened.metadata() == sample().metadata


def test_the_librarys_bytes_load_with_ours(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    tensors = {name: tensor.contiguous() for name, tensor in sample().tensors.items()}
    safetensors.torch.save_file(tensors, path, dict(sample().metadata))
    found = load(path)
    assert found.metadata == sample().metadata
    for name, tensor in tensors.items():
        assert found.tensors[name].dtype == tensor.dtype
        assert torch.equal(found.tensors[name].float(), tensor.float())
    header = read_header(path)
    assert {name: (t.shape, t.dtype) for name, t in header.tensors.items()} == {
        name: (t.shape, t.dtype) for name, t in tensors.items()
    }


def test_equal_content_gives_equal_bytes() -> None:
    file = sample()
    turned = TensorFile(dict(reversed(file.tensors.items())), dict(reversed(file.metadata.items())))
    assert to_bytes(file) == to_bytes(turned)


def test_every_tensor_is_aligned_to_its_item() -> None:
    content = to_bytes(sample())
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    for name, tensor in sample().tensors.items():
        assert (8 + length + header[name]["data_offsets"][0]) % tensor.itemsize == 0


LIES = {
    "zero length": (b"", "empty"),
    "three bytes": (b"abc", "not a safetensors"),
    "huge header claimed": ((2**40).to_bytes(8, "little") + b"{}", "header claims"),
    "negative length": (b"\xff" * 8 + b"{}", "not a safetensors"),
    "not json": (packed(b"{nonsense"), "not valid JSON"),
    "not utf-8": (packed(b'{"\xff": 1}'), "not valid JSON"),
    "a list": (packed([]), "not a table"),
    "deep": (packed(b"[" * 100_000), "not valid JSON"),
    "long number": (packed(b'{"a": ' + b"9" * 10_000 + b"}"), "not valid JSON"),
    "one name twice": (packed(b'{"a": 1, "a": 2}'), "occurs twice"),
    "entry is no table": (packed({"a": 3}), "malformed"),
    "no shape": (packed({"a": {"dtype": "F32", "data_offsets": [0, 8]}}, bytes(8)), "malformed"),
    "three offsets": (packed({"a": entry(offsets=(0, 8, 9))}, bytes(8)), "malformed"),
    "float shape": (packed({"a": entry(shape=[2.0])}, bytes(8)), "impossible shape"),
    "bool shape": (packed({"a": entry(shape=[True, 2])}, bytes(8)), "impossible shape"),
    "negative shape": (packed({"a": entry(shape=[-2])}, bytes(8)), "impossible shape"),
    "empty tensor": (packed({"a": entry(shape=[0], offsets=(0, 0))}), "is empty"),
    "unknown dtype": (packed({"a": entry(dtype="Q4")}, bytes(8)), "has dtype 'Q4'"),
    "dtype is a list": (packed({"a": {**entry(), "dtype": ["F32"]}}, bytes(8)), "dtype|malformed"),
    "shape lies": (packed({"a": entry(shape=[2**30, 2**30])}, bytes(8)), "can't have 8 bytes"),
    "cut short": (packed({"a": entry()}, bytes(7)), "cut short"),
    "left over": (packed({"a": entry()}, bytes(9)), "belong to no tensor"),
    "overlap": (packed({"a": entry(), "b": entry(offsets=(4, 12))}, bytes(12)), "expected 8"),
    "gap": (packed({"a": entry(), "b": entry(offsets=(12, 20))}, bytes(20)), "expected 8"),
    "reversed": (packed({"a": entry(offsets=(8, 0))}, bytes(8)), "can't have"),
    "metadata is no text": (packed({"__metadata__": {"a": 1}}), "not text"),
    "metadata is a list": (packed({"__metadata__": ["a"]}), "not text"),
    "long name": (packed({"a" * 5000: entry()}, bytes(8)), "5000 characters"),
    "a web page": (b"<!DOCTYPE html><html></html>", "web page"),
    "a git lfs pointer": (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS"),
    "a zip": (b"PK\x03\x04" + bytes(100), "pickle"),
    "a pickle": (pickle.dumps({"a": 1}), "pickle"),
}


@pytest.mark.parametrize(("content", "said"), LIES.values(), ids=LIES.keys())
def test_a_header_that_lies_is_one_clear_error(content: bytes, said: str, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    for reader in (read_header, load):
        with pytest.raises(FormatError, match=said) as caught:
            reader(path)
        assert len(str(caught.value)) < 500


def test_a_huge_header_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    with path.open("wb") as stream:  # a sparse file: 8 GiB that take no space
        stream.write((2**32).to_bytes(8, "little"))
        stream.truncate(2**33)
    tracemalloc.start()
    begin = time.perf_counter()
    with pytest.raises(FormatError, match="more than"):
        load(path)
    assert time.perf_counter() - begin < 5
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


def one_byte(number: int) -> dict[str, Any]:
    return entry("I8", [1], (number, number + 1))


LONG: dict[str, tuple[Callable[[], dict[str, Any]], int, str]] = {
    "tensors": (lambda: {f"{n}": one_byte(n) for n in range(100_000)}, 100_000, "no adapter has more than"),
    "layers": (
        lambda: {f"unet.{n}.{'x' * 200}.lora_A.weight": one_byte(n) for n in range(20_000)},
        20_000,
        "only one of the two factors",
    ),
    "words": (
        lambda: {"__metadata__": {f"{n}": "" for n in range(500_000)}, "a.b": entry()},
        8,
        "no adapter that is known",
    ),
    "one word": (
        lambda: {"__metadata__": {"ss": "[" * 8_000_000}, "a.b": entry()},
        8,
        "no adapter that is known",
    ),
}
"""Sound headers as long as they may be: what they hold, bytes of numbers, the error."""


@pytest.mark.parametrize("case", LONG)
def test_the_longest_headers_are_one_error_within_seconds(case: str, tmp_path: Path) -> None:
    make, numbers, said = LONG[case]
    (tmp_path / "a.safetensors").write_bytes(packed(make(), bytes(numbers)))
    assert (tmp_path / "a.safetensors").stat().st_size > 5 * 2**20
    begin = time.process_time()
    with pytest.raises(FormatError, match=said) as caught:
        read(tmp_path / "a.safetensors")
    # under one where nobody else works
    assert time.process_time() - begin < 2 and len(str(caught.value)) < 500
    tracemalloc.start()
    with contextlib.suppress(FormatError):
        read_header(tmp_path / "a.safetensors")
    assert tracemalloc.get_traced_memory()[1] < 160 * 2**20
    tracemalloc.stop()


@settings(max_examples=150, deadline=None)
@given(data=some.data())
def test_damaged_bytes_load_or_are_a_format_error(
    data: some.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    content = bytearray(to_bytes(TensorFile({"a": torch.ones(2), "b": torch.ones(1, 3)}, {"k": "v"})))
    for _ in range(data.draw(some.integers(1, 4))):
        content[data.draw(some.integers(0, len(content) - 1))] = data.draw(some.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "damaged.safetensors"
    path.write_bytes(content[: data.draw(some.integers(0, len(content)))])
    try:
        found = load(path)
    except FormatError:
        return
    assert sum(t.numel() * t.itemsize for t in found.tensors.values()) <= len(content)


def test_tensors_at_odd_places_are_read_too(tmp_path: Path) -> None:
    header = {"one": entry("I8", (1,), (0, 1)), "wide": entry("F32", (2,), (1, 9))}
    numbers = torch.tensor([1.5, -2.0])
    path = tmp_path / "odd.safetensors"
    path.write_bytes(packed(header, b"\x07" + numbers.numpy().tobytes()))
    loaded = load(path).tensors
    assert loaded["one"].tolist() == [7] and torch.equal(loaded["wide"], numbers)
    assert loaded["wide"].data_ptr() % 4 == 0


def test_who_looks_sees_the_header_before_any_weight_is_read(tmp_path: Path) -> None:
    save(sample(), tmp_path / "a.safetensors")
    torch.save({"a": torch.ones(2)}, tmp_path / "a.bin")
    seen: list[TensorFile] = []
    for name in ("a.safetensors", "a.bin"):
        file = load(tmp_path / name, seen.append)
        assert all(tensor.is_meta for tensor in seen[-1].tensors.values())
        assert {n: (t.dtype, t.shape) for n, t in seen[-1].tensors.items()} == {
            n: (t.dtype, t.shape) for n, t in file.tensors.items()
        }

    def refuse(_: TensorFile) -> None:
        raise FormatError("not this one")

    with pytest.raises(FormatError, match=r"^not this one$"):
        load(tmp_path / "a.safetensors", refuse)


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.safetensors"
    save(TensorFile({"a": torch.zeros(1)}), path)
    before = path.read_bytes()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(FormatError, match="No space left"):
        save(TensorFile({"a": torch.ones(1)}), path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]


def test_text_that_is_no_unicode_is_refused() -> None:
    with pytest.raises(FormatError, match="UTF-8"):
        to_bytes(TensorFile({"a": torch.zeros(1)}, {"k": "\ud800"}))


def test_find_in_folders(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="There is no file"):
        find(tmp_path / "nothing")
    with pytest.raises(FormatError, match=r"no \.safetensors"):
        find(tmp_path)
    (tmp_path / "optimizer.bin").write_bytes(b"x")
    (tmp_path / "pytorch_lora_weights.bin").write_bytes(b"x")
    assert find(tmp_path).name == "pytorch_lora_weights.bin"
    (tmp_path / "one.safetensors").write_bytes(b"x")
    assert find(tmp_path).name == "one.safetensors"
    (tmp_path / "two.safetensors").write_bytes(b"x")
    with pytest.raises(FormatError, match=r"2 \.safetensors files: one\.safetensors, two\.safetensors"):
        find(tmp_path)
    (tmp_path / container.WEIGHTS_NAME).write_bytes(b"x")
    assert find(tmp_path).name == container.WEIGHTS_NAME


@pytest.mark.parametrize("name", ["a.bin", "a.pt", "a.ckpt", "renamed.safetensors"])
def test_a_pickle_is_refused_without_running_its_payload(name: str, tmp_path: Path) -> None:
    canary = tmp_path / "canary"

    class Payload:
        def __reduce__(self) -> Any:
            return (Path.touch, (canary,))

    path = tmp_path / name
    torch.save({"w": Payload()}, path)
    with pytest.raises(FormatError, match=r"pickle.*Ask for"):
        load(find(path))
    path.write_bytes(pickle.dumps(Payload()))
    with pytest.raises(FormatError, match=r"pickle|no file of torch"):
        load(find(path))
    assert not canary.exists()


@pytest.mark.parametrize("length", [640, 896, 1152, 19280])
def test_a_header_whose_length_looks_like_a_pickle_is_none(length: int, tmp_path: Path) -> None:
    """Read as bytes, 640 is 80 02 and 19280 is PK: how a pickle and a zip begin."""
    header = json.dumps({"__metadata__": {"k": "v"}, "a": entry()}).encode()
    path = tmp_path / "a.safetensors"
    path.write_bytes(packed(header + b" " * (length - len(header)), bytes(8)))
    assert list(load(path).tensors) == ["a"]
