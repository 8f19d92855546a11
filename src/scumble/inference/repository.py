"""Repository: an adapter's files on the Hub, or with HF_HUB_OFFLINE those of the local cache and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from scumble.errors import HubError
from scumble.models.hub import explain

T = TypeVar("T")


def file_names(repo: str) -> list[str]:
    """The names of a repository's files, sorted; offline those that are in the local cache.

    Raises:
        HubError: the Hub refused, has no such repository or can't be reached; offline, nothing of it is cached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.constants import is_offline_mode

    if is_offline_mode():
        return _cached(repo)
    found = asked(repo, lambda: HfApi(library_name="scumble").model_info(repo))
    return sorted(file.rfilename for file in found.siblings or ())


def download(repo: str, name: str) -> Path:
    """One file of a repository, in the local cache: from there, or fetched; a broken download is gone on with.

    Raises:
        HubError: as `file_names`, and where there is no such file.
    """
    from huggingface_hub import hf_hub_download

    return asked(repo, lambda: Path(hf_hub_download(repo, name, library_name="scumble")))


def asked(repo: str, ask: Callable[[], T]) -> T:
    """`ask()`, with what the Hub's client raises as one HubError that says what to do."""
    from huggingface_hub.errors import HFValidationError

    from scumble.models.hub import client_errors

    any_error, _ = client_errors()
    try:
        return ask()
    except (any_error, HFValidationError, OSError, ValueError) as error:
        raise HubError(explain(error, repo, None)) from error


def _cached(repo: str) -> list[str]:
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        repos = [
            found for found in scan_cache_dir().repos if (found.repo_id, found.repo_type) == (repo, "model")
        ]
    except CacheNotFound:
        repos = []
    revisions = [revision for found in repos for revision in found.revisions if "main" in revision.refs]
    if not revisions:
        raise HubError(
            f"{repo} is not in the local Hub cache, and HF_HUB_OFFLINE is set. Unset it, or run `hf download "
            f"{repo}` where there is a network and copy the cache (HF_HOME) here."
        )
    folder = revisions[0].snapshot_path
    return sorted(file.file_path.relative_to(folder).as_posix() for file in revisions[0].files)
