"""Upload of a run to the Hugging Face Hub: refusals are asked for before step 1, files are on disk first."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import field_validator

from scumble.errors import HubError
from scumble.settings import Settings

T = TypeVar("T")


class HubSettings(Settings):
    """Where the trained adapter is published. The token is never a setting: it comes from `hf auth login` or
    HF_TOKEN."""

    push: bool = False
    """Upload the adapter, its model card and previews to the Hugging Face Hub when training ends."""
    id: str | None = None
    """Repository to upload to, `name` or `owner/name`. Unset: the name of the output folder, under your
    account."""
    private: bool | None = None
    """Create the repository private. Unset: your account's default; an existing repository stays as it is."""

    @field_validator("id")
    @classmethod
    def _well_formed(cls, value: str | None) -> str | None:
        if value is not None:
            from huggingface_hub.errors import HFValidationError
            from huggingface_hub.utils import validate_repo_id

            try:
                validate_repo_id(value)
            except HFValidationError as error:
                raise ValueError(str(error)) from None
        return value


def prepare(repo: str, card: str, *, private: bool | None = None, token: str | None = None) -> str:
    """Ask the Hub everything that it could refuse later: the token, the right to write, the card.

    Creates the repository when there is none. `card` is the model card as far as it is known before training.
    Returns the full `owner/name`.

    Raises:
        HubError: no token or a wrong one, no right to the namespace, a card it refuses, or no connection.
    """
    from huggingface_hub import ModelCard

    api = _api(token)
    me = _ask("check the token", lambda: api.whoami())
    url = _ask(
        f"create the repository {repo!r}",
        lambda: api.create_repo(repo, private=private, exist_ok=True),
        hint=f"You may write to: {', '.join([me['name'], *(each['name'] for each in me.get('orgs', []))])}.",
    )
    _ask("validate the model card", lambda: ModelCard(card, ignore_metadata_errors=False).validate())
    return str(url.repo_id)


def push(
    folder: Path,
    repo: str,
    *,
    files: Sequence[str],
    private: bool | None = None,
    token: str | None = None,
    message: str = "Add the adapter",
) -> str:
    """Upload what `files` (patterns such as "previews/**") match in a run folder; the repository's URL.

    Raises:
        HubError: what the Hub refused, with the command to try again. Nothing on disk is changed.
    """
    folder = Path(folder)
    if not list(folder.glob("*.safetensors")):
        raise HubError(f"{folder} holds no .safetensors file at its top, so there is no adapter to upload.")
    again = f"Everything is kept in {folder}. Try again with: {retry_command(folder, repo, private)}"
    api = _api(token)
    full: Any = _ask(
        f"create the repository {repo!r}",
        lambda: api.create_repo(repo, private=private, exist_ok=True),
        hint=again,
    )
    _ask(
        f"upload to {full.repo_id}",
        lambda: api.upload_folder(
            repo_id=full.repo_id, folder_path=str(folder), commit_message=message, allow_patterns=list(files)
        ),
        hint=again,
    )
    return f"{api.endpoint}/{full.repo_id}"


def retry_command(folder: Path, repo: str, private: bool | None = None) -> str:
    """The command line that uploads this folder again."""
    choice = {None: "", True: " --private", False: " --public"}[private]
    return f"scumble push {shlex.quote(str(folder))} --to {shlex.quote(repo)}{choice}"


def _api(token: str | None) -> Any:
    from huggingface_hub import HfApi

    return HfApi(token=token, library_name="scumble")


def _ask(what: str, call: Callable[[], T], *, hint: str = "") -> T:
    """One conversation with the Hub; whatever the client raises becomes a HubError with the next step."""
    try:
        return call()
    except (
        Exception
    ) as error:  # the client's transport differs by release, so its errors have no common class
        response = getattr(error, "response", None)
        status = getattr(response, "status_code", None)
        advice = hint
        if status == 401 or type(error).__name__ == "LocalTokenNotFoundError":
            advice = f"Log in with `hf auth login`, or set HF_TOKEN to a token with write access. {hint}"
        elif type(error).__name__ == "OfflineModeIsEnabled":
            advice = f"HF_HUB_OFFLINE is set; unset it to reach the Hub. {hint}"
        reason = _reason(error, status)
        raise HubError(f"The Hub could not {what}: {reason} {advice}".strip()) from error


def _reason(error: Exception, status: int | None) -> str:
    message = getattr(error, "server_message", None) or " ".join(str(error).split()) or type(error).__name__
    message = message if message.endswith(".") else message + "."
    return f"HTTP {status}: {message}" if status and str(status) not in message else message
