"""The memory of a merge is measured on a toy of SDXL's layout, and the merge is checked there."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.mark.slow
def test_a_toy_is_merged_and_checked(
    benchmark_named: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merging = benchmark_named("merging")
    out = tmp_path / "merging.json"
    command = ["merging.py", "--base", "toy", "--folder", str(tmp_path), "--json", str(out)]
    monkeypatch.setattr(sys, "argv", command)
    merging.main()
    report = json.loads(out.read_text())
    assert report["layers changed"] > 50 and report["tensors equal"] > 50
    assert report["worst error in fp16 roundings"] <= 1.0
    assert 0.05 < report["peak GiB"] < 2 and report["within 8 GiB"]
    assert not list(tmp_path.glob("scumble-merging-*"))
