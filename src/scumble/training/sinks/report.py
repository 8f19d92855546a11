"""Report: a run as one page, `<folder>/report.html`, with pictures by step, curves, settings and notes.

The page holds its own numbers as JSON, so a resumed run goes on with the curves of the first.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from pathlib import Path

from scumble.training.events import Event, Finished, HeldOut, Noted, Previewed, Saved, Started
from scumble.training.sinks.page import Pictures, render
from scumble.training.sinks.record import RunRecord

NAME = "report.html"
_DATA = re.compile(r'<script type="application/json" id="run">(.*?)</script>', re.DOTALL)


class ReportSink:
    """Writes the page anew, atomically, at the start, at pictures, saves, held-out losses and the end."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / NAME
        self._record = RunRecord(name=folder.resolve().name)
        self._pictures = Pictures(folder)

    def handle(self, event: Event) -> None:
        """Take one event; refresh the page at those that show."""
        if isinstance(event, Started) and event.first_step and self.path.exists():
            self._continue(event.first_step)
        self._record.add(event)
        if isinstance(event, Started | Saved | Previewed | HeldOut | Finished):
            self.refresh()

    def close(self) -> None:
        """Write what came since the last refresh."""
        if self._record.started:
            self.refresh()

    def refresh(self) -> None:
        """Write the page: all of it under another name first, so that a reader never sees half."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = render(self._record, self._pictures)
        handle, temporary = tempfile.mkstemp(dir=self.path.parent, prefix=".report-", suffix=".html")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
            os.chmod(temporary, 0o644)
            os.replace(temporary, self.path)
        except BaseException:
            os.unlink(temporary)
            raise

    def _continue(self, step: int) -> None:
        try:
            self._record = read_record(self.path)
        except (OSError, ValueError, TypeError) as error:
            text = f"The report of the first {step} steps could not be read; its curves are missing: {error}"
            self._record.add(Noted(step, text))


def read_record(path: Path) -> RunRecord:
    """The numbers inside a report.

    Raises:
        OSError: the file can't be read.
        ValueError: it isn't a report.
        TypeError: another version wrote it.
    """
    found = _DATA.search(path.read_text(encoding="utf-8"))
    if not found:
        raise ValueError(f"{path} holds no run data")
    return RunRecord.from_json(json.loads(found.group(1)))
