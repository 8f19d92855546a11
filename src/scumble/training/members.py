"""Members: who takes part in a run, whether a neighbour still lives, and how an end is said."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Self


@dataclass(frozen=True)
class Member:
    """One process of the run."""

    rank: int
    pid: int
    host: str
    """Its machine's name."""
    node: str
    """Where its pid means something: machine, boot and container."""

    @classmethod
    def here(cls, rank: int) -> Member:
        """This process."""
        host = socket.gethostname()
        return cls(rank, os.getpid(), host, f"{host} {_boot()} {_namespace()}")

    def gone(self, seen_from: Member) -> bool:
        """Whether it surely is no more; only its neighbours on the machine can tell."""
        if self.node != seen_from.node or os.name == "nt":  # where signal 0 is a real one
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:  # it is somebody else's, and there
            return False
        return _zombie(self.pid)

    def __str__(self) -> str:
        return f"process {self.rank} (pid {self.pid} on {self.host})"


@dataclass(frozen=True)
class End:
    """What is said of a process that ended the run."""

    ranks: tuple[int, ...]
    text: str
    """A sentence, or the text of its error."""
    itself: bool
    """Whether it said so itself."""

    @classmethod
    def of(cls, members: Sequence[Member], text: str) -> Self:
        """What others find: `text` goes on after the members' names, e.g. "is gone" (and "are gone")."""
        verb, _, rest = text.partition(" ")
        said = verb if len(members) == 1 else {"is": "are", "has": "have"}.get(verb, verb)
        names = " and ".join(map(str, members))
        return cls(tuple(member.rank for member in members), f"{names} {said} {rest}", itself=False)

    @classmethod
    def read(cls, text: bytes) -> Self:
        """The inverse of `written`."""
        value = json.loads(text)
        return cls(tuple(value["ranks"]), value["text"], value["itself"])

    def written(self) -> str:
        """As JSON."""
        return json.dumps(asdict(self))


def _zombie(pid: int) -> bool:
    """Whether it ended and only its launcher has not looked yet."""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
        return file.read().rpartition(")")[2].split()[0] == "Z"
    return False


def _boot() -> str:
    with contextlib.suppress(OSError), open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return file.read().strip()
    return ""


def _namespace() -> str:
    with contextlib.suppress(OSError):
        return os.readlink("/proc/self/ns/pid")
    return ""
