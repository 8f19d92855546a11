"""Stored tensors: whatever one is asked, it answers as torch's tensor over the same bytes does."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor

from scumble.formats import inspect, write
from scumble.formats.container import TensorFile, load, read_header, save
from scumble.formats.inspection import change_norm
from scumble.formats.stored import DTYPES, Stored, bytes_of, code_of, dtype_name, dtype_of, numbers_of, scalar
from tests.formats.adapters_of import adapter

EVERY = pytest.mark.parametrize("code", DTYPES)


def numbers(code: str, *shape: int) -> Tensor:
    """Some numbers, exact in every dtype."""
    count = torch.Size(shape).numel()
    return (torch.arange(count) % 7 - (2 if DTYPES[code].not_finite else 0)).to(dtype_of(code)).reshape(shape)


def stored(tensor: Tensor) -> Stored:
    """The same numbers as they lie in a file."""
    content = np.frombuffer(bytes(bytes_of(tensor)), np.uint8).copy()
    return Stored(cast(str, code_of(tensor)), tensor.shape, content)


@EVERY
def test_it_answers_what_torch_answers(code: str) -> None:
    tensor = numbers(code, 3, 4, 1)
    mine = stored(tensor)
    assert (mine.shape, mine.ndim, mine.numel(), len(mine)) == ((3, 4, 1), 3, 12, 3)
    assert (mine.dtype, mine.itemsize) == (tensor.dtype, tensor.itemsize)
    assert mine.is_floating_point() == tensor.is_floating_point()
    assert dtype_name(cast(Tensor, mine)) == dtype_name(tensor)
    assert bytes_of(cast(Tensor, mine)) == bytes_of(tensor)
    assert np.array_equal(numbers_of(cast(Tensor, mine)), tensor.float().numpy())
    for change in (
        lambda t: t.reshape(4, 3),
        lambda t: t.reshape((2, -1)),
        lambda t: t.reshape(-1),
        lambda t: t.flatten(),
        lambda t: t.flatten(1),
    ):
        here, there = change(mine), change(tensor)
        assert isinstance(here, Stored)
        assert here.shape == there.shape and bytes_of(cast(Tensor, here)) == bytes_of(there)
    with pytest.raises(RuntimeError, match="invalid for input of size"):
        mine.reshape(5, -1)


@EVERY
def test_what_it_has_not_is_torchs(code: str) -> None:
    tensor = numbers(code, 3, 4)
    mine: Any = stored(tensor)
    wide = tensor.float()
    one = stored(numbers(code, 1) if code == "BOOL" else numbers(code, 5)[4:])
    assert float(one) == one.item() == one.tensor.item() and bool(one) == bool(one.tensor)
    for made, expected in (
        (mine.float(), wide),
        (mine[1].float(), wide[1]),
        (2.0 * mine.float(), 2.0 * wide),
        (torch.cat([mine, tensor]).float(), torch.cat([tensor, tensor]).float()),
        (torch.where(torch.ones(3, 4, dtype=torch.bool), mine, tensor).float(), wide),
    ):
        assert torch.equal(made, expected)
    if tensor.itemsize > 1:  # torch does no sums with the others
        assert torch.equal(tensor + mine, tensor + tensor)
        assert torch.equal(2 * mine, 2 * tensor) and torch.equal(mine * 2, 2 * tensor)
        assert torch.equal(mine - mine, tensor - tensor) and torch.equal(-mine, -tensor)
        assert torch.equal(mine == tensor, tensor == tensor)


def test_a_tensor_without_values_has_a_shape() -> None:
    mine = Stored("BF16", (2, 3), None)
    assert mine.shape == (2, 3) and mine.tensor.is_meta and mine.tensor.dtype is torch.bfloat16
    assert mine.finite()


@EVERY
@pytest.mark.parametrize("place", [0, 300_000])
def test_every_number_that_is_not_finite_is_found_and_no_other(code: str, place: int) -> None:
    """All bits of 8 and 16; of the others those at the limits."""
    dtype = dtype_of(code)
    bits = 8 * dtype.itemsize
    if not dtype.is_floating_point:
        assert stored(numbers(code, 40)).finite()
        return
    whole = {8: torch.uint8, 16: torch.int16, 32: torch.int32, 64: torch.int64}[bits]
    limits = torch.finfo(dtype)
    edges = torch.tensor([limits.max, limits.min, 0.0, torch.nan, torch.inf, -torch.inf])
    edges = edges.to(dtype)
    patterns = torch.arange(0, 2**bits, 97).to(whole).view(dtype) if bits <= 16 else edges
    filler = torch.zeros(place, dtype=dtype)
    for one in (*patterns[:: 1 if not place else 50], *edges):
        expected = bool(torch.isfinite(one.double()))
        found = stored(torch.cat([filler.view(whole), one.reshape(1).view(whole)]).view(dtype)).finite()
        assert found == expected, one


@pytest.mark.parametrize("value", [0.5, 1 / 3, -4.0, 1e39, 1e-46, 16777217.0])
def test_a_number_is_rounded_as_torch_rounds_it(value: float) -> None:
    mine = scalar(value, cast(Tensor, Stored("F16", (1,), None)))
    assert isinstance(mine, Stored) and bytes_of(mine) == bytes_of(torch.tensor(value))
    assert torch.equal(scalar(value, torch.ones(1)), torch.tensor(value))


def test_a_file_is_loaded_as_it_lies(tmp_path: Path) -> None:
    tensors = {code: numbers(code, 2, 3) for code in DTYPES}
    save(TensorFile(tensors, {"said": "so"}), tmp_path / "a.safetensors")
    file = load(tmp_path / "a.safetensors", stored=True)
    assert file.metadata == {"said": "so"} and set(file.tensors) == set(tensors)
    for code, tensor in file.tensors.items():
        assert isinstance(tensor, Stored) and torch.equal(tensor.tensor.float(), tensors[code].float())
        assert read_header(tmp_path / "a.safetensors").tensors[code].shape == (2, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_norms_are_those_of_the_whole_change(dtype: torch.dtype) -> None:
    for layer in adapter(alpha=3.0).layers.values():
        down, up = layer.tensors["down"].to(dtype), layer.tensors["up"].to(dtype)
        exact = float((0.75 * up.double().flatten(1) @ down.double().flatten(1)).norm())
        object.__setattr__(layer, "tensors", {"down": stored(down), "up": stored(up)})
        assert change_norm(layer) == pytest.approx(exact, rel=1e-6)


def test_torch_is_not_imported_to_look_at_a_file_or_to_convert_it(tmp_path: Path) -> None:
    paths = [path for path in adapter().layers if ".attn" in path]
    path = write(adapter(paths), tmp_path / "a.safetensors", "kohya", torch.float16)
    dialects = ("diffusers", "kohya", "peft", "attention-processors")
    commands = [["inspect", str(path)], ["verify", str(path)]]
    commands += [["convert", str(path), "--to", name, "--out", str(tmp_path / name)] for name in dialects]
    code = (
        "import sys\n"
        "from scumble.cli.main import main\n"
        f"for command in {commands!r}:\n"
        "    try:\n        main(command)\n"
        "    except SystemExit as end:\n        assert not end.code, (command, end.code)\n"
        "    assert not {'torch', 'diffusers', 'transformers'} & set(sys.modules), command\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{inspect(path).parameters:,}" in done.stdout
