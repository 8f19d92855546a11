"""Publish: a run's folder or a bare adapter file goes to the Hub with a card that says what is known of it."""

from __future__ import annotations

import shlex
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from scumble.errors import ConfigError, FormatError, HubError
from scumble.runs import hub
from scumble.runs.card import CardFacts, unedited, write_card
from scumble.runs.folder import CARD, RunFolder
from scumble.runs.load import load
from scumble.runs.reproduce import settings_of
from scumble.runs.toml import dump

PICTURES = "pictures"
"""Where the pictures of a bare file's card lie in its repository."""


def publish(
    source: str | Path,
    repo: str | None = None,
    *,
    base: str | None = None,
    prompts: Sequence[str] = (),
    license: str | None = None,
    private: bool | None = None,
    replace_card: bool = False,
    token: str | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> str:
    """Upload a run's folder or an adapter's file; the repository's URL.

    A run's card is written anew from what lies in its folder, with what `scumble evaluate` measured since, unless
    somebody edited it. A bare file gets one from its header.

    Args:
        source: a run's folder, a .safetensors file, or a folder that holds one.
        repo: name or owner/name. Unset: the name of the folder or the file, under your account.
        base: what a bare file was trained on, where neither the file nor a card beside it says so.
        prompts: pictures for a bare file's card, drawn now: the base's beside the adapter's.
        license: what the card names, as the Hub spells it; a run's own setting otherwise.
        private: for a new repository. None: the account's default.
        replace_card: replace the model card on the Hub also where somebody edited it there, and write the run's
            anew also where somebody edited it here.
        token: by default the stored one or HF_TOKEN.
        say: told what a person should know.

    Raises:
        HubError: nothing is there to upload, or the Hub refused; names the command to try again.
        ConfigError, FormatError, ModelError: the source or its base can't be used.
    """
    source = Path(source).expanduser()
    if not source.exists():
        raise HubError(f"There is no run folder and no file {source}.")
    name = repo or (source.resolve().stem if source.is_file() else source.resolve().name)
    name = hub.full_name(name, token=token)  # the card says how to load it from there
    how: dict[str, Any] = {"private": private, "token": token, "replace_card": replace_card, "say": say}
    folder = RunFolder(source)
    if folder.settings.is_file():
        if base is not None or prompts:
            raise ConfigError(
                "--base and --prompt are for a bare file: a run has its base and its previews. Leave them out."
            )
        if folder.adapter.exists() and (replace_card or _is_ours(folder.card)):
            _write_card(folder, name, license, say)
        elif license is not None:
            raise ConfigError(
                f"{folder.card} was edited, so --license is not put into it. Write `license: {license}` between "
                "its two --- lines, or replace the card with --replace-card."
            )
        return hub.push(source, name, files=folder.published(), **how)
    return _publish_file(source, name, base, prompts, license, how)


def _is_ours(card: Path) -> bool:
    return not card.is_file() or unedited(card.read_text(encoding="utf-8"))


def _write_card(folder: RunFolder, name: str, license: str | None, say: Callable[[str], None]) -> None:
    from scumble.runs.train import card_facts
    from scumble.training.sinks.report import read_record

    try:
        record = read_record(folder.report)
        config = load(folder.settings)
    except (OSError, ValueError, TypeError, ConfigError) as error:
        if not folder.card.is_file():
            raise ConfigError(f"No model card can be written from {folder.path}: {error}") from error
        say(f"The model card stays as the run wrote it: {error}")
        return
    facts = card_facts(config, folder, name, record.facts)
    if license is not None:
        facts = replace(facts, license=license)
    folder.card.write_text(write_card(facts), encoding="utf-8")


def _publish_file(
    source: Path,
    name: str,
    base: str | None,
    prompts: Sequence[str],
    license: str | None,
    how: dict[str, Any],
) -> str:
    from scumble.formats.container import find, read_header
    from scumble.inference.find_base import find_base

    file = find(source)
    if file.suffix.lower() != ".safetensors":
        raise FormatError(
            f"{file} is no single .safetensors file. Write one first: scumble convert {file} --to diffusers"
        )
    named = base or find_base(file)
    with tempfile.TemporaryDirectory(prefix="scumble-push-") as temporary:
        folder = Path(temporary)
        # in some dialects half of what is said
        beside = [file.with_name(name) for name in read_header(file).beside]
        for path in (file, *beside):
            shutil.copyfile(path, folder / path.name)
        facts = file_facts(file, name, named)
        if prompts:  # drawing takes time: what the Hub could refuse is asked before
            hub.prepare(name, write_card(facts), private=how["private"], token=how["token"])
            facts = replace(facts, panels=_draw(named, file, prompts, folder / PICTURES))
        facts = replace(facts, license=license or facts.license, folder=folder)
        (folder / CARD).write_text(write_card(facts), encoding="utf-8")
        files = [file.name, *(path.name for path in beside), CARD, f"{PICTURES}/**"]
        options = [("--base", base), *(("--prompt", prompt) for prompt in prompts), ("--license", license)]
        more = [f"{flag} {shlex.quote(value)}" for flag, value in options if value]
        return hub.push(folder, name, files=files, source=source, more=more, **how)


def file_facts(file: Path, name: str, base: str) -> CardFacts:
    """What a card can say of an adapter from its file alone.

    Raises:
        FormatError: it can't be read.
    """
    from scumble.formats import read
    from scumble.runs.train import said_by

    found = read(file)
    layers = found.state.layers.values()
    ranks = sorted({layer.rank for layer in layers})
    facts: dict[str, object] = {
        "layers": len(found.state.layers),
        "parameters": sum(tensor.numel() for layer in layers for tensor in layer.tensors.values()),
        **({"rank": ", ".join(map(str, ranks))} if ranks else {}),
        "format": found.dialect,
    }
    known = CardFacts(name=name, base=base, file=file.name, facts=facts, **said_by(file))
    try:
        config = settings_of(file)
    except (ConfigError, FormatError):  # another tool's, or another version's: the card does without
        return known
    return replace(
        known,
        rest=config.rest or "",
        dataset=config.data.images if config.data else "",
        prompt=(config.pictures.caption or "") if config.pictures else "",
        method=config.method,
        license=config.hub.license or "",
        settings=dump(config, changed_only=True),
    )


def _draw(base: str, file: Path, prompts: Sequence[str], folder: Path) -> Any:
    from scumble.inference.find_base import find_rest
    from scumble.inference.request import Request
    from scumble.models.loading import load_base
    from scumble.training.preview import previewer

    requests = [Request(prompt=prompt, seed=number) for number, prompt in enumerate(prompts)]
    loaded = load_base(base, dtype=None, device=None, rest=find_rest(file, base))
    return tuple(previewer(loaded, requests, folder)(file, 0))
