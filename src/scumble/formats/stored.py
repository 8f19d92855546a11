"""Stored: a tensor as it lies in its file, for those who rename it, reshape it, look at it or write it again.

To import torch takes longer than to read and write a file of 150 MB. A `Stored` knows dtype, shape and bytes; what
else a tensor is asked for, it asks torch, which is imported then: its other attributes and operators are those of the
tensor over the same bytes, and torch's functions take it for one. So codecs read and write without a word of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from scumble.tensor_files.dtypes import DTYPES, code_for, dtype_of, word_of

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_AT_ONCE = 2**18
"""Numbers that are looked at together: as many as fit a processor's cache."""


class Stored:
    """A tensor of a file: `shape`, `code` (its dtype's name in a header), and bytes, or None where only the header
    was read."""

    def __init__(self, code: str, shape: Sequence[int], content: np.ndarray[Any, Any] | None) -> None:
        """`content`: (bytes,) uint8; taken, not copied."""
        self.code, self.shape, self.content = code, tuple(shape), content

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return len(self.shape)

    @property
    def itemsize(self) -> int:
        """Bytes of one number."""
        return DTYPES[self.code].itemsize

    @property
    def dtype(self) -> torch.dtype:
        """torch's."""
        return dtype_of(self.code)

    @cached_property
    def tensor(self) -> Tensor:
        """The tensor over the same bytes; without values where there are none."""
        import torch

        if self.content is None:
            return torch.empty(self.shape, dtype=self.dtype, device="meta")
        content = self.content if self.content.ctypes.data % self.itemsize == 0 else self.content.copy()
        return torch.from_numpy(content).view(self.dtype).view(self.shape)

    def numel(self) -> int:
        """How many numbers."""
        return math.prod(self.shape)

    def is_floating_point(self) -> bool:
        """Whether the numbers are no integers."""
        return bool(DTYPES[self.code].not_finite)

    def reshape(self, *shape: Any) -> Stored | Tensor:
        """The same bytes in another shape."""
        sizes = tuple(shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape)
        known = math.prod(size for size in sizes if size != -1)
        if -1 in sizes and known:
            sizes = tuple(self.numel() // known if size == -1 else size for size in sizes)
        if min(sizes, default=0) < 0 or math.prod(sizes) != self.numel():
            return self.tensor.reshape(sizes)  # with torch's own error
        return Stored(self.code, sizes, self.content)

    def flatten(self, start_dim: int = 0) -> Stored | Tensor:
        """The same bytes with the dimensions from `start_dim` on as one."""
        return self.reshape(*self.shape[:start_dim], -1)

    def item(self) -> float:
        """The one number in it."""
        name = DTYPES[self.code].numpy
        if name and self.content is not None and self.numel() == 1:
            return cast(float, self.content.view(name).item())
        return self.tensor.item()

    def finite(self) -> bool:
        """Whether no number is NaN or infinity."""
        limit = DTYPES[self.code].not_finite
        if not limit or self.content is None:
            return True
        bits = self.content.view(f"<u{self.itemsize}")
        sign = bits.dtype.type(2 ** (8 * self.itemsize - 1) - 1)
        pieces = (bits[begin : begin + _AT_ONCE] for begin in range(0, len(bits), _AT_ONCE))
        return all(int((piece & sign).max()) < limit for piece in pieces)

    def __len__(self) -> int:
        return self.shape[0]

    def __float__(self) -> float:
        return float(self.item())

    def __bool__(self) -> bool:
        return bool(self.item())

    def __repr__(self) -> str:
        return f"Stored({self.code}, {self.shape})"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # what Python itself looks for
            raise AttributeError(name)
        return getattr(self.tensor, name)

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: object,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """A function of torch on such tensors: on those over the same bytes."""
        return func(*map(_torch, args), **{name: _torch(value) for name, value in (kwargs or {}).items()})


def _operator(name: str) -> Callable[..., Any]:
    return lambda self, *others: getattr(self.tensor, name)(*others)


for _name in ("add", "sub", "mul", "truediv", "matmul", "pow"):
    for _side in ("", "r"):
        setattr(Stored, f"__{_side}{_name}__", _operator(f"__{_side}{_name}__"))
for _name in ("getitem", "neg", "abs", "eq", "ne", "lt", "le", "gt", "ge"):
    setattr(Stored, f"__{_name}__", _operator(f"__{_name}__"))
Stored.__hash__ = object.__hash__  # type: ignore[method-assign]


def _torch(value: Any) -> Any:
    """`value` with torch's tensors for stored ones, in lists and tuples too."""
    if isinstance(value, Stored):
        return value.tensor
    return type(value)(map(_torch, value)) if type(value) in (list, tuple) else value


def code_of(tensor: Tensor) -> str | None:
    """The name in a header of a tensor's dtype; None where safetensors has none."""
    return cast(str, tensor.code) if isinstance(tensor, Stored) else code_for(tensor.dtype)


def dtype_name(tensor: Tensor) -> str:
    """torch's name for a tensor's dtype: "float16"."""
    if isinstance(tensor, Stored):
        return DTYPES[tensor.code].name
    return word_of(tensor.dtype)


def bytes_of(tensor: Tensor) -> memoryview:
    """A tensor's numbers as they are written."""
    if isinstance(tensor, Stored) and tensor.content is not None:
        return cast(memoryview, tensor.content.data)
    import torch

    whole = tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8)
    return cast(memoryview, whole.numpy().data)


def scalar(value: float, beside: Tensor | None) -> Tensor:
    """`value` as one number of fp32: stored where `beside` is."""
    if isinstance(beside, Stored):
        with np.errstate(over="ignore"):
            number = np.array(value, dtype="<f4")
        return cast("Tensor", Stored("F32", (), number.reshape(1).view(np.uint8)))
    import torch

    return torch.tensor(value)


def numbers_of(tensor: Tensor) -> np.ndarray[Any, Any]:
    """A tensor's numbers for numpy: fp64 as they are, all others as fp32."""
    name = DTYPES[tensor.code].numpy if isinstance(tensor, Stored) else ""
    if not isinstance(tensor, Stored) or tensor.content is None or (not name and tensor.itemsize == 1):
        wide = tensor.detach().cpu()
        return cast("np.ndarray[Any, Any]", (wide if wide.itemsize == 8 else wide.float()).numpy())
    if name:
        found = tensor.content.view(name)
        return found.reshape(tensor.shape).astype("<f8" if name == "<f8" else "<f4", copy=False)
    bits = tensor.content.view("<u2").astype("<u4") << 16  # bf16 is the upper half of fp32
    return bits.view("<f4").reshape(tensor.shape)
