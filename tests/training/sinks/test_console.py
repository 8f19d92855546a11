"""Console: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import io
import itertools
from pathlib import Path

import pytest
from rich.console import Console

from scumble.training.events import Finished, Noted, Started, StepDone
from scumble.training.sinks.console import ConsoleSink, duration, fact, rate
from tests.training.sinks.runs import events, feed


def run(tmp_path: Path, terminal: bool, seconds: float, **options: float) -> str:
    """What is written when every look at the clock is `seconds` after the one before."""
    stream = io.StringIO()
    ticks = itertools.count(0, seconds)
    console = Console(file=stream, force_terminal=terminal, width=120, color_system=None)
    feed(
        ConsoleSink(tmp_path, console=console, clock=lambda: float(next(ticks)), **options), events(tmp_path)
    )
    return stream.getvalue()


def test_plain_lines_without_a_terminal(tmp_path: Path) -> None:
    text = run(tmp_path, terminal=False, seconds=1, line_seconds=10)
    lines = text.splitlines()
    assert "\x1b" not in text
    assert lines[0] == f"training in {tmp_path}, 40 steps"
    assert "  parameters  49,152" in lines
    progress = [line for line in lines if line.startswith("adapter ")]
    assert 3 <= len(progress) <= 10
    assert progress[0].startswith("adapter 1/40  loss 0.")
    assert "20.0 steps/s" in progress[0]
    assert any("skipped 1" in line for line in progress)
    assert any(
        "step 13 skipped: the loss is not finite (inf); pictures 7.png, 9.png" in line for line in lines
    )
    assert any(
        "held-out loss 0.17000, base 0.20000, difference -0.03000 ± 0.01000, best so far" in line
        for line in lines
    )
    assert any("drew 'a house', 0.0/255 from the base" in line for line in lines)
    assert any(line == "step 40: one <i>thing</i> to know" for line in lines)
    assert lines[-1].startswith("finished at step 40 of 40 after 0:02, 1 skipped: ")


def test_the_time_left_counts_what_is_not_steps(tmp_path: Path) -> None:
    stream = io.StringIO()
    now = [0.0]
    sink = ConsoleSink(
        tmp_path, console=Console(file=stream, width=120), clock=lambda: now[0], line_seconds=0
    )
    sink.handle(Started(tmp_path, 100, 50, {}, {}))
    now[0] = 60.0  # ten steps of a second each, and fifty seconds of pictures
    sink.handle(StepDone(60, "adapter", 0.1, {"unet": 1e-3}, 1.0, 1.0, 4))
    assert "going on after step 50" in stream.getvalue()
    assert "1.0 steps/s  4:00 left" in stream.getvalue()


def test_live_bar_on_a_terminal(tmp_path: Path) -> None:
    text = run(tmp_path, terminal=True, seconds=1)
    assert "40/40" in text
    assert "adapter" in text
    assert "left" in text
    assert "skipped 1" in text
    assert "finished at step 40 of 40" in text
    assert "[bold]" not in text


def test_square_brackets_are_text_and_not_markup(tmp_path: Path) -> None:
    stream = io.StringIO()
    sink = ConsoleSink(tmp_path, console=Console(file=stream, width=120))
    sink.handle(Noted(3, "[/red] [tag] stays"))
    assert stream.getvalue() == "step 3: [/red] [tag] stays\n"


def test_a_stop_says_why(tmp_path: Path) -> None:
    stream = io.StringIO()
    sink = ConsoleSink(tmp_path, console=Console(file=stream, width=200))
    sink.handle(Started(tmp_path, 10, 0, {}, {}))
    sink.handle(Finished(4, 3.0, None, "interrupted"))
    assert stream.getvalue().splitlines()[-1] == "stopped (interrupted) at step 4 of 10 after 0:03"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.05, "20.0 steps/s"), (1, "1.0 steps/s"), (2.5, "2.5 s/step"), (0, "- steps/s")]
)
def test_rate(seconds: float, text: str) -> None:
    assert rate(seconds) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (187, "3:07"), (3723, "1:02:03"), (-5, "0:00")]
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_fact() -> None:
    assert fact({"unet": 128, "on": True}) == "unet 128, on yes"
    assert fact([1234567, 0.00012345, "x"]) == "1,234,567, 0.0001234, x"
