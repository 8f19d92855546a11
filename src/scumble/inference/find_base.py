"""Finding: an adapter's file, here or on the Hub, and the base it was made for, as the adapter itself says.

Nobody who was handed a LoRA should have to guess what to use it with: our metadata names the base, and so
does the model card (README.md) that stands beside most adapters.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scumble.errors import FormatError, ModelError
from scumble.formats.codec import cross_attention_width, detect, down_shapes, read
from scumble.formats.container import WEIGHTS_NAME, find, read_header
from scumble.formats.metadata import from_header
from scumble.formats.tables.bases import TITLES, WIDTHS, told_by
from scumble.inference.repository import download, file_names
from scumble.models.hub import PICTUREBOOK, is_hub_id

CARD = "README.md"


def locate(adapter: str | Path) -> Path:
    """The .safetensors file that `adapter` means: a file, a folder that holds one, or a Hub id "owner/name".

    What exists on this machine is never asked for on the network.

    Raises:
        FormatError: there is no such file, or the folder or the repository holds none, or several.
        HubError: the Hub refused or can't be reached.
    """
    path = Path(adapter).expanduser()
    if path.exists():
        return find(path)
    repo = Path(adapter).as_posix()
    if not is_hub_id(repo) or path.parent.is_dir():
        raise FormatError(
            f"There is no adapter {str(adapter)!r}. Give a .safetensors file, a folder that holds one, or "
            'the id of a repository on the Hub ("owner/name").'
        )
    return download(repo, weights_name(repo, file_names(repo)))


def find_base(adapter: str | Path) -> str:
    """The base that `adapter` (as for `locate`) was made for: what `load_base` takes.

    From our own metadata in the file, else from `base_model` in the front matter of the model card beside it,
    or in its repository on the Hub.

    Raises:
        ModelError: it doesn't say, or names several; the text tells how to name one.
        FormatError, HubError: see `locate`.
    """
    file = locate(adapter)
    said = from_header(read_header(file).metadata).base_name
    if said and _may_be_loaded(said):
        return said
    local = Path(adapter).expanduser().exists()
    card = file.with_name(CARD) if local else _card(Path(adapter).as_posix())
    named = card_bases(card) if card is not None and card.is_file() else ()
    if len(named) == 1:
        return named[0]
    if said:  # a folder of the machine that trained it, which the error of loading it names
        return said
    if named:
        raise ModelError(
            f"The model card of {adapter} names {len(named)} bases: {', '.join(named)}. Choose one with "
            "--base (in Python: Session(base=...))."
        )
    where = (
        f"there is no base_model in {CARD} beside it" if local else f"its {CARD} on the Hub has no base_model"
    )
    raise ModelError(
        f"{adapter} does not say which base it was made for: no base name is in its file ({detect(file)}), "
        f"and {where}.{_shapes_say(file)} Name the base with --base (in Python: Session(base=...)): "
        "picturebook, a Hub id, a folder, or a .safetensors checkpoint."
    )


def find_rest(adapter: str | Path, base: str) -> str | None:
    """The other base from which `base`, a single file, took what it does not hold when `adapter` was trained on it;
    None where the adapter doesn't say.

    Raises:
        FormatError, HubError: see `locate`.
    """
    told = from_header(read_header(locate(adapter)).metadata).settings
    try:
        settings = json.loads(told) if told else None
    except json.JSONDecodeError:  # another tool's words
        settings = None
    said = settings.get("rest") if isinstance(settings, dict) and settings.get("base") == base else None
    return said if isinstance(said, str) and _may_be_loaded(said) else None


def _card(repo: str) -> Path | None:
    return download(repo, CARD) if CARD in file_names(repo) else None


def _may_be_loaded(name: str) -> bool:
    """Whether a base's name means something on this machine, too: no path of another one."""
    return name == PICTUREBOOK or is_hub_id(name) or Path(name).expanduser().exists()


def _shapes_say(file: Path) -> str:
    """What the shapes betray of the base, as a sentence after a space; empty where they don't."""
    state = read(file).state
    width = cross_attention_width(down_shapes(state))
    title = WIDTHS[width][1] if width in WIDTHS else TITLES.get(told_by(state.layers))
    return f" By its shapes it is for {title}." if title is not None else ""


def card_bases(card: Path) -> tuple[str, ...]:
    """The bases that a model card's front matter names under `base_model`; empty when it names none.

    Raises:
        ModelError: the front matter is there and can't be read.
    """
    import yaml

    lines = card.read_text(encoding="utf-8-sig").splitlines()
    if not lines or lines[0].strip() != "---":
        return ()
    end = next((number for number, line in enumerate(lines[1:], 1) if line.strip() == "---"), None)
    if end is None:
        return ()
    try:
        matter: Any = yaml.safe_load("\n".join(lines[1:end]))
    except yaml.YAMLError as error:
        raise ModelError(
            f"The front matter of {card} is not valid YAML ({str(error).splitlines()[0]}), so its base isn't "
            "known. Name the base with --base (in Python: Session(base=...))."
        ) from error
    named = matter.get("base_model") if isinstance(matter, dict) else None
    listed = named if isinstance(named, list) else [named]
    return tuple(name for name in listed if isinstance(name, str) and name)


def weights_name(repo: str, names: Sequence[str]) -> str:
    """Which of a repository's files is the adapter: the one that diffusers looks for, or the only one at its top.

    Raises:
        FormatError: there is none, or there are several.
    """
    found = sorted(name for name in names if name.endswith(".safetensors") and "/" not in name)
    found = [name for name in found if not name.startswith("learned_embeds")] or found  # words beside a LoRA
    if WEIGHTS_NAME in found:
        return WEIGHTS_NAME
    if len(found) == 1:
        return found[0]
    shown = ", ".join(found[:8]) or "none"
    raise FormatError(
        f"{repo} on the Hub holds {len(found)} .safetensors files ({shown}); one was expected. Download the "
        f"one to use: hf download {repo} FILE"
    )
