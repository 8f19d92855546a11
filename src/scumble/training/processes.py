"""Processes: the processes of a run, who watch over each other, so that when one ends all end, and say which it was.

A collective operation waits for every process, and one that was killed never comes: after minutes the others end in an
error of the network library that names a socket. Here each process gives a sign of life every second, in a small store
that process 0 keeps, and says there why it ends. Whether one is gone is told by that alone, never by how long it works:
process 0 may draw previews for an hour while the others wait.
"""

from __future__ import annotations

import atexit
import itertools
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

from scumble.collector import ending
from scumble.errors import ProcessLost, ScumbleError
from scumble.training.members import End, Member

if TYPE_CHECKING:
    from accelerate import Accelerator

Value = TypeVar("Value")

PATIENCE = timedelta(days=1)
"""How long a collective operation may wait. The watch is what ends a run; this is only above all that a run may do
between two of them."""
BEAT = 1.0
"""Seconds between two signs of life."""
GRACE = 10.0
"""Seconds that a process has to end by itself when another is gone; one that is stuck in a driver is ended then."""
LINGER = 5.0
"""Seconds that a process that ends waits at most until the others heard why."""
ENDED = "ended"
TERMINATED = 128 + signal.SIGTERM


@dataclass(frozen=True)
class Heard:
    """What the store held."""

    when: float
    beats: Sequence[bytes]
    """By rank; they differ from one sign of life to the next."""
    said: End | None


