"""The table of dialects and families runs on some of its cells, and every peer in them agrees."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("peft")
pytest.importorskip("lycoris")


def test_peers_and_scumble_agree_on_each_others_files(benchmark_named: Callable[[str], Any]) -> None:
    dialects = benchmark_named("dialects")
    dialects.quiet()
    table = dialects.measure(["diffusers", "kohya", "lycoris"], ["lora", "loha"])
    assert len(table) == 6
    lora = table["kohya", "lora"]
    assert (lora.reads, lora.writes, lora.round_trip) == ("yes", "yes", 0.0)
    assert lora.their_file.keys() == {"lycoris-lora"} and lora.our_file.keys() == {
        "diffusers",
        "lycoris-lora",
    }
    assert table["diffusers", "lora"].their_file.keys() == {"diffusers"}
    assert table["lycoris", "loha"].their_file.keys() == {"lycoris-lora"}
    assert table["kohya", "loha"].writes.startswith("refused: it holds lora, not loha")
    for cell in table.values():
        for number in (*cell.their_file.values(), *cell.our_file.values()):
            assert isinstance(number, float) and number < 1e-5
    lines = dialects.markdown(table).splitlines()
    assert sum(line.startswith(("| diffusers |", "| kohya |", "| lycoris |")) for line in lines) == 6
