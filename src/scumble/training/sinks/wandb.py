"""Weights & Biases: a run's numbers and pictures on wandb.ai, or in a folder with WANDB_MODE=offline."""

from __future__ import annotations

import os
import uuid
from pathlib import Path
from typing import Any

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

ID_NAME = "wandb-run-id.txt"


class WandbSink:
    """Scalars over `step`, pictures base and adapter, settings as the config; a resume continues the run.

    The project is $WANDB_PROJECT or "scumble"; every other setting is wandb's own environment.
    """

    def __init__(self, folder: Path) -> None:
        """
        Raises:
            ConfigError: wandb isn't installed.
        """
        try:
            import wandb
        except ImportError as error:
            raise ConfigError(
                f'The sink "wandb" needs a package that is not installed ({error}). '
                "Install it with `pip install wandb`, or leave the sink out."
            ) from error
        self._wandb, self._folder = wandb, folder
        self._run: Any = None
        self._skipped = 0
        self._notes: list[str] = []

    def handle(self, event: Event) -> None:
        """Log one event."""
        match event:
            case Started():
                self._open(event)
            case StepDone():
                values: dict[str, Any] = {
                    "train/loss": event.loss,
                    "train/gradient_norm": event.gradient_norm,
                }
                values |= {f"train/learning_rate/{name}": rate for name, rate in event.learning_rates.items()}
                if event.seconds > 0:
                    values["train/samples_per_second"] = event.samples / event.seconds
                self._log(event.step, values)
            case StepSkipped():
                self._skipped += 1
                self._log(event.step, {"train/skipped": self._skipped})
            case HeldOut():
                self._log(event.step, {"held_out/adapter": event.adapter, "held_out/base": event.base})
            case Previewed():
                values = {}
                for number, panel in enumerate(event.panels):
                    values[f"preview/{number}"] = [
                        self._wandb.Image(str(path), caption=f"{word}: {panel.prompt} (seed {panel.seed})")
                        for word, path in (("base", panel.base), ("adapter", panel.adapter))
                    ]
                    values[f"preview_difference/{number}"] = panel.difference
                self._log(event.step, values)
            case Noted():
                self._notes.append(f"step {event.step}: {event.text}")
                self._summary("notes", "\n".join(self._notes))
            case Saved():
                self._summary("last_saved", str(event.path))
            case Finished():
                self._summary("finished", event.reason)
                self._summary("adapter", str(event.adapter) if event.adapter else "")

    def close(self) -> None:
        """Finish the wandb run."""
        if self._run is not None:
            self._run.finish()
            self._run = None

    def _open(self, event: Started) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        identity = self._folder / ID_NAME
        if not identity.exists():
            identity.write_text(uuid.uuid4().hex[:12], encoding="utf-8")
        self._run = self._wandb.init(
            project=os.environ.get("WANDB_PROJECT", "scumble"),
            name=self._folder.resolve().name,
            id=identity.read_text(encoding="utf-8").strip(),
            resume="allow",
            dir=str(self._folder),
            config={"settings": plain(event.settings), "facts": plain(event.facts)},
            settings=self._wandb.Settings(console="off", silent=True),
        )
        # Our own step axis: wandb's own refuses to go back to the checkpoint that a resume continues from.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def _log(self, step: int, values: dict[str, Any]) -> None:
        assert self._run is not None, "a run begins with Started"
        if values:
            self._run.log({"step": step} | values)

    def _summary(self, name: str, value: str) -> None:
        assert self._run is not None, "a run begins with Started"
        self._run.summary[name] = value
