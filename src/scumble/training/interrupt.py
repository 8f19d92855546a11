"""Interrupts: Ctrl-C and SIGTERM as a wish that the loop grants at the next safe place."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any


class Interrupt:
    """Inside `with`, the first SIGINT and the first SIGTERM only set `asked`; a second one acts as it always
    did.

    Each counts for itself: under `accelerate launch`, Ctrl-C reaches a worker as SIGINT from the terminal and
    again as SIGTERM from its launcher, and the worker must still be able to save.

    Outside the main thread signals can't be caught, and `asked` is set by whoever holds the object (a
    server's worker).
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in self.SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number in tuple(self._before):
            self._restore(number)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        self._restore(signal.Signals(number))

    def _restore(self, number: signal.Signals) -> None:
        handler = self._before.pop(number)
        # None: it was installed by a program in C, which Python can't put back
        signal.signal(number, signal.SIG_DFL if handler is None else handler)
