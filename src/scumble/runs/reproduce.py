"""Reproduce: the settings that made an adapter, out of its own header, as the TOML that makes it again."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import TYPE_CHECKING

from scumble.errors import ConfigError, FormatError
from scumble.formats.container import WEIGHTS_NAME, find, read_header
from scumble.formats.metadata import from_header
from scumble.runs.load import Given, assemble
from scumble.runs.toml import dump

if TYPE_CHECKING:
    from scumble.runs.config import RunConfig


def reproduce(path: str | Path, output: str | Path | None = None) -> str:
    """A settings file's text: what the adapter at `path` was trained with, and as comments what else decides.

    `output` is the folder of the new run; unset it is one beside the first run's, which is not written over.

    Law: training with it, on the same base and pictures and with the same packages, gives the same bytes on a
    CPU.

    Raises:
        FormatError, ConfigError: as `settings_of`.
    """
    file = find(path)
    config = settings_of(file)
    config = config.model_copy(update={"output": beside(config.output) if output is None else Path(output)})
    said = from_header(read_header(file).metadata)
    lines = [
        f"# The settings of {_line(file.name)}, as its header says. scumble's version: {_line(said.version)}",
        f"# base: weights {_line(said.base_fingerprint)}",
        f"# pictures and captions: {_line(said.dataset_fingerprint)}",
        "# Check it with: scumble config check, train it with: scumble train. The same base, pictures and packages",
        "# give the same file, on a CPU bit for bit.",
        "",
    ]
    return "\n".join(lines) + dump(config)


def beside(folder: Path) -> Path:
    """A folder beside that one, where nothing is yet: `fox-again`, `fox-again-2`, ..."""
    names = itertools.chain(["again"], (f"again-{number}" for number in itertools.count(2)))
    return next(path for name in names if not (path := folder.with_name(f"{folder.name}-{name}")).exists())


def _line(text: str) -> str:
    """A header's text inside a comment: it must not end the comment."""
    return "".join(character if character.isprintable() else " " for character in text)[:120] or "not said"


def settings_of(file: Path) -> RunConfig:
    """The RunConfig that made the adapter in `file`, as its header says; its output is where the file lies.

    Raises:
        FormatError: the file can't be read, or says nothing of its settings.
        ConfigError: this version knows other settings; all differences are told.
    """
    from scumble.runs.config import RunConfig

    said = from_header(read_header(file).metadata)
    if not said.settings:
        raise FormatError(
            f"{file} does not say how it was made: only files that scumble trained carry their settings."
        )
    try:
        values = json.loads(said.settings)
        run = file.parent if file.stem == Path(WEIGHTS_NAME).stem else file.with_suffix("")
        values = {"output": str(run), **values}
        given = [Given((key,), value, file.name) for key, value in values.items() if value is not None]
    except (ValueError, AttributeError, TypeError) as error:
        raise FormatError(f"The settings in the header of {file} are not a JSON table ({error}).") from error
    try:
        return assemble(RunConfig, given)
    except ConfigError as error:
        raise ConfigError(
            f"{file} was made by scumble {said.version or '(unknown version)'}, whose settings this version does "
            f"not take:\n{error}"
        ) from error
