"""Upload to the Hugging Face Hub: refusals are asked for before step 1, files are on disk first, and what arrived
before a failure is not sent again."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import field_validator

from scumble.errors import HubError
from scumble.runs.card import unedited
from scumble.runs.folder import CARD
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
    license: str | None = None
    """Licence that the model card names, as the Hub spells it, e.g. creativeml-openrail-m. Unset: none; it is
    yours to choose."""

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

    Creates the repository when there is none, and keeps one that exists with all that is in it. `card` is the
    model card as far as it is known before training. Returns the full `owner/name`.

    Raises:
        HubError: no token or a wrong one, no right to the namespace, a card it refuses, or no connection.
    """
    from huggingface_hub import ModelCard

    api = _api(token)
    me = _ask("check the token", lambda: api.whoami())
    mine = [me["name"], *(each["name"] for each in me.get("orgs", []))]
    url = _ask(
        f"create the repository {repo!r}",
        lambda: api.create_repo(repo, private=private, exist_ok=True),
        hint=f"You may write to: {', '.join(mine)}.",
    )
    # of a repository that exists the client asks nothing more
    role = me.get("auth", {}).get("accessToken", {}).get("role")
    if role == "read":
        raise HubError(
            f"The token may only read, so {url.repo_id} could not be uploaded to. Log in with `hf auth login`, or "
            "set HF_TOKEN to a token with write access."
        )
    if url.repo_id.partition("/")[0] not in mine:
        raise HubError(
            f"{url.repo_id} exists and is not yours. You may write to: {', '.join(mine)}. Name another "
            "repository with --hub-id (hub.id)."
        )
    _ask("validate the model card", lambda: ModelCard(card, ignore_metadata_errors=False).validate())
    return str(url.repo_id)


def full_name(repo: str, *, token: str | None = None) -> str:
    """`owner/name` of a repository; one without an owner is the token's.

    Raises:
        HubError: no token or a wrong one, or no connection.
    """
    if "/" in repo:
        return repo
    api = _api(token)
    return f"{_ask('check the token', lambda: api.whoami())['name']}/{repo}"


def push(
    folder: Path,
    repo: str,
    *,
    files: Sequence[str],
    private: bool | None = None,
    token: str | None = None,
    message: str = "Add the adapter",
    source: Path | None = None,
    more: Sequence[str] = (),
    replace_card: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> str:
    """Upload what `files` (patterns such as "previews/**") match in a folder; the repository's URL.

    It goes on where an upload that failed ended: files are known by their hashes, and those that arrived are not
    sent again. A model card that somebody edited on the Hub is not replaced by one that nobody edited, unless
    `replace_card` says so.

    Args:
        source, more: what a person names to try again, where it is not `folder`, and further options.
        say: told what a person should know.

    Raises:
        HubError: what the Hub refused, with the command to try again. Nothing on disk is changed.
    """
    folder = Path(folder)
    source = folder if source is None else source
    if not [file for pattern in files for file in folder.glob(pattern) if file.suffix == ".safetensors"]:
        raise HubError(
            f"{source} holds no finished adapter: there is no adapter to upload. A run that was interrupted goes "
            f"on with: scumble train --output {shlex.quote(str(source))} --resume latest. Or upload the file of "
            "one of its checkpoints: scumble push CHECKPOINT/pytorch_lora_weights.safetensors"
        )
    again = (
        f"Everything is kept in {source}. Try again, and it goes on where it ended: "
        f"{' '.join([retry_command(source, repo, private), *more])}"
    )
    api = _api(token)
    full: Any = _ask(
        f"create the repository {repo!r}",
        lambda: api.create_repo(repo, private=private, exist_ok=True),
        hint=again,
    )
    kept = []
    mine = folder / CARD
    if mine.is_file() and unedited(mine.read_text(encoding="utf-8")) and not replace_card:
        theirs = _ask(f"read the model card of {full.repo_id}", lambda: _card(api, full.repo_id), hint=again)
        if theirs is not None and not unedited(theirs):
            kept = [CARD]
            say(
                f"The model card of {full.repo_id} was edited there, and is kept. --replace-card replaces it."
            )
    _ask(
        f"upload to {full.repo_id}",
        lambda: api.upload_folder(
            repo_id=full.repo_id,
            folder_path=str(folder),
            commit_message=message,
            allow_patterns=list(files),
            ignore_patterns=kept,
        ),
        hint=again,
    )
    return f"{api.endpoint}/{full.repo_id}"


def retry_command(folder: Path, repo: str, private: bool | None = None) -> str:
    """The command line that uploads this folder again."""
    choice = {None: "", True: " --private", False: " --public"}[private]
    return f"scumble push {shlex.quote(str(folder))} {shlex.quote(repo)}{choice}"


def _card(api: Any, repo: str) -> str | None:
    """The model card that is in a repository now; None when it has none, or an empty one."""
    if not any(file.rfilename == CARD for file in api.model_info(repo).siblings or ()):
        return None
    text = Path(api.hf_hub_download(repo, CARD)).read_text(encoding="utf-8-sig")
    return text if text.strip() else None


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
