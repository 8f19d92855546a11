"""RunFolder: where everything of a run lies, who may write there, and what to continue from."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from scumble.errors import ConfigError, ResumeError
from scumble.formats.container import WEIGHTS_NAME
from scumble.formats.embedding import EMBEDDING_NAME
from scumble.training import state
from scumble.training.sinks.jsonl import NAME as EVENTS
from scumble.training.sinks.report import NAME as REPORT
from scumble.training.sinks.tensorboard import NAME as TENSORBOARD

SETTINGS = "run.toml"
CARD = "README.md"
PREVIEWS = "previews"
WORDS = "learned_embeds*.safetensors"
"""Learned words alone, one a file."""
EVALUATION = "evaluation.json"
"""What `scumble evaluate` measured, for the card."""
EVALUATED = "evaluation"
"""Folder of its page, its pictures and all of its numbers."""


@dataclass(frozen=True)
class Layout(state.Layout):
    """What the files of a run are called. The defaults are ours; a script with another tradition passes its
    own."""

    adapter: str = WEIGHTS_NAME
    """The finished adapter: the name that diffusers looks for."""
    tensorboard: str = ""
    """Folder in the run that holds TensorBoard's own; empty for the run's."""
    strict: bool = True
    """Refuse a folder that holds files of any origin, not only one that holds a run."""


@dataclass(frozen=True)
class RunFolder:
    """The folder of one run.

    run.toml                              the settings, resolved
    events.jsonl  tensorboard/            the log
    checkpoint-000500/                    what a run continues from
    pytorch_lora_weights.safetensors      the adapter; loads with diffusers
    learned_embeds.safetensors            its new words, where it has some; loads with diffusers
    best/                                 the adapter with the lowest held-out loss
    previews/                             pictures by step
    report.html                           curves, pictures and settings on a page
    README.md                             the model card
    """

    path: Path
    layout: Layout = Layout()

    @property
    def adapter(self) -> Path:
        """The finished adapter; of a run that taught words and nothing else, these."""
        usual, words = self.path / self.layout.adapter, self.path / EMBEDDING_NAME
        return words if words.exists() and not usual.exists() else usual

    @property
    def settings(self) -> Path:
        return self.path / SETTINGS

    @property
    def card(self) -> Path:
        return self.path / CARD

    @property
    def previews(self) -> Path:
        return self.path / PREVIEWS

    @property
    def evaluation(self) -> Path:
        return self.path / EVALUATION

    @property
    def report(self) -> Path:
        return self.path / REPORT

    @property
    def events(self) -> Path:
        return self.path / EVENTS

    @property
    def tensorboard(self) -> Path:
        """What TensorBoard is pointed at; its sink adds its own folder name."""
        return self.path / self.layout.tensorboard

    @property
    def others_of_adapter(self) -> str:
        """A pattern for the adapter's files in other dialects."""
        name = Path(self.layout.adapter)
        return f"{name.stem}_*{name.suffix}"

    def published(self) -> list[str]:
        """What an upload takes, as patterns: everything but checkpoints and caches."""
        return [
            self.layout.adapter,
            f"{Path(self.layout.adapter).stem}/**",  # a dialect whose adapters are folders
            self.others_of_adapter,
            f"{Path(self.layout.adapter).stem}_*/**",
            WORDS,
            *(SETTINGS, CARD, EVENTS, REPORT, EVALUATION),
            *(f"{PREVIEWS}/**", f"{TENSORBOARD}/**"),
            *([f"{self.layout.tensorboard}/**"] if self.layout.tensorboard else []),
        ]

    def results(self) -> list[Path]:
        """What an earlier run left here, and only that."""
        if not self.path.is_dir():
            return []
        own = [
            self.adapter,
            self.adapter.with_suffix(""),
            self.evaluation,
            self.path / EVALUATED,
            self.events,
            self.report,
            self.previews,
            self.path / self.layout.best,
        ]
        own += [self.path / TENSORBOARD, self.path / "wandb", self.path / "wandb-run-id.txt"]
        own += [self.path / self.layout.tensorboard / TENSORBOARD] if self.layout.tensorboard else []
        own += self.path.glob(WORDS)
        own += self.path.glob(f"{Path(self.layout.adapter).stem}_*")
        own += [folder for _, folder in self.layout.checkpoints(self.path)]
        own += state.unfinished(self.path)
        return [path for path in own if path.exists()]

    def others(self) -> list[Path]:
        """Files that no run wrote. Hidden files and settings files don't count."""
        if not self.path.is_dir():
            return []
        mine = {path.name for path in self.results()} | {CARD, self.layout.tensorboard}
        return sorted(
            path
            for path in self.path.iterdir()
            if path.name not in mine and not path.name.startswith(".") and path.suffix != ".toml"
        )

    def claim(
        self, *, resume: str | Path | None = None, overwrite: bool = False
    ) -> tuple[Path | None, list[str]]:
        """Whether a run may write here: (the checkpoint it continues from or None for a new run, notes).

        `resume` is "latest", a checkpoint's folder or this folder. `overwrite` removes an earlier run's results,
        and nothing else; it happens in `clear`, once everything else was found in order.

        Raises:
            ConfigError: the folder holds a run or other files, and neither is asked for; or both are.
            ResumeError: there is no such checkpoint, or no whole one.
        """
        if resume is not None and overwrite:
            raise ConfigError("--resume continues a run and --overwrite removes it. Choose one.")
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(f"output = {self.path} is a file. Name a folder.")
        if resume is not None:
            return self._checkpoint(resume)
        results = self.results()
        if results and not overwrite:
            has = "checkpoints" if self.layout.checkpoints(self.path) else "results"
            raise ConfigError(
                f"{self.path} already holds {has} of a run ({_names(results)}). "
                "Continue it with --resume latest, write to another folder with --output, or start again with "
                "--overwrite."
            )
        others = self.others()
        if others and self.layout.strict:
            raise ConfigError(
                f"{self.path} is not empty: it holds {_names(others)}, which no run wrote. "
                f"Write to a new folder, e.g. --output {self.path / 'run'}"
            )
        return None, []

    def clear(self) -> None:
        """Remove what an earlier run left here."""
        for path in self.results():
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()

    def _checkpoint(self, resume: str | Path) -> tuple[Path | None, list[str]]:
        if str(resume) == "latest" or Path(resume).resolve() == self.path.resolve():
            found, notes = state.latest_valid(self.path, self.layout)
            if found is None:
                why = " ".join(notes) or "There is none."
                raise ResumeError(
                    f"There is no checkpoint to continue from in {self.path}. {why} "
                    "Leave --resume out to start a new run."
                )
            return found, notes
        given = Path(resume)
        if not given.is_dir() and (self.path / given).is_dir():
            given = self.path / given
        problem = state.damage(given)
        if problem:
            known = [folder.name for _, folder in self.layout.checkpoints(self.path)]
            there = f" Checkpoints in {self.path}: {', '.join(known)}." if known else ""
            raise ResumeError(f"{given} can't be resumed from: {problem}.{there}")
        return given, []


def _names(paths: list[Path]) -> str:
    names = [path.name + ("/" if path.is_dir() else "") for path in paths]
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
