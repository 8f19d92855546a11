"""JSON lines: every event as one line of `events.jsonl` in the run's folder, for programs.

A resumed run appends. Its `Started` line has `first_step`: of the lines before, those with a later step were
done again. Numbers that JSON can't hold are the strings "nan", "inf" and "-inf".
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from scumble.training.events import Event

NAME = "events.jsonl"


class JsonLinesSink:
    """Appends events to `<folder>/events.jsonl`, flushed line by line."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / NAME
        # A process that was killed may have left half a line: end it, so that the next has a line of its own.
        torn = path.exists() and path.stat().st_size > 0 and path.read_bytes()[-1:] != b"\n"
        self._file = path.open("a", encoding="utf-8")
        if torn:
            self._file.write("\n")

    def handle(self, event: Event) -> None:
        """Write one line."""
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        row = {"event": type(event).__name__, "time": now}
        fields = {field.name: getattr(event, field.name) for field in dataclasses.fields(event)}
        self._file.write(json.dumps(row | plain(fields), allow_nan=False, ensure_ascii=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def plain(value: Any) -> Any:
    """`value` in what JSON can hold: dataclasses as objects, paths and anything else unknown as text."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if value is None or isinstance(value, bool | int | str):
        return value
    return str(value)
