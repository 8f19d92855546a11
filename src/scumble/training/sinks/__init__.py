"""Sinks: where a run's events are shown or kept, each one class built from the run's folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from scumble.registry import Registry
from scumble.training.events import Sink
from scumble.training.sinks.fanout import Fanout

__all__ = ["SINKS", "Fanout", "open_sinks"]

SINKS: Registry[Callable[[Path], Sink]] = Registry(
    "sink",
    {
        "console": "scumble.training.sinks.console:ConsoleSink",
        "jsonl": "scumble.training.sinks.jsonl:JsonLinesSink",
        "report": "scumble.training.sinks.report:ReportSink",
        "tensorboard": "scumble.training.sinks.tensorboard:TensorBoardSink",
        "wandb": "scumble.training.sinks.wandb:WandbSink",
    },
)
"""Sinks by name. Each is called with the run's folder and gives a `Sink`.

Law: a sink takes every event in any order that a run can produce, and a resume loses nothing of what it kept
before.
"""


def open_sinks(names: tuple[str, ...] | list[str], folder: Path) -> Fanout:
    """The sinks called `names`, for the run in `folder`, as one.

    Raises:
        UnknownName: no sink has that name.
        ConfigError: a sink's library isn't installed; raised here, before the run, not in it.
    """
    return Fanout([SINKS.get(name)(folder) for name in names])
