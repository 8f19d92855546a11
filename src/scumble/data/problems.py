"""Problem: one thing that is wrong with a dataset, as a value, so that all of them can be told at once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from scumble.errors import DataError

LISTED = 100
"""Problems that one error message lists; the rest is counted."""


class Refused(DataError):
    """A picture can't be trained on; `kind` says in a word why."""

    def __init__(self, kind: str, text: str) -> None:
        self.kind = kind
        super().__init__(text)


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: errors stop a run, warnings are told."""

    kind: str
    """A word or two for a table: "truncated", "no caption"."""
    key: str
    """The picture or file, as `Record.key` says it."""
    text: str
    """What is wrong, with the value, and what to do."""
    error: bool = True

    def __str__(self) -> str:
        return f"{self.key}: {self.text}"


def raise_all(problems: Iterable[Problem], source: str) -> None:
    """Raise one DataError that lists every error among `problems`; return when there is none.

    Raises:
        DataError: at least one problem is an error.
    """
    errors: Sequence[Problem] = [problem for problem in problems if problem.error]
    if not errors:
        return
    lines = [f"  {problem}" for problem in errors[:LISTED]]
    if len(errors) > LISTED:
        lines.append(f"  ... and {len(errors) - LISTED} more")
    what = "1 problem" if len(errors) == 1 else f"{len(errors)} problems"
    raise DataError(
        f"{source} can't be trained on as it is: {what}.\n" + "\n".join(lines) + "\n"
        "`scumble data check` shows warnings too, and a contact sheet."
    )
