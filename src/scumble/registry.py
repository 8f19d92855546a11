"""Registry: names to objects, imported when first asked for, so that listing costs nothing.

An outsider adds to a registry by an entry point in the group `scumble.<kind>`, without a change here.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from importlib.metadata import entry_points
from typing import Generic, TypeVar, cast

from scumble.errors import ConfigError, UnknownName

T = TypeVar("T")


class Registry(Generic[T]):
    """A table of plug-ins of one kind: `name -> "module:object"`.

    Law: `get(name)` returns the same object at every call; two plug-ins of one name are an error that lists both.
    """

    def __init__(self, kind: str, table: Mapping[str, str]) -> None:
        """`kind` is the word users read ("adapter family"); `table` maps names to `"module:object"`."""
        self.kind = kind
        self._table = dict(table)
        self._loaded: dict[str, T] = {}
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
        """
        self._read_entry_points()
        if name not in self._loaded:
            if name not in self._table:
                raise UnknownName(self.kind, name, self._table)
            module, _, attribute = self._table[name].partition(":")
            self._loaded[name] = cast(T, getattr(importlib.import_module(module), attribute))
        return self._loaded[name]

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
            self._table[point.name] = point.value
        self._entry_points_read = True