class Processes:
    """All processes of a run, seen from one of them (see `data.together.Together`); used in `with`.

    Laws: when a process dies or ends in an error, all others end within `timeout` and some seconds, and the error of
    each is a `ProcessLost` that names it; each fact is printed once a machine (`ScumbleError.silent`). When all leave
    without an error, they leave together.
    """

    def __init__(self, accelerator: Accelerator, timeout: float = 30.0) -> None:
        """`timeout`: seconds without a sign of life after which a process on another machine counts as gone."""
        self.rank, self.count = accelerator.process_index, accelerator.num_processes
        self.members: Sequence[Member] = (Member.here(self.rank),)
        self._timeout = timeout
        self._store: Any = None
        self._threads: list[threading.Thread] = []
        self._left, self._known, self._passed_on = (threading.Event() for _ in range(3))
        self._heard = Heard(0.0, (), None)
        self._failures = 0
        """Operations of the store in a row that failed."""
        self._found: End | None = None
        self._lost: ProcessLost | None = None
        self._ending = self._arrived = False
        self._handlers: dict[int, Any] = {}

    def gather(self, value: Value) -> list[Value]:
        """Every process's `value`, by rank; it is pickled on the way. All must call it."""
        if self.count == 1:
            return [value]
        import torch.distributed as dist

        found: list[Any] = [None] * self.count
        dist.all_gather_object(found, value)
        return found

    def __enter__(self) -> Self:
        if self.count == 1:
            return self
        atexit.register(_part)
        self.members = self.gather(Member.here(self.rank))
        self._store = self._open()
        self._store.set(f"beat/{self.rank}", "0")
        self.gather(None)  # every key is there now: asking for one that is not waits
        if threading.current_thread() is threading.main_thread():
            self._handlers[signal.SIGTERM] = signal.signal(signal.SIGTERM, self._terminated)
            if hasattr(signal, "SIGUSR1"):
                self._handlers[signal.SIGUSR1] = signal.signal(signal.SIGUSR1, self._roused)
        self._heard = Heard(time.monotonic(), (), None)
        for work in (self._talk, self._watch):
            self._threads.append(threading.Thread(target=work, name=f"scumble {work.__name__}", daemon=True))
            self._threads[-1].start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None and self.count > 1:
                self._arrived = True  # after this, the first to leave is no reason for alarm
                try:
                    self.gather(None)
                except RuntimeError as late:
                    error, self._arrived = late, False
            cause = None if error is None else self.explained(error)
        finally:
            self._leave()
        if cause is not None and cause is not error:
            raise cause from error
        if error is not None and kind is None:
            raise error

    def explained(self, error: BaseException) -> BaseException:
        """Why the run ends: `error` itself, which the others are told, or a `ProcessLost` where another process is
        the cause of it. May wait until that is known."""
        self._ending = True
        if self._store is None or isinstance(error, ProcessLost):
            return error
        patience = LINGER if isinstance(error, SystemExit) else self._timeout + 2 * BEAT
        if _from_outside(error) and self._known.wait(patience):
            assert self._lost is not None
            return self._lost
        mine = End((self.rank,), _said(error), itself=True)
        try:
            first = self._found or self._publish(mine)
            self._linger(first)
        except RuntimeError:  # without the store, the others will see that this process is gone
            first = self._found or mine
        if isinstance(error, ScumbleError):  # all may find the same at once
            same = first.text == _said(error) and first.ranks != (self.rank,)
            error.silent = same and self._says_another(first)
        return error

    # -- the watch, and who talks to the store for it: an operation of the store may hang -----------------

    def _talk(self) -> None:
        """Give signs of life and hear those of the others."""
        keys = [f"beat/{member.rank}" for member in self.members]
        for number in itertools.count(1):
            if self._left.wait(BEAT):
                return
            if self.members[0].gone(self.members[self.rank]):
                continue
            try:
                if self._found is not None:
                    self._store.set(f"heard/{self.rank}", "1")
                    self._publish(self._found)
                    if self.rank == 0:  # the store ends with this process
                        self._linger(self._found)
                    self._passed_on.set()
                    return
                self._store.set(f"beat/{self.rank}", str(number))
                said = End.read(self._store.get(ENDED)) if self._store.check([ENDED]) else None
                self._heard = Heard(time.monotonic(), self._store.multi_get(keys), said)
                self._failures = 0
            except RuntimeError:  # who keeps the store is gone, or about to leave as we are
                self._failures += 1

    def _watch(self) -> None:
        """Find out who is gone; then end the run."""
        beats: dict[int, tuple[bytes, float]] = {}
        now = time.monotonic()
        while not self._left.wait(BEAT):
            before, heard, now = now, self._heard, time.monotonic()
            if now - before > 5 * BEAT:  # this process was stopped itself, and has heard nothing new yet
                continue
            for member, beat in zip(self.members, heard.beats, strict=False):
                if beats.get(member.rank, (b"", now))[0] != beat:
                    beats[member.rank] = (beat, heard.when)
            quiet = {rank for rank, (_, since) in beats.items() if heard.when - since > self._timeout}
            end = heard.said or self._gone() or self._cut_off(now - heard.when) or self._silent(quiet)
            if end is not None and end.ranks != (self.rank,):
                self._conclude(end)
                return

    def _gone(self) -> End | None:
        """Who was on this machine, and is no more. At the very end they may leave."""
        me = self.members[self.rank]
        gone = [] if self._arrived else [member for member in self.members if member.gone(me)]
        if not gone:
            return None
        why = "is gone: killed (kill -9, or by the system for memory), or crashed"
        return End.of(gone, why)

    def _cut_off(self, seconds: float) -> End | None:
        """Process 0, where it can't be reached any more, for so long."""
        if self.rank == 0 or self._arrived or (self._failures < 2 and seconds <= self._timeout):
            return None
        return End.of(
            self.members[:1], "can't be reached: it is gone, or its machine, or the network between"
        )

    def _silent(self, ranks: set[int]) -> End | None:
        silent = [member for member in self.members if member.rank in ranks - {self.rank}]
        if not silent:
            return None
        why = f"has given no sign of life for {self._timeout:g} s: gone, stopped, or the network between is down"
        return End.of(silent, why)

    def _conclude(self, end: End) -> None:
        """Tell the main thread, and end the process if that does not end by itself."""
        self._found = end
        self._passed_on.wait(2 * BEAT if self.rank else 2 * BEAT + LINGER)
        blamed = ", ".join(str(self.members[rank]) for rank in end.ranks)
        text = f"{blamed} ended the run: {end.text}" if end.itself else end.text
        self._lost = ProcessLost(
            f"{text}. No process can go on without the others, so all end. "
            "The checkpoints are whole: continue with --resume latest, with as many processes as you like."
        )
        self._lost.silent = self._says_another(end)
        self._known.set()
        if self._left.wait(2 * BEAT):
            return
        if signal.SIGUSR1 in self._handlers:  # in Python code, as when it draws a preview, it can be roused
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)
        if not self._left.wait(GRACE):
            if not self._lost.silent:
                print(f"error: {self._lost}", file=sys.stderr, flush=True)
            os._exit(ProcessLost.exit_code)

    def _says_another(self, end: End) -> bool:
        """Whether another process on this machine says it to the person who looks at its output."""
        me = self.members[self.rank]
        near = [member.rank for member in self.members if member.node == me.node]
        if end.itself and any(rank in near for rank in end.ranks):
            return True
        return min(rank for rank in near if rank not in end.ranks) != self.rank

    # -- the store -----------------------------------------------------------------------------------------

    def _open(self) -> Any:
        """The store that process 0 keeps, on a port of its own."""
        from torch.distributed import TCPStore

        host = os.environ.get("MASTER_ADDR") or self.members[0].host
        patience = timedelta(seconds=self._timeout)
        store = TCPStore(host, 0, None, True, patience, wait_for_workers=False) if self.rank == 0 else None
        port = self.gather(None if store is None else store.port)[0]
        return store or TCPStore(host, port, None, False, patience, wait_for_workers=False)  # type: ignore[arg-type]

    def _publish(self, end: End) -> End:
        """Say why the run ends, unless another was first; what was said first."""
        return End.read(self._store.compare_set(ENDED, "", end.written()))

    def _linger(self, end: End) -> None:
        """Wait, not for long, until the others heard why."""
        gone = {*end.ranks, self.rank}
        others = [f"heard/{member.rank}" for member in self.members if member.rank not in gone]
        until = time.monotonic() + LINGER
        while others and not self._store.check(others) and time.monotonic() < until:
            time.sleep(BEAT / 10)

    def _leave(self) -> None:
        self._left.set()
        for thread in self._threads:
            thread.join(2 * BEAT)  # an operation of the store may hang
        for number, before in self._handlers.items():
            signal.signal(number, signal.SIG_DFL if before is None else before)
        self._handlers, self._store, self._threads = {}, None, []

    # -- signals -------------------------------------------------------------------------------------------

    def _terminated(self, number: int, frame: FrameType | None) -> None:
        """The launcher ends us because another process ended, or a person does."""
        if not self._ending:
            raise SystemExit(TERMINATED)

    def _roused(self, number: int, frame: FrameType | None) -> None:
        if not self._ending and self._lost is not None:
            raise self._lost


def _part() -> None:
    """End the process group while the interpreter is whole: its threads, met later, would abort the process."""
    import torch.distributed as dist

    ending()
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def _from_outside(error: BaseException) -> bool:
    """Whether it looks like what others bring about: a broken collective operation, or the launcher's signal."""
    if isinstance(error, SystemExit):
        return error.code == TERMINATED
    if isinstance(error, ScumbleError) or not isinstance(error, RuntimeError):
        return False
    from torch.distributed import DistError

    text = str(error).lower()
    return isinstance(error, DistError) or any(word in text for word in ("gloo", "nccl", "connection"))


def _said(error: BaseException) -> str:
    if isinstance(error, SystemExit):
        return "it was asked to stop (SIGTERM)"
    return f"{type(error).__name__}: {str(error).rstrip('.')}"
