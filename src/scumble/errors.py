"""Every error scumble raises on purpose: what happened, with the value, then what to do.

    ScumbleError
    ├── ConfigError            a setting is wrong (names file, line, section, suggestion)
    ├── UnknownName            no such family, method, optimizer, style, ... (lists what there is)
    ├── DataError              a dataset can't be used as it is (names the files)
    ├── ModelError             a base model can't be loaded or does not fit the request
    │   └── PrecisionError     this device can't compute in that dtype
    ├── AdapterError           an adapter can't be injected, used or merged
    │   ├── NoLayerMatches     a target pattern matched nothing
    │   └── NoEffect           an adapter loaded and changed nothing
    ├── FormatError            an adapter, or a file of tensors, can't be read or written
    │   ├── UnknownFormat      no codec claims the file, or two do
    │   ├── WrongBase          the file belongs to another family of base models
    │   ├── UnusedTensors      some tensors of the file match no layer of the base
    │   ├── NotFinite          a tensor holds NaN or infinity
    │   └── CannotRepresent    this format can't hold that adapter (names one that can)
    ├── TrainingError          a run can't go on
    │   ├── Diverged           too many steps in a row with a non-finite loss or gradient
    │   ├── NothingTrained     a trainable tensor got no gradient, or never changed
    │   ├── ProcessLost        another process of the run is gone, or ended in an error
    │   └── ResumeError        a checkpoint can't continue this run (lists the differences)
    ├── OutOfMemory            there is too little memory (names what was done, and the settings that need less)
    └── HubError               the Hub refused or could not be reached (names the retry command)

The command line prints `str(error)` and exits with `error.exit_code`; a traceback is only for our own bugs.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable


class ScumbleError(Exception):
    """The root: an error whose text is written for the person who reads it."""

    exit_code: int = 2
    silent: bool | None = None
    """Whether another process of the run says it to the same person; None: that was not found out."""

    def __str__(self) -> str:
        return "\n".join(map(printable, super().__str__().split("\n")))  # some list mistakes, one a line


class ConfigError(ScumbleError):
    """A setting is wrong."""


class UnknownName(ScumbleError):
    """No `kind` is called `name`."""

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        self.kind, self.name, self.known = kind, name, tuple(sorted(known))
        super().__init__(
            f"There is no {kind} {name!r}.{did_you_mean(name, self.known)} Known: {', '.join(self.known) or 'none'}."
        )


class DataError(ScumbleError):
    """A dataset can't be used as it is."""


class ModelError(ScumbleError):
    """A base model can't be loaded, or does not fit the request."""


class PrecisionError(ModelError):
    """This device can't compute in that dtype."""


class AdapterError(ScumbleError):
    """An adapter can't be injected, used or merged."""


class NoLayerMatches(AdapterError):
    """A target pattern matched no layer."""


class NoEffect(AdapterError):
    """An adapter loaded and changed nothing."""


class FormatError(ScumbleError):
    """An adapter file can't be read or written."""


class UnknownFormat(FormatError):
    """No codec claims the file, or more than one does."""


class WrongBase(FormatError):
    """The file belongs to another family of base models."""


class UnusedTensors(FormatError):
    """Some tensors of the file match no layer of the base."""

    def __init__(self, text: str, usable: int = 0) -> None:
        self.usable = usable
        """How many others would be used where a part of the file is asked for."""
        super().__init__(text)


class NotFinite(FormatError):
    """A tensor holds NaN or infinity."""


class CannotRepresent(FormatError):
    """This format can't hold that adapter."""


class TrainingError(ScumbleError):
    """A run can't go on."""


class Diverged(TrainingError):
    """Too many steps in a row had a non-finite loss or gradient."""

    exit_code = 3


class NothingTrained(TrainingError):
    """A trainable tensor got no gradient, or never changed."""

    exit_code = 4


class ProcessLost(TrainingError):
    """Another process of the run is gone, or ended in an error."""

    exit_code = 5


class ResumeError(TrainingError):
    """A checkpoint can't continue this run."""


class OutOfMemory(ScumbleError):
    """There is too little memory for what was done."""

    exit_code = 6


class HubError(ScumbleError):
    """The Hub refused, or could not be reached."""


def to_be_printed(error: Exception) -> bool:
    """Whether this process is the one that prints `error`.

    Of several processes on a machine, which the same command line started, the first says what is wrong with it.
    """
    silent = getattr(error, "silent", None)
    if silent is not None:
        return not silent
    of_command = isinstance(error, ConfigError | UnknownName) or not isinstance(error, ScumbleError)
    return not of_command or os.environ.get("LOCAL_RANK", "0") == "0"


_CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""What a terminal obeys and does not show: control characters, breaks of lines, turns of direction, half characters."""


def printable(text: str) -> str:
    """`text` from somebody's file on one line, with `\\x1b` for what a terminal would obey."""
    return _CONTROLS.sub(lambda found: repr(found[0])[1:-1], text)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`' Did you mean "optimizer"?'`, or the empty string when nothing is near."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f' Did you mean "{near[0]}"?' if near else ""
