"""Drawn pictures: deterministic, found again by content, gone on with after a stop."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from PIL import Image

from scumble.errors import DataError, ModelError
from scumble.inference.session import Session
from scumble.models import FAMILIES
from scumble.models.family import BaseModel
from scumble.runs.drawn import Artist

SHORT = {"steps": 1, "guidance": 1.0}
Told = list[tuple[int, int, str]]


@pytest.fixture(scope="module")
def base() -> BaseModel:
    return FAMILIES.get("sd1").tiny(0)


def artist(base: BaseModel, cache: Path, told: Told | None = None) -> Artist:
    @contextlib.contextmanager
    def announce(what: str) -> Iterator[Callable[[int, int, str], None]]:
        yield lambda done, total, name: None if told is None else told.append((done, total, name))

    return Artist(base, cache, announce)


def pictures(folder: Path) -> dict[str, bytes]:
    return {path.name: Image.open(path).tobytes() for path in sorted(folder.glob("*.png"))}


def test_they_are_drawn_once_and_the_missing_ones_again(
    base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: Told = []
    folder = artist(base, tmp_path, told)("a dog", 4, batch=2, **SHORT)
    assert folder.parent == tmp_path and [done for done, _, _ in told] == [0, 1, 2, 3, 4]
    assert "a dog" in told[-1][2]
    first = pictures(folder)
    assert len(set(first.values())) == 4, "every picture has its own seed"
    names = sorted(first)
    (folder / names[0]).unlink()
    (folder / names[2]).unlink()
    assert artist(base, tmp_path)("a dog", 4, batch=3, **SHORT) == folder
    again = pictures(folder)
    assert again.keys() == first.keys()
    for name in names:  # another batch rounds otherwise, and draws the same
        assert max(abs(a - b) for a, b in zip(again[name], first[name], strict=True)) <= 2
    monkeypatch.setattr(Session, "generate", lambda *_: pytest.fail("nothing is missing"))
    assert artist(base, tmp_path)("a dog", 3, **SHORT) == folder


def test_another_prompt_size_or_seed_has_its_own_folder(base: BaseModel, tmp_path: Path) -> None:
    draw = artist(base, tmp_path)
    folders = {
        draw("a dog", 1, **SHORT),
        draw("a cat", 1, **SHORT),
        draw("a dog", 1, seed=1, **SHORT),
        draw("a dog", 1, side=32, **SHORT),
        draw("a dog", 1, steps=2, guidance=1.0),
    }
    assert len(folders) == 5


def test_given_pictures_count_and_strangers_are_refused(base: BaseModel, tmp_path: Path) -> None:
    given = tmp_path / "dogs"
    given.mkdir()
    Image.new("RGB", (16, 16), "red").save(given / "mine.png")
    draw = artist(base, tmp_path / "cache")
    assert draw("a dog", 3, folder=given, **SHORT) == given
    assert len(pictures(given)) == 3 and not (tmp_path / "cache").exists()
    assert draw("a dog", 3, folder=given, **SHORT) == given and len(pictures(given)) == 3
    with pytest.raises(DataError, match=r"2 class pictures that were drawn for another .*'a cat'.*drawn-"):
        draw("a cat", 3, folder=given, **SHORT)


def test_a_size_that_the_base_can_not_draw_is_refused(base: BaseModel, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="multiples"):
        artist(base, tmp_path)("a dog", 1, side=17, **SHORT)
