"""TensorBoard: a run's numbers and pictures as event files under `<folder>/tensorboard`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scumble.errors import ConfigError
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
from scumble.training.sinks.jsonl import plain

if TYPE_CHECKING:
    import numpy

NAME = "tensorboard"


def writer_class() -> Any:
    """The `SummaryWriter` of torch with tensorboard, or of tensorboardX.

    Raises:
        ConfigError: neither is installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as first:
        try:
            from tensorboardX import SummaryWriter  # type: ignore[import-not-found, no-redef]
        except ImportError:
            raise ConfigError(
                f'The sink "tensorboard" needs a package that is not installed ({first}). '
                "Install it with `pip install tensorboard`, or leave the sink out."
            ) from first
    return SummaryWriter


class TensorBoardSink:
    """Scalars under train/ and held_out/, pictures (base beside adapter) under preview/, settings as text."""

    def __init__(self, folder: Path) -> None:
        self._class = writer_class()
        self._folder = folder / NAME
        self._writer: Any = None
        self._skipped = 0

    def handle(self, event: Event) -> None:
        """Write one event."""
        match event:
            case Started():
                # After a kill, what was logged beyond the checkpoint is told again, and shown once.
                purge = {"purge_step": event.first_step + 1} if event.first_step else {}
                self._writer = self._class(str(self._folder), **purge)
                self._text("settings", event.settings, event.first_step)
                self._text("facts", event.facts, event.first_step)
            case StepDone():
                self._scalar("train/loss", event.loss, event.step)
                self._scalar("train/gradient_norm", event.gradient_norm, event.step)
                for name, value in event.learning_rates.items():
                    self._scalar(f"train/learning_rate/{name}", value, event.step)
                if event.seconds > 0:
                    self._scalar("train/samples_per_second", event.samples / event.seconds, event.step)
            case StepSkipped():
                self._skipped += 1
                self._scalar("train/skipped", self._skipped, event.step)
                self._note(f"Skipped: {event.reason}. Pictures: {', '.join(event.pictures)}", event.step)
            case HeldOut():
                self._scalar("held_out/adapter", event.adapter, event.step)
                self._scalar("held_out/base", event.base, event.step)
            case Previewed():
                for number, panel in enumerate(event.panels):
                    name = f"preview/{number} {panel.prompt}"[:120]
                    self._open().add_image(
                        name, beside(panel.base, panel.adapter), event.step, dataformats="HWC"
                    )
                    self._scalar(f"preview_difference/{number}", panel.difference, event.step)
                self._open().flush()
            case Saved():
                self._open().flush()
            case Noted():
                self._note(event.text, event.step)
            case Finished():
                self._note(f"Finished: {event.reason}. Adapter: {event.adapter}", event.step)
                self._open().flush()

    def close(self) -> None:
        """Flush and close the event file."""
        if self._writer is not None:
            self._writer.close()

    def _open(self) -> Any:
        if self._writer is None:
            self._writer = self._class(str(self._folder))
        return self._writer

    def _scalar(self, name: str, value: float, step: int) -> None:
        self._open().add_scalar(name, value, step)

    def _note(self, text: str, step: int) -> None:
        self._open().add_text("notes", text, step)

    def _text(self, name: str, values: object, step: int) -> None:
        indented = json.dumps(plain(values), indent=2, ensure_ascii=False).replace("\n", "\n    ")
        self._open().add_text(name, "    " + indented, step)


def beside(base: Path, adapter: Path) -> numpy.ndarray:
    """Two pictures of one size side by side, (H, 2 W, 3) uint8."""
    import numpy
    from PIL import Image

    with Image.open(base) as left, Image.open(adapter) as right:
        return numpy.hstack([numpy.asarray(left.convert("RGB")), numpy.asarray(right.convert("RGB"))])
