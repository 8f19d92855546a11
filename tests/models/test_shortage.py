"""Shortage: errors of memory are known by what torch, numpy and Python say, and give back what they held."""

from __future__ import annotations

import weakref

import pytest
import torch

from scumble.errors import OutOfMemory
from scumble.models.shortage import pass_of, recover, shortage_of, telling

CUDA = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 23.64 GiB of which 1.20 GiB is "
    "free. Including non-PyTorch memory, this process has 22.43 GiB memory in use."
)
MPS = (
    "MPS backend out of memory (MPS allocated: 8.00 GB, max allowed: 9.07 GB). Tried to allocate 256.00 MB on private "
    "pool."
)


def of_the_host() -> RuntimeError:
    """A real one."""
    with pytest.raises(RuntimeError) as found:
        torch.empty(1 << 55, dtype=torch.uint8)
    return found.value


def test_what_was_asked_for_and_what_was_free_is_read_from_the_error() -> None:
    lack = shortage_of(torch.cuda.OutOfMemoryError(CUDA))
    assert lack is not None and lack.memory == "GPU memory"
    assert str(lack) == "2 GiB more were asked for, and 1.20 GiB of 23.64 GiB were free."
    host = shortage_of(of_the_host())
    assert host is not None and host.memory == "memory"
    assert str(host) == "33554432.00 GiB more were asked for."
    assert str(shortage_of(MemoryError())) == "How much was asked for is not said."
    numpy = shortage_of(MemoryError("Unable to allocate 7.45 GiB for an array with shape (1000000000,)"))
    assert str(numpy) == "7.45 GiB more were asked for."


@pytest.mark.parametrize(
    ("text", "gpu"),
    [
        (MPS, True),
        ("CUDA error: out of memory", True),
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", True),
        ("DefaultCPUAllocator: not enough memory: you tried to allocate 4096 bytes.", False),
        ("[Errno 12] Cannot allocate memory", False),
    ],
)
def test_every_library_says_it_in_its_own_way(text: str, gpu: bool) -> None:
    lack = shortage_of(RuntimeError(text))
    assert lack is not None and lack.gpu == gpu


def test_other_errors_are_something_else() -> None:
    assert shortage_of(RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)")) is None
    assert shortage_of(ValueError("out of memory")) is None
    with pytest.raises(RuntimeError, match="shapes"), telling("it was drawn", "Take less."):
        raise RuntimeError("shapes differ")


def test_it_is_told_what_was_done_and_what_to_do() -> None:
    with (
        pytest.raises(
            OutOfMemory, match=r"^Out of memory while it was drawn\. 3355.* GiB more .* Take less\.$"
        ) as told,
        telling("it was drawn", lambda: "Take less."),
    ):
        torch.empty(1 << 55, dtype=torch.uint8)
    assert told.value.exit_code == 6
    with (
        pytest.raises(
            OutOfMemory, match=r"^Out of memory while it was read\. Take less\. Nothing is lost\.$"
        ),
        telling("it was proven", "Nothing is lost."),
    ):
        raise OutOfMemory("Out of memory while it was read. Take less.")


def test_what_the_failed_work_held_is_given_back() -> None:
    held: list[weakref.ref[torch.Tensor]] = []

    def work() -> None:
        large = torch.zeros(1000)
        held.append(weakref.ref(large))
        torch.empty(1 << 55, dtype=torch.uint8)

    try:
        work()
    except RuntimeError as error:
        assert held[0]() is not None
        recover(error)
        assert held[0]() is None


def test_forward_and_backward_are_told_apart() -> None:
    class Greedy(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: object, grad: torch.Tensor) -> torch.Tensor:
            return torch.empty(1 << 55, dtype=torch.uint8)

    assert pass_of(of_the_host()) == "forward pass"
    out = Greedy.apply(torch.ones(1, requires_grad=True)).sum()  # type: ignore[no-untyped-call]
    with pytest.raises(RuntimeError) as found:
        out.backward()
    assert shortage_of(found.value) is not None and pass_of(found.value) == "backward pass"
