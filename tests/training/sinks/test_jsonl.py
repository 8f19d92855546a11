"""JSON lines: one whole line for each event, whatever is in it."""

from __future__ import annotations

import json
import math
from pathlib import Path

from scumble.training.events import StepDone
from scumble.training.sinks.jsonl import JsonLinesSink, plain
from tests.training.sinks.runs import events, feed, loss


def rows(folder: Path) -> list[dict[str, object]]:
    def refuse(word: str) -> float:
        raise AssertionError(f"{word} is not JSON")

    lines = (folder / "events.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


def test_every_event_is_a_line_that_says_all(tmp_path: Path) -> None:
    feed(JsonLinesSink(tmp_path), events(tmp_path))
    written = rows(tmp_path)
    assert [row["event"] for row in written] == [type(event).__name__ for event in events(tmp_path)]
    steps = [row for row in written if row["event"] == "StepDone"]
    assert steps[4]["loss"] == loss(5)
    assert steps[4]["learning_rates"] == {"unet": 1e-3 * (1 - 5 / 40), "text_encoder": 1e-4}
    panel = next(row for row in written if row["event"] == "Previewed")["panels"][0]  # type: ignore[index]
    assert panel["prompt"] == "a <b>small</b> & red fox"


def test_lines_are_on_disk_at_once(tmp_path: Path) -> None:
    sink = JsonLinesSink(tmp_path)
    for number, event in enumerate(events(tmp_path, last=5), 1):
        sink.handle(event)
        assert len(rows(tmp_path)) == number


def test_a_resume_appends_and_ends_a_torn_line(tmp_path: Path) -> None:
    feed(JsonLinesSink(tmp_path), events(tmp_path, last=20))
    path = tmp_path / "events.jsonl"
    path.write_text(path.read_text(encoding="utf-8")[:-25], encoding="utf-8")
    feed(JsonLinesSink(tmp_path), events(tmp_path, first=20))
    lines = path.read_text(encoding="utf-8").splitlines()
    torn = len(list(events(tmp_path, last=20))) - 1
    assert not lines[torn].endswith("}")
    again = json.loads(lines[torn + 1])
    assert (again["event"], again["first_step"]) == ("Started", 20)
    assert json.loads(lines[-1])["event"] == "Finished"


def test_numbers_that_json_lacks_are_words(tmp_path: Path) -> None:
    sink = JsonLinesSink(tmp_path)
    sink.handle(StepDone(1, "adapter", math.nan, {"unet": 1e-3}, math.inf, 0.1, 4))
    sink.close()
    (row,) = rows(tmp_path)
    assert (row["loss"], row["gradient_norm"]) == ("nan", "inf")


def test_plain_values() -> None:
    assert plain({Path("a"): (1, {2.5}, None, True, Path("b"))}) == {"a": [1, [2.5], None, True, "b"]}
