"""Settings from a file, flags and dotted overrides: every mistake is told at once, with place and way out."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from scumble.errors import ConfigError, UnknownName, did_you_mean
from scumble.settings import Settings

if TYPE_CHECKING:
    from scumble.runs.config import RunConfig

S = TypeVar("S", bound=Settings)
Route = tuple[str, ...]


@dataclass(frozen=True)
class Given:
    """One value, the setting it is for, and where a person wrote it."""

    path: Route
    """`("train", "steps")`"""
    value: object
    where: str
    """`run.toml:5`, `--steps` or `train.steps=200`"""


def load(
    file: Path | None = None, overrides: Sequence[str] = (), given: Sequence[Given] = (), **keywords: object
) -> RunConfig:
    """A validated RunConfig from a TOML file, then flags, then dotted overrides; what comes later wins.

    `overrides` are texts such as `train.steps=200`; a value that is not TOML is taken as a plain string. `given`
    are values with a place of their own (flags). `keywords` are settings by name, with `__` for the dot
    (`train__steps=200`) or whole sections as mappings (`train={"steps": 200}`).

    Raises:
        ConfigError: the file is missing or not TOML, or settings are wrong: all of them, one a line.
    """
    from scumble.runs.config import RunConfig

    values: list[Given] = [*read(file)] if file is not None else []
    values += given
    values += [argument(name, value) for name, value in keywords.items()]
    values += [override(text) for text in overrides]
    return assemble(RunConfig, values)


def read(file: Path) -> list[Given]:
    """Every top-level value of a TOML file, and every deeper key with its line.

    Raises:
        ConfigError: no such file, not UTF-8, or not TOML (with line and column).
    """
    try:
        text = Path(file).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(
            f"There is no settings file {file}. Write one with: scumble config new > {file}"
        ) from None
    except IsADirectoryError:
        raise ConfigError(f"{file} is a folder. Name the settings file in it, e.g. {file}/run.toml") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file} is not UTF-8 text (byte {error.start}). Save it as UTF-8.") from None
    try:
        tree = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        message, place = str(error), ""
        found = re.search(r" \(at (?:line (\d+), column (\d+)|end of document)\)$", message)
        if found:
            message = message[: found.start()]
            place = f":{found[1]}:{found[2]}" if found[1] else f":{text.count(chr(10)) + 1}"
        raise ConfigError(f"{file}{place}: this is not TOML: {message}.") from None
    lines = key_lines(text)
    return list(_leaves(tree, (), str(file), lines))


def override(text: str) -> Given:
    """`train.steps=200` as a value with its place.

    Raises:
        ConfigError: there is no `=`, or a part of the name is empty.
    """
    name, equals, value = text.partition("=")
    path = tuple(part.strip() for part in name.split("."))
    if not equals or not all(path):
        raise ConfigError(f"{text!r} is no setting. Write it as section.name=value, e.g. train.steps=200")
    return Given(path, _value(value.strip()), text)


def argument(name: str, value: object) -> Given:
    """A Python keyword: `train__steps` is `train.steps`."""
    return Given(tuple(name.split("__")), _plain(value), f"{name}=")


def assemble(kind: type[S], values: Iterable[Given]) -> S:
    """Build `kind` from values, later ones winning.

    Raises:
        ConfigError: one line for every mistake, each with its place.
    """
    tree: dict[str, Any] = {}
    places: dict[Route, str] = {}
    problems: list[str] = []
    for item in values:
        problem = _put(tree, places, item)
        if problem:
            problems.append(problem)
    settings: S | None = None
    try:
        settings = kind.model_validate(tree)
    except ValidationError as error:
        seen: set[str] = set()
        for line in _explain(kind, tree, places, error.errors(include_url=False)):
            if line not in seen:
                seen.add(line)
                problems.append(line)
    if problems or settings is None:
        raise ConfigError("\n".join(problems))
    return settings


def key_lines(text: str) -> dict[Route, int]:
    """The line of each key and section header of a valid TOML text, counted from 1.

    Keys inside an inline table are found under the key that holds the table, which is on the same line.
    """
    lines: dict[Route, int] = {}
    header: Route = ()
    position, line = 0, 1
    while position < len(text):
        rest = text[position:]
        space = re.match(r"(?:[ \t\r]+|#[^\n]*|\n)+", rest)
        if space:
            line += space[0].count("\n")
            position += space.end()
            continue
        section = re.match(rf"\[\[?\s*({_KEY})\s*\]\]?", rest)
        if section:
            header = _route(section[1])
            lines.setdefault(header, line)
            position += section.end()
            continue
        key = re.match(rf"({_KEY})\s*=\s*", rest)
        if key is None:  # not reached for a text that tomllib accepts
            break
        path = header + _route(key[1])
        lines.setdefault(path, line)
        end = _value_end(text, position + key.end())
        line += text.count("\n", position, end)
        position = end
    return lines


_PART = r"""(?:[A-Za-z0-9_-]+|"(?:[^"\\\n]|\\.)*"|'[^'\n]*')"""
_KEY = rf"{_PART}(?:\s*\.\s*{_PART})*"
_STRING = re.compile(
    r'"""(?:[^\\]|\\.)*?"{3,5}|' + r"'''.*?'{3,5}" + r"""|"(?:[^"\\\n]|\\.)*"|'[^'\n]*'""", re.DOTALL
)


