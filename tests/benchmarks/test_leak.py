"""Sixty rounds of load, forward, unload leave nothing behind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def test_nothing_stays_after_sixty_rounds(benchmark_named: Callable[[str], Any]) -> None:
    report = benchmark_named("leak").run(60, files=12, marks=3)
    assert report["base output equal, bit for bit"] and report["each file's output equal, bit for bit"]
    assert len(report["files"]) == 12 and len({name.split("-")[1] for name in report["files"][:-1]}) >= 5
    growth = report["growth"]
    assert growth["tensors"] == 0
    # Python's own caches settle late; a single kept layer would be dozens of objects and kilobytes a round
    assert growth["objects"] < 36 and growth["traced bytes"] < 36 * 1024
