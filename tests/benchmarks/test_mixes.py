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


def test_agreement_is_compared_with_exchanges_of_names(benchmark_named: Callable[[str], Any]) -> None:
    mixes = benchmark_named("mixes")
    names = ("woodcut", "neon", "zorbik", "plimmo")
    places = [(one, other) for one in names for other in names if one != other]
    numbers = {place: float(number) for number, place in enumerate(places)}
    same = mixes.agreement(numbers, numbers, places)
    # the names in their reverse order put the places in reverse order, which is as far from 0
    assert same == {"spearman": 1.0, "p": pytest.approx(2 / 24, abs=1e-3), "p within": 1 / 4}
    turned = mixes.agreement({place: -value for place, value in numbers.items()}, numbers, places)
    assert turned["spearman"] == -1.0
    # what the kind alone says agrees by exchanges of all names, and never within the kinds
    kinds = {place: float(place[0] in names[:2]) for place in places}
    assert mixes.agreement(kinds, kinds, places)["p within"] == 1.0
    assert mixes.agreement(dict.fromkeys(places, 1.0), numbers, places) == {
        "spearman": 0.0,
        "p": 1.0,
        "p within": 1.0,
    }
    assert len(list(mixes._exchanges([list("abcdefgh")]))) == mixes.TURNS


def test_what_is_lost_is_what_was_taught(benchmark_named: Callable[[str], Any]) -> None:
    mixes = benchmark_named("mixes")
    alone, gone = {"name": 0.4, "background": 1.0}, {"name": 0.1, "background": 1.0}
    assert mixes.lost(alone, gone) == pytest.approx(0.75) and mixes.lost(gone, alone) == pytest.approx(-3)
    assert (
        mixes.lost({"style": 0.0, "subject and colour": 1.0}, {"style": 0.5, "subject and colour": 0.0}) == 0
    )


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
    assert {"share of the other", "size of the other", "conflict"} <= set(report["directed"])
    for pair in report["pairs"]:
        assert pair["damage"] == pytest.approx(sum(pair["damages"]) / 2)
        assert sum(pair["directed"]["share of the other"]) == pytest.approx(1, abs=1e-3)
    # what was drawn is not drawn again
    sheet.unlink()
    again = tmp_path / "again.json"
    command = [*command[: command.index("--prompts")], "--scores", str(out), "--json", str(again)]
    monkeypatch.setattr(sys, "argv", [*command, "--sheet", str(sheet)])
    monkeypatch.setattr(benchmark_named("mixes"), "draw", None)
    benchmark_named("mixes").main()
    anew = json.loads(again.read_text())
    assert anew | {"machine": report["machine"]} == report and not sheet.exists()
