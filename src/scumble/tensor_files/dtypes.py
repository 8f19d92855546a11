"""Header dtypes: what the header of a .safetensors file calls the dtypes of numbers, and what torch and numpy do.

For those who read adapters and those who read base models. Importing it does not import torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, cast

if TYPE_CHECKING:
    import torch


class Dtype(NamedTuple):
    """A dtype of safetensors files."""

    name: str
    """torch's name for it."""
    itemsize: int
    """Bytes."""
    not_finite: int = 0
    """The smallest bits, without the sign, of what is no finite number; 0 for integers."""
    eps: float = 0.0
    """The distance from 1 to the next number; 0 for integers."""
    numpy: str = ""
    """numpy's name for it, where it has one."""


DTYPES = {
    "F64": Dtype("float64", 8, 0x7FF0000000000000, 2.0**-52, "<f8"),
    "F32": Dtype("float32", 4, 0x7F800000, 2.0**-23, "<f4"),
    "F16": Dtype("float16", 2, 0x7C00, 2.0**-10, "<f2"),
    "BF16": Dtype("bfloat16", 2, 0x7F80, 2.0**-7),
    "F8_E4M3": Dtype("float8_e4m3fn", 1, 0x7F, 2.0**-3),
    "F8_E5M2": Dtype("float8_e5m2", 1, 0x7C, 2.0**-2),
    "I64": Dtype("int64", 8, numpy="<i8"),
    "I32": Dtype("int32", 4, numpy="<i4"),
    "I16": Dtype("int16", 2, numpy="<i2"),
    "I8": Dtype("int8", 1, numpy="|i1"),
    "U8": Dtype("uint8", 1, numpy="|u1"),
    "BOOL": Dtype("bool", 1, numpy="|b1"),
}
"""Their names in a header -> what they are."""
_CODES = {dtype.name: code for code, dtype in DTYPES.items()}


def dtype_of(code: str) -> torch.dtype:
    """torch's dtype for a name in a header."""
    import torch

    return cast("torch.dtype", getattr(torch, DTYPES[code].name))


def code_for(dtype: torch.dtype) -> str | None:
    """The inverse of `dtype_of`; None where safetensors has no such dtype."""
    return _CODES.get(word_of(dtype))


def word_of(dtype: torch.dtype | str) -> str:
    """torch's name for a dtype, in a word: "bfloat16"."""
    return str(dtype).removeprefix("torch.")
