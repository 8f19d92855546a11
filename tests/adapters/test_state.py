"""What is asked of an adapter as data."""

from __future__ import annotations

import pytest
import torch

from scumble.adapters.state import not_finite

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_every_tensor_that_is_not_finite_is_named(dtype: torch.dtype, bad: float) -> None:
    good = torch.linspace(-4, 4, 12).view(3, 4)
    broken = good.clone()
    broken[1, 2] = bad
    tensors = {
        "a": good.to(dtype),
        "b": broken.to(dtype),
        "c": good,
        "d": broken.double(),
        "e": torch.ones(0),
    }
    assert not_finite(tensors | {"whole": torch.tensor([1, 2])}) == ["b", "d"]
    assert not_finite({"a": good.to(dtype), "e": torch.ones(0), "largest": torch.tensor(6e4).half()}) == []
