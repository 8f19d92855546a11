"""Hub: a base's files from the Hugging Face Hub, configs first, so that a base that can't be used is never
downloaded."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from scumble.errors import ModelError
from scumble.models.configs import STEMS, WEIGHTLESS, Configs

CONFIG_FILES = ["model_index.json", "*/*.json", "tokenizer*/*.txt"]
"""Configs and vocabularies: about 2 MB."""

PICTUREBOOK = "picturebook"
"""The source that means the base inside this package."""


def is_hub_id(source: str) -> bool:
    """Whether it has the form of a Hub id, "owner/name"."""
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", source) is not None


def download_configs(repo: str, revision: str | None) -> Path:
    """The folder that holds a repository's configs and vocabularies, from the cache or the network.

    Raises:
        ModelError: the Hub refused, has no such repository, or can't be reached (names the next step).
    """
    return _snapshot(repo, revision, CONFIG_FILES)


def download_weights(repo: str, revision: str | None, variant: str | None, configs: Configs) -> Path:
    """The same folder, with the .safetensors weights of every component that `configs` names.

    Raises:
        ModelError: as `download_configs`.
    """
    middle = f".{variant}" if variant else ""
    wanted = [
        f"{part}/{stem}{shape}"
        for part in configs.parts
        if not part.startswith(WEIGHTLESS)
        for stem in STEMS
        for shape in (f"{middle}.safetensors", f"{middle}-[0-9]*-of-[0-9]*.safetensors")
    ]
    return _snapshot(repo, revision, [*CONFIG_FILES, *wanted], variant)


def cached_file(repo: str, file: str) -> Path | None:
    """A file of a repository in the local Hub cache, or None. No network."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repo, file)
    return Path(found) if isinstance(found, str) else None


def _snapshot(repo: str, revision: str | None, patterns: list[str], variant: str | None = None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    HTTPError, _ = client_errors()
    try:
        folder: Any = snapshot_download(repo, revision=revision, allow_patterns=patterns)
    except (HTTPError, HFValidationError, OSError, ValueError) as error:
        raise ModelError(explain(error, repo, revision, variant)) from error
    return Path(folder)


def client_errors() -> tuple[type[Exception], type[Exception]]:
    """(any error, failure to reach the server) of the HTTP library that the installed huggingface_hub uses.

    That library changed from requests to httpx to httpx2; asking for one by name would fail beside another.
    """
    import importlib

    from huggingface_hub import errors

    any_error: type[Exception] = errors.HTTPError
    library = importlib.import_module(any_error.__module__.partition(".")[0])
    unreached: type[Exception] = getattr(library, "TransportError", ConnectionError)
    return any_error, unreached


def explain(error: Exception, repo: str, revision: str | None, variant: str | None = None) -> str:
    """One message for what the Hub's client raised, with the next step."""
    from huggingface_hub.constants import is_offline_mode
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    _, TransportError = client_errors()
    at = f" at revision {revision!r}" if revision else ""
    at += f" in variant {variant!r}" if variant else ""
    if isinstance(error, GatedRepoError):
        page = f"https://huggingface.co/{repo}"
        return f"{repo} is gated: accept its licence at {page}, then sign in with `hf auth login`."
    if isinstance(error, RepositoryNotFoundError):
        return (
            f"The Hub has no {repo}, or it is private and you are not signed in. Check the name at "
            f"https://huggingface.co/{repo}, or run `hf auth login`. A folder is meant? Write ./{repo}"
        )
    if isinstance(error, RevisionNotFoundError):
        return (
            f"{repo} has no revision {revision!r}. See https://huggingface.co/{repo}/refs for those it has."
        )
    command = f"hf download {repo}" + (f" --revision {revision}" if revision else "")
    if isinstance(error, OfflineModeIsEnabled) or is_offline_mode():
        return (
            f"{repo}{at} is not in the local Hub cache, and HF_HUB_OFFLINE is set. Unset it, or run "
            f"`{command}` where there is a network and copy the cache (HF_HOME) here."
        )
    if isinstance(error, (LocalEntryNotFoundError, TransportError, ConnectionError, TimeoutError)):
        return (
            f"{repo}{at} is not in the local Hub cache, and the Hub can't be reached "
            f"({_first_line(error)}). Check the network, or run `{command}` where there is one and copy the "
            "cache (HF_HOME) here. Set HF_HUB_OFFLINE=1 to use only what is cached."
        )
    return f"{repo}{at} can't be downloaded from the Hub: {_first_line(error)} Try `{command}` to see more."


def _first_line(error: Exception) -> str:
    cause = error.__cause__ or error
    text = str(cause).strip() or type(cause).__name__
    return text.splitlines()[0]
