"""How long reading a weight held in few bits takes: plain torch, and bitsandbytes where it is installed.

    pip install --no-deps --target /tmp/beside bitsandbytes
    PYTHONPATH=/tmp/beside OMP_NUM_THREADS=1 python benchmarks/decoding.py --clock cpu

One weight of 1280 x 1280 in each code and dtype, in turns in one process, and whether both give the same bits. Then a
transformer block's worth of work: a product of --rows rows with that weight, forward and backward, read anew in each,
over the same product of the plain weight.

Limit: writing the numbers, 2 or 4 bytes each.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from turns import CLOCKS, RESULTS, ratios, save

from scumble.models import codes as held
from scumble.models.codes import CODES
from scumble.models.kernels import installed
from scumble.models.quantized import quantize

SIDE = 1280
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall")
    parser.add_argument("--output", type=Path, default=RESULTS / "decoding.json")
    options = parser.parse_args()
    options.shape, options.dtype = "one weight", "all"
    weight = torch.randn(SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    steps: dict[str, Callable[[], Any]] = {}
    same: dict[str, bool] = {}
    for dtype_name, dtype in DTYPES.items():
        x = torch.randn(options.rows, SIDE, dtype=dtype, requires_grad=True)
        steps[f"plain, {dtype_name}, product"] = product(nn.Linear(SIDE, SIDE, bias=False).to(dtype), x)
        for name, code in CODES.items():
            kept = code.encode(weight)

            def read(code: Any = code, kept: Any = kept, dtype: Any = dtype) -> Tensor:
                return code.decode(*kept, weight.shape, dtype)  # type: ignore[no-any-return]

            model = nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(SIDE, SIDE, bias=False)])}).to(dtype)
            quantize(model, name, dtype)
            layer = model["blocks"][0]
            steps[f"{name}, {dtype_name}, torch"] = plainly(read)
            steps[f"{name}, {dtype_name}, torch, product"] = plainly(product(layer, x))
            if installed():
                steps[f"{name}, {dtype_name}, kernel"] = read
                steps[f"{name}, {dtype_name}, kernel, product"] = product(layer, x)
                same[f"{name}, {dtype_name}"] = torch.equal(read(), plainly(read)())
    now = CLOCKS[options.clock]
    seconds: dict[str, list[float]] = {step: [] for step in steps}
    for number in range(options.repeats + 1):
        for step, work in steps.items():
            start = now()
            work()
            if number:
                seconds[step].append(now() - start)
    over = {}
    for step in steps:
        name, dtype_name, *rest = step.split(", ")
        if "product" in rest and name != "plain":
            over[step] = f"plain, {dtype_name}, product"
        elif rest == ["torch"] and f"{name}, {dtype_name}, kernel" in steps:
            over[step] = f"{name}, {dtype_name}, kernel"
    found = ratios(seconds, over)
    for step, values in seconds.items():
        if "product" not in step:
            print(f"{step:20} {1e9 * sorted(values)[len(values) // 2] / SIDE**2:.2f} ns a weight")
    print("same bits:", same)
    save("decoding", options, "writing the numbers", ratios=found, seconds=seconds, same=same)


def plainly(work: Callable[[], Any]) -> Callable[[], Any]:
    """The same without kernels."""

    def done() -> Any:
        with patch.object(held, "kernel", lambda *_: None):
            return work()

    return done


def product(layer: nn.Module, x: Tensor) -> Callable[[], Any]:
    """Forward and backward of x Wᵀ, W frozen."""
    layer.requires_grad_(False)

    def done() -> Any:
        x.grad = None
        layer(x).sum().backward()

    return done


if __name__ == "__main__":
    main()