def _route(key: str) -> Route:
    return tuple(part.strip("\"'") for part in re.findall(_PART, key))


def _value_end(text: str, position: int) -> int:
    """Where the value that starts at `position` ends."""
    depth = 0
    while position < len(text):
        character = text[position]
        if character in "\"'":
            string = _STRING.match(text, position)
            position = string.end() if string else position + 1
            continue
        if character == "#":
            newline = text.find("\n", position)
            position = len(text) if newline < 0 else newline
            continue
        if character in "[{":
            depth += 1
        elif character in "]}":
            depth -= 1
        elif character == "\n" and depth == 0:
            return position
        position += 1
    return position


def _leaves(tree: Mapping[str, Any], path: Route, file: str, lines: Mapping[Route, int]) -> Iterator[Given]:
    for name, value in tree.items():
        here = (*path, name)
        line = _nearest(lines, here)
        if isinstance(value, dict) and value:
            yield Given(here, {}, f"{file}:{line}" if line else file)
            yield from _leaves(value, here, file, lines)
        else:
            yield Given(here, value, f"{file}:{line}" if line else file)


def _nearest(places: Mapping[Route, Any], path: Route) -> Any:
    for length in range(len(path), 0, -1):
        if path[:length] in places:
            return places[path[:length]]
    return None


def _put(tree: dict[str, Any], places: dict[Route, str], item: Given) -> str | None:
    """Set one value; the sentence of a problem when a part of its path already holds a plain value."""
    at = tree
    for depth, part in enumerate(item.path[:-1], 1):
        below = at.setdefault(part, {})
        if not isinstance(below, dict):
            whole = ".".join(item.path[:depth])
            return (
                f"{item.where}: {whole} is {_show(below)} ({places[item.path[:depth]]}), not a section, "
                f"so {'.'.join(item.path)} can't be set."
            )
        at = below
    name = item.path[-1]
    if isinstance(item.value, Mapping):
        below = at.setdefault(name, {})
        places.setdefault(item.path, item.where)
        if not isinstance(below, dict):
            at[name] = below = {}
        for key, value in item.value.items():
            problem = _put(tree, places, Given((*item.path, str(key)), value, item.where))
            if problem:
                return problem
        return None
    at[name] = item.value
    places[item.path] = item.where
    return None


def _value(text: str) -> object:
    """An override's text: TOML where it is TOML, null for none, otherwise the text itself."""
    if text == "null":
        return None
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _plain(value: object) -> object:
    """Settings objects given from Python, as the mapping of what was set in them."""
    if isinstance(value, Settings):
        return {name: _plain(getattr(value, name)) for name in {*marks(type(value)), *value.model_fields_set}}
    return value


def _explain(
    kind: type[Settings], tree: Mapping[str, Any], places: Mapping[Route, str], errors: Sequence[ErrorDetails]
) -> Iterator[str]:
    for error in errors:
        path = _real_path(tree, error)
        where = _nearest(places, path)
        prefix = f"{where}: " if where else ""
        section, name = path[:-1], path[-1] if path else ""
        dotted = ".".join(path)
        if error["type"] == "extra_forbidden":
            yield prefix + _unknown(kind, section, name, tree)
        elif error["type"] == "union_tag_invalid":
            tag, known = error["ctx"]["tag"], error["ctx"]["expected_tags"].replace("'", "").split(", ")
            mark = (*path, error["ctx"]["discriminator"].strip("'"))
            where = _nearest(places, mark)
            prefix = f"{where}: " if where else ""
            yield f'{prefix}{".".join(mark)} = "{tag}": {UnknownName(mark[-1], tag, known)}'
        elif error["type"] == "missing":
            doc = _doc(kind, path, tree)
            yield f"{prefix}{dotted} is not set{': ' + doc if doc else '.'}"
        elif error["type"] in ("model_type", "model_attributes_type", "dict_type"):
            shown = _show(error["input"])
            yield f"{prefix}{dotted} = {shown}: must be a section of settings, e.g. [{dotted}]"
        else:
            said = f"{dotted} = " if dotted else ""
            yield f"{prefix}{said}{_shown_input(error, bool(dotted))}{_message(error)}"


