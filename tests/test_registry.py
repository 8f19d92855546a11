"""Registry: names to objects, imported when asked for; outsiders enter by entry points."""

from __future__ import annotations

import importlib.metadata
import sys
from pathlib import Path

import pytest

from scumble.errors import ConfigError, ScumbleError, UnknownName, did_you_mean
from scumble.registry import Registry


def test_a_plug_in_is_imported_when_asked_for() -> None:
    registry: Registry[object] = Registry(
        "toy", {"decimal": "decimal:Decimal", "missing": "no.such.module:X"}
    )
    assert registry.names() == ("decimal", "missing")  # listing imports nothing, or this would fail
    assert registry.get("decimal") is registry.get("decimal") is sys.modules["decimal"].Decimal
    assert "decimal" in registry and "other" not in registry and list(registry) == ["decimal", "missing"]


def test_an_unknown_name_lists_what_there_is_and_suggests() -> None:
    registry: Registry[object] = Registry("adapter family", {"lora": "a:b", "dora": "a:b"})
    with pytest.raises(
        UnknownName, match=r"no adapter family 'lorra'.*Did you mean \"lora\".*Known: dora, lora"
    ):
        registry.get("lorra")


def test_entry_points_add_and_collisions_are_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    def points(group: str) -> list[importlib.metadata.EntryPoint]:
        assert group == "scumble.base_family"
        return [importlib.metadata.EntryPoint("outside", "decimal:Decimal", group)]

    monkeypatch.setattr("scumble.registry.entry_points", points)
    registry: Registry[object] = Registry("base family", {"sd1": "a:b"})
    assert registry.names() == ("outside", "sd1")
    taken: Registry[object] = Registry("base family", {"outside": "mine:Thing"})
    with pytest.raises(ConfigError, match=r"Two plug-ins.*mine:Thing and decimal:Decimal"):
        taken.names()


def test_a_broken_plug_in_is_named_and_breaks_no_other(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    about = tmp_path / "their_thing-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: their-thing\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(
        "[scumble.toy]\nbroken = no.such.module:X\nabsent = decimal:Nothing\nwhole = decimal:Context\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    registry: Registry[object] = Registry("toy", {"decimal": "decimal:Decimal"})
    assert registry.names() == ("absent", "broken", "decimal", "whole")
    with pytest.raises(
        ConfigError, match=r"toy 'broken' of the package their-thing.*No module named 'no'.*uninstall"
    ):
        registry.get("broken")
    with pytest.warns(UserWarning, match="their-thing") as warned:
        assert [name for name, _ in registry.working()] == ["decimal", "whole"]
    assert len(warned) == 2
    assert [name for name, _ in registry.working()] == ["decimal", "whole"]  # and says it once
    (about / "entry_points.txt").unlink()
    registry.refresh()
    assert registry.names() == ("decimal",)
    ours: Registry[object] = Registry("toy", {"missing": "no.such.module:X"})
    with pytest.raises(ModuleNotFoundError):  # our own bugs keep their traceback
        list(ours.working())


def test_every_error_has_a_text_and_an_exit_code() -> None:
    def below(kind: type[ScumbleError]) -> list[type[ScumbleError]]:
        return [kind] + [deep for child in kind.__subclasses__() for deep in below(child)]

    for kind in below(ScumbleError):
        assert kind.__doc__ and kind.exit_code > 0


def test_suggestions_are_near_or_none() -> None:
    assert did_you_mean("optimiser", ["optimizer", "steps"]) == ' Did you mean "optimizer"?'
    assert did_you_mean("zzz", ["optimizer"]) == ""
