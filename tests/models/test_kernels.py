"""Foreign kernels read what torch reads, bit for bit, or are not used. `make test-kernels` runs all of it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from scumble.models import kernels
from scumble.models.codes import BLOCK, CODES
from scumble.models.kernels import kernel

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def asked_anew() -> Iterator[None]:
    """What was found stays in no other test."""
    kernel.cache_clear()
    yield
    kernel.cache_clear()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["nf4", "fp8"])
def test_bitsandbytes_reads_every_bit_as_torch_does(name: str, dtype: torch.dtype) -> None:
    pytest.importorskip("bitsandbytes")
    code = CODES[name]
    assert kernel(code, "cpu", dtype, BLOCK) is not None
    for shape in ((64, 64), (7, 13, 3, 3), (1,), (1280, 77)):  # the last block is not full in some
        weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        codes, scales = code.encode(weight)
        read = code.decode(codes, scales, weight.shape, dtype)
        wide = scales.view(torch.bfloat16).float()
        assert torch.equal(read, code.read(codes, wide, dtype).view(-1)[: weight.numel()].view(shape))
        assert read.dtype == dtype and read.is_contiguous()


def test_there_is_none_for_int8() -> None:
    """Torch reads that as fast."""
    assert kernel(CODES["int8"], "cpu", torch.float32, BLOCK) is None


@pytest.mark.parametrize("there", [True, False])
def test_a_kernel_is_used_where_it_is(monkeypatch: pytest.MonkeyPatch, there: bool) -> None:
    used = []

    def made(code: kernels.Code, dtype: torch.dtype, block: int) -> kernels.Kernel:
        def read(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
            used.append(len(codes))
            return code.read(codes, scales[:, None], dtype).view(-1)

        return read

    monkeypatch.setattr(kernels, "installed", lambda: there)
    monkeypatch.setitem(kernels._MADE, "nf4", made)
    weight = torch.randn(3, BLOCK)
    codes, scales = CODES["nf4"].encode(weight)
    CODES["nf4"].decode(codes, scales, weight.shape, torch.float32)
    assert used == ([33, 3] if there else []), "the trial, then the weight"


def test_a_kernel_that_reads_otherwise_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def made(code: kernels.Code, dtype: torch.dtype, block: int) -> kernels.Kernel:
        return lambda codes, scales: code.read(codes, scales[:, None], dtype).view(-1) * (1 + 1e-6)

    monkeypatch.setattr(kernels, "installed", lambda: True)
    monkeypatch.setitem(kernels._MADE, "nf4", made)
    assert kernel(CODES["nf4"], "cpu", torch.float32, BLOCK) is None


def test_a_kernel_that_is_missing_on_a_device_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def made(code: kernels.Code, dtype: torch.dtype, block: int) -> kernels.Kernel:
        def read(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
            raise NotImplementedError("not on this device")

        return read

    monkeypatch.setattr(kernels, "installed", lambda: True)
    monkeypatch.setitem(kernels._MADE, "nf4", made)
    assert kernel(CODES["nf4"], "cpu", torch.float32, BLOCK) is None
