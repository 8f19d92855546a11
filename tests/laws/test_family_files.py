"""Law of families and files: every family, in every form that its options give, can be written, and comes back."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest

from scumble.adapters import FAMILIES, Lora, LoraSettings
from scumble.adapters.delta import DeltaSettings
from scumble.errors import CannotRepresent, FormatError
from scumble.formats import CODECS, read, write
from scumble.formats.codec import dialect_for
from tests.formats.adapters_of import SHAPES, of_family

OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"rank": 2, "alpha": 3.0},
    {"rank_stabilized": True},
    {"magnitude": True},
    {"tucker": True},
    {"factor": 2, "tucker": True, "magnitude": True},
    {"decompose_both": True, "rank": 1, "alpha": 3.0},
    {"inputs": True},
)


def cases() -> Iterator[Any]:
    """Every family of the registry with the options that it has."""
    for family in FAMILIES:
        kind = FAMILIES.get(family).settings
        for options in OPTIONS:
            scaled = family in ("full", "ia3") and "alpha" in options  # no file of theirs has a scale
            if set(options) <= set(kind.model_fields) and not scaled:
                yield pytest.param(kind(**options), id=f"{family} {options}")


@pytest.mark.parametrize("settings", list(cases()))
def test_every_family_comes_back_or_a_format_is_named_that_holds_it(settings: DeltaSettings) -> None:
    state = of_family(settings)
    codecs = {name: CODECS.get(name)() for name in CODECS}
    able = [name for name, codec in codecs.items() if codec.obstacle(state) is None]
    assert dialect_for(state) in able  # a family that trains can be saved
    for name, codec in codecs.items():
        if name not in able:
            with pytest.raises(CannotRepresent) as caught:
                codec.encode(state)
            assert all(other in str(caught.value) for other in able)
            continue
        file = codec.encode(state)
        assert [other for other in codecs if codecs[other].matches(file)] == [name]
        for layers in (state.layers.keys(), SHAPES):  # with names alone, and with shapes
            decoded = codec.decode(file, layers)
            assert decoded.state.equal(state)
            assert set(decoded.used) == set(file.tensors) and not decoded.unused and not decoded.ignored


class OutsideSettings(LoraSettings):
    """Settings of a family that is somebody else's."""

    family: Literal["outside"] = "outside"  # type: ignore[assignment]
    """The adapter family."""


class Outside(Lora):
    """A family that only its own file and the registry know."""

    family = "outside"
    settings = OutsideSettings


def test_an_outsiders_family_is_written_and_read_without_a_line_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(FAMILIES._table, "outside", f"{__name__}:Outside")
    state = of_family(OutsideSettings(rank=3, alpha=2.0, rank_stabilized=True))
    path = write(state, tmp_path / "outside.safetensors")
    for layers in (state.layers.keys(), SHAPES):
        assert read(path, layers).state.equal(state)
    monkeypatch.undo()
    FAMILIES._loaded.pop("outside", None)
    with pytest.raises(FormatError, match="'outside', which is not installed here"):
        read(path, SHAPES)
