"""The benchmark of loading takes turns between scumble and diffusers, and says what it measured."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from scumble.formats import read


def test_both_load_the_same_file_in_turns(benchmark_named: Callable[[str], Any], tmp_path: Path) -> None:
    loading = benchmark_named("loading")
    unet = loading.empty_unet("tiny")
    path = loading.write_with_diffusers(unet, tmp_path, 4, torch.float16)
    assert {layer.rank for layer in read(path).state.layers.values()} == {4}
    ours, theirs = loading.pipeline_of(unet), loading.pipeline_of(loading.twin(unet))
    times = loading.measure(path, ours, theirs, 3)
    assert {name: len(each) for name, each in times.items()} == {"scumble": 3, "diffusers": 3}
    report = loading.summary({name: [wall for wall, _ in each] for name, each in times.items()})
    assert report["scumble"]["least ms"] <= report["scumble"]["median ms"] <= report["scumble"]["most ms"]
    assert report["diffusers over scumble"]["median"] > 0


def test_the_summary_counts_ratios_round_by_round(benchmark_named: Callable[[str], Any]) -> None:
    report = benchmark_named("loading").summary(
        {"scumble": [9.0, 1.0, 2.0, 2.0], "diffusers": [9.0, 10.0, 30.0, 40.0]}
    )
    assert report["diffusers over scumble"] == {
        "median": 15.0,
        "least": 10.0,
        "most": 20.0,
        "first load": 1.0,
    }
    assert report["scumble"]["first ms"] == 9.0 and report["scumble"]["last ms"] == 2.0
