"""Settings written as TOML: the resolved file of a run, and the commented one that a person starts from."""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Iterator, Mapping
from enum import Enum
from pathlib import PurePath
from typing import Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from scumble.runs.load import marks, section_type, section_types
from scumble.settings import Settings


def dump(settings: Settings, *, changed_only: bool = False) -> str:
    """Every setting with its value, so that `load` gives the same settings back.

    A setting that is None is left out, as TOML has no null; `changed_only` leaves out those at their default, too.

    Law: `load(file with dump(s)) == s`.
    """
    return "\n".join(_dump(settings, (), changed_only, ())).strip() + "\n"


def template(kind: type[Settings], chosen: Mapping[str, Any]) -> str:
    """A TOML text with every setting of `kind`: its docstring as a comment, then its default, commented out.
    Sections that are absent by default are left out, unless `chosen` has something of theirs.

    `chosen` are dotted names with values; they stand uncommented, and decide between alternatives
    (`{"adapter.family": "dora"}`). A required setting that is not chosen stands
    uncommented with an empty value, so that the file is refused until it is filled in.
    """
    lines = list(_template(kind, (), chosen))
    return "\n".join(lines).strip() + "\n"


def value(item: Any) -> str:
    """One value as TOML text."""
    if isinstance(item, Enum):
        return value(item.value)
    if isinstance(item, bool):
        return "true" if item else "false"
    if isinstance(item, int):
        return str(item)
    if isinstance(item, float):
        if math.isnan(item) or math.isinf(item):
            return "nan" if math.isnan(item) else ("inf" if item > 0 else "-inf")
        return repr(item)
    if isinstance(item, str | PurePath):
        return _quoted(str(item))
    if isinstance(item, Settings):
        return value({name: getattr(item, name) for name in type(item).model_fields})
    if isinstance(item, Mapping):
        inside = ", ".join(
            f"{key(name)} = {value(below)}" for name, below in item.items() if below is not None
        )
        return f"{{ {inside} }}" if inside else "{}"
    if isinstance(item, list | tuple | set | frozenset):
        return "[" + ", ".join(value(below) for below in item) + "]"
    raise TypeError(f"no TOML for {type(item).__name__}")


def key(name: str) -> str:
    """A key, quoted when TOML wants it."""
    plain = name and all(
        character.isascii() and (character.isalnum() or character in "_-") for character in name
    )
    return name if plain else _quoted(name)


def _quoted(text: str) -> str:
    """JSON's quoted form, in which only DEL is not TOML's."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _dump(
    settings: Settings, path: tuple[str, ...], changed_only: bool, always: tuple[str, ...]
) -> Iterator[str]:
    sections: list[tuple[str, Settings]] = []
    for name, field in type(settings).model_fields.items():
        item = getattr(settings, name)
        if isinstance(item, Settings):
            sections.append((name, item))
        elif item is not None and not (
            changed_only and name not in always and item == field.get_default(call_default_factory=True)
        ):
            yield f"{key(name)} = {value(item)}"
    for name, section in sections:
        here = (*path, name)
        usual = type(settings).model_fields[name].get_default(call_default_factory=True)
        # another alternative than the usual one must say which it is
        must = () if isinstance(section, type(usual)) else tuple(marks(type(section)))
        lines = list(_dump(section, here, changed_only, must))
        if lines:
            if not lines[0].startswith(("[", "\n")) and lines[0]:
                yield ""
                yield f"[{'.'.join(key(part) for part in here)}]"
            yield from lines


def _template(
    kind: type[Settings],
    path: tuple[str, ...],
    chosen: Mapping[str, Any],
    others: tuple[type[Settings], ...] = (),
) -> Iterator[str]:
    """`others`: the alternatives to `kind`."""
    sections: list[tuple[str, FieldInfo, type[Settings]]] = []
    for name, field in kind.model_fields.items():
        start = ".".join((*path, name, ""))
        values = {full.removeprefix(start): item for full, item in chosen.items() if full.startswith(start)}
        below = section_type(field.annotation, values)
        if below is not None:
            # one that is absent by default would be there by its header alone
            if values or field.is_required() or field.get_default(call_default_factory=True) is not None:
                sections.append((name, field, below))
            continue
        yield from _comment(field.description)
        options = _options(field.annotation)
        if name in marks(kind):
            options += [value(marks(other)[name]) for other in others if name in marks(other)]
        if options:
            yield from _comment("One of: " + ", ".join(options) + ".")
        dotted = ".".join((*path, name))
        if dotted in chosen:
            yield f"{key(name)} = {value(chosen[dotted])}"
        elif field.is_required():
            yield f"{key(name)} = # required"
        else:
            default = field.get_default(call_default_factory=True)
            unset = default is None or default is PydanticUndefined
            yield f"# {key(name)} =" + ("" if unset else f" {value(default)}")
        yield ""
    for name, field, below in sections:
        here = (*path, name)
        yield from _comment(field.description)
        yield f"[{'.'.join(here)}]"
        rest = tuple(option for option in section_types(field.annotation) if option is not below)
        yield from _template(below, here, chosen, rest)


def _comment(text: str | None) -> Iterator[str]:
    words = " ".join((text or "").split())
    for line in textwrap.wrap(words, 106):
        yield f"# {line}"


def _options(annotation: Any) -> list[str]:
    """The words that a Literal allows, as TOML; empty for other types."""
    if get_origin(annotation) is Literal:
        return [value(option) for option in get_args(annotation)]
    found: list[str] = []
    for option in get_args(annotation) if get_origin(annotation) is not None else ():
        if get_origin(option) is Literal:
            found += _options(option)
    return found
