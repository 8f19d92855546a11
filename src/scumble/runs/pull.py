"""Pull: an adapter's repository on the Hub becomes a folder here, with its card and settings, and is looked at."""

from __future__ import annotations

import contextlib
import filecmp
import os
import secrets
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

from scumble.errors import ConfigError, FormatError, HubError, ModelError
from scumble.formats.seal import Verdict, check
from scumble.inference.find_base import find_base, weights_name
from scumble.inference.repository import download, file_names
from scumble.models.hub import is_hub_id
from scumble.runs.folder import WORDS

_TEXTS = (".md", ".toml", ".json")
_PICTURES = (".png", ".jpg", ".jpeg", ".webp")


@dataclass(frozen=True)
class Pulled:
    """What came."""

    folder: Path
    adapter: Path
    base: str
    """What the adapter says it was made for; empty where neither its file nor its card does."""
    verdict: Verdict
    """Whether the file is what was written, by its own seal."""
    left_out: tuple[str, ...]
    """Files of the repository that were not fetched: pickles, web pages, logs, checkpoints."""


def pull(
    repo: str,
    folder: str | Path | None = None,
    *,
    overwrite: bool = False,
    progress: Callable[[str], None] = lambda name: None,
) -> Pulled:
    """Fetch an adapter with its card, settings and pictures. With HF_HUB_OFFLINE: from the local cache alone.

    Args:
        repo: "owner/name".
        folder: where to; unset, a folder here of the repository's name.
        overwrite: replace files in the folder that are there with another content.
        progress: told each file's name before it is fetched.

    Raises:
        HubError: the Hub refused, has no such repository or can't be reached; offline, it isn't cached.
        FormatError: the repository holds no adapter, several, or a whole base.
        ConfigError: the folder holds other files of these names. Nothing was written then.
    """
    if not is_hub_id(repo):
        raise HubError(f'{repo!r} is no repository on the Hub. Write it as "owner/name".')
    target = Path(folder).expanduser() if folder is not None else Path(repo.partition("/")[2])
    names = file_names(repo)
    if "model_index.json" in names:
        raise FormatError(
            f"{repo} is a whole base model and no adapter. Name it where a base is asked for: --base {repo}"
        )
    adapter = weights_name(repo, names)
    wanted = [name for name in names if name == adapter or fnmatch(name, WORDS) or _is_wanted(name)]
    fetched: dict[str, Path] = {}
    for name in wanted:
        progress(name)
        fetched[name] = download(repo, name)
    if target.exists() and not target.is_dir():
        raise ConfigError(f"{target} is a file. Name a folder.")
    changed = [
        name
        for name, source in fetched.items()
        if (target / name).exists() and not filecmp.cmp(source, target / name, shallow=False)
    ]
    if changed and not overwrite:
        shown = ", ".join(changed[:4]) + (f" and {len(changed) - 4} more" if len(changed) > 4 else "")
        raise ConfigError(
            f"{target} holds other files of these names: {shown}. Nothing was written. Name another folder, or "
            "replace them with --overwrite."
        )
    for name, source in fetched.items():
        _copy(source, target / name)
    base = ""
    with contextlib.suppress(ModelError):  # told as "not said"
        base = find_base(target / adapter)
    left_out = tuple(name for name in names if name not in fetched and name != ".gitattributes")
    return Pulled(target, target / adapter, base, check(target / adapter), left_out)


def _is_wanted(name: str) -> bool:
    """Texts at the top, pictures anywhere: nothing that runs when somebody opens it."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or ":" in name:
        return False
    texts = len(path.parts) == 1 and path.suffix.lower() in _TEXTS
    return texts or path.suffix.lower() in _PICTURES


def _copy(source: Path, target: Path) -> None:
    """A copy in one step: what stands under the name is whole."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        shutil.copyfile(source, temporary)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
