"""Console: a run's progress for the person who watches, a live bar on a terminal or plain lines in a log."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.text import Text

from scumble.training.events import (
    Event,
    Finished,
    HeldOut,
    Noted,
    Previewed,
    Saved,
    Started,
    StepDone,
    StepSkipped,
)
from scumble.training.sinks.smoothing import Smoothed


class ConsoleSink:
    """Loss (smoothed), rate, time left and skipped steps, live on a terminal, now and then elsewhere."""

    def __init__(
        self,
        folder: Path,
        *,
        console: Console | None = None,
        line_seconds: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Without a terminal a line is written at the first step and then every `line_seconds` seconds."""
        self._console = console or Console(stderr=True)
        self._line_seconds, self._clock = line_seconds, clock
        self._loss, self._seconds = Smoothed(), Smoothed()
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._total = self._first = self._skipped = 0
        self._began = self._last_line = -float("inf")

    def handle(self, event: Event) -> None:
        """Show one event."""
        match event:
            case Started():
                self._start(event)
            case StepDone():
                self._step(event)
            case StepSkipped():
                self._skipped += 1
                pictures = ", ".join(event.pictures) or "unknown"
                again = f" ({event.in_a_row} in a row)" if event.in_a_row > 1 else ""
                self._say(f"step {event.step} skipped: {event.reason}; pictures {pictures}{again}", "yellow")
            case Saved():
                what = "adapter" if event.final else "checkpoint"
                self._say(f"step {event.step}: {what} saved, {event.path}", "green")
            case Previewed():
                for panel in event.panels:
                    moved = f"{panel.difference:.1f}/255 from the base"
                    self._say(f"step {event.step}: drew {panel.prompt!r}, {moved}, {panel.adapter}", "cyan")
            case HeldOut():
                difference = f"{event.adapter - event.base:+.5f} ± {event.interval:.5f}"
                self._say(
                    f"step {event.step}: held-out loss {event.adapter:.5f}, base {event.base:.5f}, "
                    f"difference {difference}{', best so far' if event.best else ''}",
                    "cyan",
                )
            case Noted():
                self._say(f"step {event.step}: {event.text}", "yellow")
            case Finished():
                self._stop()
                good = event.reason == "complete"
                word = "finished" if good else f"stopped ({event.reason})"
                skipped = f", {self._skipped} skipped" if self._skipped else ""
                where = f": {event.adapter}" if event.adapter else ""
                passed = duration(event.seconds)
                self._say(
                    f"{word} at step {event.step} of {self._total} after {passed}{skipped}{where}",
                    "bold green" if good else "bold yellow",
                )

    def close(self) -> None:
        """Give the terminal back."""
        self._stop()

    def _start(self, event: Started) -> None:
        self._total, self._first = event.total_steps, event.first_step
        again = f", going on after step {event.first_step}" if event.first_step else ""
        self._say(f"training in {event.run}, {event.total_steps} steps{again}", "bold")
        width = max((len(str(name)) for name in event.facts), default=0)
        for name, value in event.facts.items():
            self._say(f"  {name!s:<{width}}  {fact(value)}", "dim")
        self._began = self._clock()
        if self._console.is_terminal:
            self._bar = Progress(
                TextColumn("[bold]{task.description}"),
                BarColumn(bar_width=None),
                MofNCompleteColumn(),
                TextColumn("{task.fields[status]}"),
                console=self._console,
                expand=True,
            )
            self._task = self._bar.add_task(
                "", total=event.total_steps, completed=event.first_step, status=""
            )
            self._bar.start()

    def _step(self, event: StepDone) -> None:
        self._loss.add(event.loss)
        self._seconds.add(event.seconds)
        if self._bar is not None and self._task is not None:
            self._bar.update(
                self._task, completed=event.step, description=event.phase, status=self._status(event.step)
            )
            return
        now = self._clock()
        if now - self._last_line >= self._line_seconds:
            self._last_line = now
            self._say(f"{event.phase} {event.step}/{self._total}  {self._status(event.step)}", "")

    def _status(self, step: int) -> str:
        # The time left counts everything since the start, pictures and saves too; the rate only the steps.
        passed = self._clock() - self._began
        left = passed / max(step - self._first, 1) * (self._total - step)
        skipped = f"  skipped {self._skipped}" if self._skipped else ""
        return f"loss {self._loss.value:.4f}  {rate(self._seconds.value)}  {duration(left)} left{skipped}"

    def _say(self, text: str, style: str) -> None:
        # Text, not markup: a prompt may hold square brackets.
        self._console.print(Text(text, style=style), soft_wrap=True)

    def _stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = self._task = None


def rate(seconds: float) -> str:
    """Seconds a step, as steps/s or s/step, whichever is 1 or more."""
    if not seconds > 0:
        return "- steps/s"
    return f"{1 / seconds:.1f} steps/s" if seconds <= 1 else f"{seconds:.1f} s/step"


def duration(seconds: float) -> str:
    """Seconds as `0:42`, `3:07` or `1:02:03`."""
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def fact(value: object) -> str:
    """A fact for reading: numbers with separators, lists with commas."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.4g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {fact(item)}" for name, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(fact(item) for item in value)
    return str(value)
