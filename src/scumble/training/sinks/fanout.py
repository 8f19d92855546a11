"""Fanout: many sinks as one, where a sink that fails is reported once, dropped, and never stops the run."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from scumble.training.events import Event, Noted, Sink

log = logging.getLogger("scumble.sinks")


class Fanout:
    """Gives each event to every sink.

    A sink that raises is dropped; the others get a `Noted` that says so. Where no other sink is left, and for
    failures of `close`, the same text is logged as a warning. Ctrl-C and other `BaseException`s pass through.
    """

    def __init__(self, sinks: Sequence[Sink]) -> None:
        self._sinks = list(sinks)
        self._step = 0
        self.failures: dict[str, str] = {}
        """Class name of each dropped sink -> what went wrong."""

    @property
    def sinks(self) -> tuple[Sink, ...]:
        """Those still in use."""
        return tuple(self._sinks)

    def handle(self, event: Event) -> None:
        """Give `event` to every sink that has not failed."""
        self._step = getattr(event, "step", getattr(event, "first_step", self._step))
        waiting = [event]
        while waiting:
            current = waiting.pop(0)
            for sink in tuple(self._sinks):
                try:
                    sink.handle(current)
                except Exception as error:
                    waiting += self._drop(sink, error)

    def close(self) -> None:
        """Close every sink, the failed ones already were."""
        for sink in tuple(self._sinks):
            self._sinks.remove(sink)
            self._close(sink)

    def _drop(self, sink: Sink, error: Exception) -> list[Event]:
        self._sinks.remove(sink)
        name = type(sink).__name__
        self.failures[name] = f"{type(error).__name__}: {error}"
        text = f"{name} failed and is off for the rest of the run; training goes on. {self.failures[name]}"
        log.debug("traceback of the failed sink", exc_info=error)
        self._close(sink)
        if not self._sinks:
            log.warning(text)
            return []
        return [Noted(self._step, text)]

    def _close(self, sink: Sink) -> None:
        try:
            sink.close()
        except Exception as error:
            name = type(sink).__name__
            # A sink that failed once fails again on close more often than not: one report is enough.
            if name not in self.failures:
                self.failures[name] = f"{type(error).__name__}: {error}"
                log.warning("%s could not be closed: %s", name, self.failures[name])