def _real_path(tree: Mapping[str, Any], error: ErrorDetails) -> Route:
    """pydantic's location without the names of union branches, which nobody wrote."""
    path: list[str] = []
    at: Any = tree
    last = len(error["loc"]) - 1
    for index, part in enumerate(error["loc"]):
        if isinstance(at, Mapping):
            if part in at:
                path.append(str(part))
                at = at[part]
            elif index == last and error["type"] == "missing":
                path.append(str(part))
            elif index == 0 and error["type"] == "missing":  # a method's section that nobody wrote
                path.append(str(part))
                at = {}
        elif isinstance(at, list | tuple) and isinstance(part, int) and part < len(at):
            at = at[part]  # a list is one value to the person who wrote it
    return tuple(path)


def _unknown(kind: type[Settings], section: Route, name: str, tree: Mapping[str, Any]) -> str:
    inside, others = _section(kind, section, tree)
    known = tuple(inside.model_fields) if inside else ()
    said = f"[{'.'.join(section)}] has no setting" if section else "there is no setting"
    if inside and others and name not in inside.model_fields:
        mine, able = marks(inside), [marks(other) for other in others if name in other.model_fields]
        if able:
            words = " or ".join(_as_settings(one) for one in able)
            return f'{said} "{name}" with {_as_settings(mine)}. It is a setting of {words}.'
    near = did_you_mean(name, known)
    if not near:
        elsewhere = [".".join(path) for path in _all_paths(kind) if path[-1] == name]
        if not elsewhere:
            leaves = {path[-1]: ".".join(path) for path in _all_paths(kind)}
            guess = did_you_mean(name, leaves)
            elsewhere = [leaves[leaf] for leaf in leaves if guess and f'"{leaf}"' in guess]
        near = (
            f" Did you mean {' or '.join(f'{chr(34)}{path}{chr(34)}' for path in dict.fromkeys(elsewhere))}?"
            if elsewhere
            else ""
        )
    if not near:
        near = f" It has: {', '.join(known)}." if section else f" There are: {', '.join(known)}."
    return f'{said} "{name}".{near}'


def _section(
    kind: type[Settings], path: Route, tree: Mapping[str, Any]
) -> tuple[type[Settings] | None, tuple[type[Settings], ...]]:
    """(the section at `path`, the alternatives to it)."""
    at: type[Settings] | None = kind
    others: tuple[type[Settings], ...] = ()
    values: Any = tree
    for part in path:
        if at is None or part not in at.model_fields:
            return None, ()
        annotation = at.model_fields[part].annotation
        values = values.get(part) if isinstance(values, Mapping) else None
        at = section_type(annotation, values)
        others = tuple(option for option in section_types(annotation) if option is not at)
    return at, others


def section_type(annotation: Any, values: Any = None) -> type[Settings] | None:
    """The Settings class in an annotation (`X`, `X | None`, `str | X`), or None. Of several alternatives the one
    that `values` name, by a setting that only one word fits (`family = "dora"`); else the first."""
    options = section_types(annotation)
    if len(options) > 1 and isinstance(values, Mapping):
        for option in options:
            if any(values.get(name) == mark for name, mark in marks(option).items()):
                return option
    return options[0] if options else None


def section_types(annotation: Any) -> tuple[type[Settings], ...]:
    """Every Settings class in an annotation."""
    if isinstance(annotation, type) and issubclass(annotation, Settings):
        return (annotation,)
    if get_origin(annotation) in (Union, UnionType):
        return tuple(found for option in get_args(annotation) for found in section_types(option))
    return ()


def marks(kind: type[Settings]) -> dict[str, Any]:
    """The settings that only one value fits, by which alternatives are told apart: `{"family": "dora"}`."""
    return {
        name: get_args(field.annotation)[0]
        for name, field in kind.model_fields.items()
        if get_origin(field.annotation) is Literal and len(get_args(field.annotation)) == 1
    }


def _as_settings(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} = {_show(value)}" for name, value in values.items())


def _all_paths(kind: type[Settings], path: Route = ()) -> Iterator[Route]:
    for name, field in kind.model_fields.items():
        yield (*path, name)
        for below in section_types(field.annotation):
            yield from _all_paths(below, (*path, name))


def _doc(kind: type[Settings], path: Route, tree: Mapping[str, Any]) -> str:
    inside, _ = _section(kind, path[:-1], tree)
    if inside is None or path[-1] not in inside.model_fields:
        return ""
    return " ".join((inside.model_fields[path[-1]].description or "").split())


def _shown_input(error: ErrorDetails, named: bool) -> str:
    value = error["input"]
    return f"{_show(value)}: " if named and not isinstance(value, Mapping) else ""


def _message(error: ErrorDetails) -> str:
    text = error["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
    text = re.sub(r"^Input should be", "must be", text)
    text = re.sub(r", unable to parse string as an? (\w+)$", "", text)
    text = text.replace("must be a valid integer", "must be a whole number")
    text = text.replace("must be a valid number", "must be a number")
    text = text.replace("must be a valid boolean", "must be true or false")
    text = text.replace("must be a valid string", "must be a text, in quotes")
    text = re.sub(r"^String should", "must", text)
    return text if text.endswith((".", "?", "!")) else text + "."


def _show(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return f'"{value}"'
    return str(value)
