"""The benchmark of mixes: its statistics are right, and it runs on the picturebook from folders of runs to a sheet."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from scumble.adapters import Adapter, LoraSettings
from scumble.formats import write
from scumble.models.loading import load_base


def test_rank_correlations(benchmark_named: Callable[[str], Any]) -> None:
    mixes = benchmark_named("mixes")
    assert mixes.ranks([3.0, 1.0, 3.0, 2.0]) == [3.5, 1.0, 3.5, 2.0]
    assert mixes.spearman([1, 2, 3, 4], [1, 4, 9, 16]) == pytest.approx(1.0)
    assert mixes.spearman([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1.0)
    assert mixes.spearman([1, 2, 3], [5, 5, 5]) == 0.0
    # 1 - 6 (1 + 1) / (5 * 24)
    assert mixes.spearman([1, 2, 3, 4, 5], [2, 1, 3, 4, 5]) == pytest.approx(0.9)
    assert mixes.p_value([1, 2, 3, 4], [1, 2, 3, 4]) == pytest.approx(2 / 24, abs=0.02)


def test_a_folder_is_a_run_of_what_it_is_called(
    benchmark_named: Callable[[str], Any], tmp_path: Path
) -> None:
    mixes = benchmark_named("mixes")
    with pytest.raises(SystemExit, match="no run that is called like a style or a creature"):
        mixes.find([tmp_path])


@pytest.mark.slow
def test_pairs_are_drawn_and_judged(
    benchmark_named: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = load_base("picturebook", dtype=torch.float32, device=torch.device("cpu"))
    for seed, name in enumerate(("woodcut", "neon", "zorbik")):
        with Adapter.inject(base.roots, "attention", LoraSettings(rank=2)) as adapter, torch.no_grad():
            generator = torch.Generator().manual_seed(seed)
            for parameter in adapter.parameters():
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
            write(adapter.state(), tmp_path / name / "run")
    out, sheet = tmp_path / "mixes.json", tmp_path / "mixes.png"
    command = ["mixes.py", "--runs", *(str(tmp_path / name) for name in ("woodcut", "neon", "zorbik"))]
    command += ["--prompts", "3", "--steps", "2", "--json", str(out), "--sheet", str(sheet)]
    monkeypatch.setattr(sys, "argv", command)
    benchmark_named("mixes").main()
    report = json.loads(out.read_text())
    assert len(report["pairs"]) == 3 and set(report["alone"]) == {"woodcut", "neon", "zorbik"}
    assert all(pair["moved"] > 0 and 0 <= pair["predicted"]["conflict"] <= 1 for pair in report["pairs"])
    damages = [pair["damage"] for pair in report["pairs"]]
    assert damages == sorted(damages, reverse=True)
    for columns in report["spearman"].values():
        assert all(-1 <= told["spearman"] <= 1 and 0 < told["p"] <= 1 for told in columns.values())
    assert sheet.stat().st_size > 1000
