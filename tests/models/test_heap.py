"""Heap: what was freed is given back, and a base that is discarded takes nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from scumble.adapters import Adapter, LoraSettings
from scumble.models import FAMILIES

ALONE = """
import torch
from pathlib import Path
from scumble.models.heap import give_back, tight

MIB = 2**20

def resident():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmRSS:"))

torch.ones(40 * MIB // 4)  # after this glibc keeps what is smaller
with tight(True):
    give_back()
    before = resident()
    large, small = [], []
    for _ in range(64):
        large.append(torch.ones(MIB // 4))
        small.append(torch.ones(256))
    assert resident() - before > 60 * MIB
    del large
    assert resident() - before < 8 * MIB and len(small) == 64
"""
"""In a process of its own: what a whole suite left behind comes and goes meanwhile."""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's")
def test_what_lies_between_small_tensors_is_given_back() -> None:
    source = Path(__file__).parents[2] / "src"
    done = subprocess.run(
        [sys.executable, "-c", ALONE],
        env={**os.environ, "PYTHONPATH": str(source)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_a_discarded_base_has_no_weights_and_keeps_what_was_put_in() -> None:
    base = FAMILIES.get("sd1").tiny()
    adapter = Adapter.inject(base.roots, ("attention", "text_encoder.attention"), LoraSettings(rank=2))
    trained = {name: parameter.clone() for name, parameter in adapter.named_parameters()}
    adapter_parameters = {id(parameter) for parameter in adapter.parameters()}
    base.discard()
    left = [
        p
        for module in base.modules().values()
        for p in module.parameters()
        if id(p) not in adapter_parameters
    ]
    assert left and not any(parameter.numel() for parameter in left)
    assert all(torch.equal(trained[name], parameter) for name, parameter in adapter.named_parameters())
