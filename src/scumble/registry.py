"""Registry: names to objects, imported when first asked for, so that listing costs nothing.

An outsider adds to a registry by an entry point in the group `scumble.<kind>`, without a change here.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Iterator, Mapping
from importlib.metadata import entry_points
from typing import Generic, TypeVar, cast

from scumble.errors import ConfigError, UnknownName

T = TypeVar("T")


class Registry(Generic[T]):
    """A table of plug-ins of one kind: `name -> "module:object"`.

    Laws: `get(name)` returns the same object at every call; two plug-ins of one name are an error that lists both; an
    outsider that can't be imported is named, and stands in nobody else's way.
    """

    def __init__(self, kind: str, table: Mapping[str, str]) -> None:
        """`kind` is the word users read ("adapter family"); `table` maps names to `"module:object"`."""
        self.kind = kind
        self._table = dict(table)
        self._loaded: dict[str, T] = {}
        self._outside: dict[str, str] = {}
        """Names that came by entry points -> the package that brought them."""
        self._warned: set[str] = set()
        self._entry_points_read = False

    @property
    def group(self) -> str:
        """The entry-point group for outsiders, e.g. `scumble.adapter_family`."""
        return "scumble." + self.kind.replace(" ", "_")

    def names(self) -> tuple[str, ...]:
        """Every known name, sorted. Imports no plug-in."""
        self._read_entry_points()
        return tuple(sorted(self._table))

    def get(self, name: str) -> T:
        """The object called `name`.

        Raises:
            UnknownName: nothing is called so; the text lists what there is.
            ConfigError: an outsider's plug-in can't be imported; the text names its package.
        """
        self._read_entry_points()
        if name not in self._loaded:
            if name not in self._table:
                raise UnknownName(self.kind, name, self._table)
            self._loaded[name] = self._imported(name)
        return self._loaded[name]

    def _imported(self, name: str) -> T:
        module, _, attribute = self._table[name].partition(":")
        try:
            return cast(T, getattr(importlib.import_module(module), attribute))
        except Exception as error:
            if name not in self._outside:
                raise
            raise ConfigError(
                f"The {self.kind} {name!r} of the package {self._outside[name]} can't be imported from "
                f"{self._table[name]} ({type(error).__name__}: {error}). Update that package, or uninstall it."
            ) from error

    def working(self) -> Iterator[tuple[str, T]]:
        """(name, object) of all that can be imported: to ask each of them. An outsider that can't be is warned of
        once."""
        for name in self.names():
            try:
                found = self.get(name)
            except ConfigError as error:
                if name not in self._warned:
                    self._warned.add(name)
                    warnings.warn(str(error), stacklevel=2)
                continue
            yield name, found

    def refresh(self) -> None:
        """Look for outsiders again, after a package came or went while Python runs."""
        for name in self._outside:
            self._table.pop(name, None)
            self._loaded.pop(name, None)
        self._outside.clear()
        self._warned.clear()
        self._entry_points_read = False

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def __contains__(self, name: object) -> bool:
        return name in self.names()

    def _read_entry_points(self) -> None:
        if self._entry_points_read:
            return
        for point in entry_points(group=self.group):
            mine = self._table.get(point.name)
            if mine is not None and mine != point.value:
                raise ConfigError(
                    f"Two plug-ins are called {self.kind} {point.name!r}: {mine} and {point.value}. "
                    f"Uninstall one, or rename it in the entry-point group {self.group!r}."
                )
            if mine is None:
                self._outside[point.name] = point.dist.name if point.dist is not None else "unknown"
            self._table[point.name] = point.value
        self._entry_points_read = True
