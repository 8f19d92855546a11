from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from PIL import Image

from scumble.data.images import open_upright
from scumble.data.sources import open_dataset
from scumble.data.split import split
from scumble.errors import DataError
from tests.data.fakes import noise, settings


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for index in range(10):
        noise(24, 24, index).save(tmp_path / f"{index}.png")
    return tmp_path


def keys(part) -> list[str]:  # type: ignore[no-untyped-def]
    return [record.key for record in part.records]


@pytest.mark.parametrize(("held_out", "count"), [(0, 0), (0.2, 2), (3, 3), (0.01, 1), (9, 9)])
def test_counts_and_fractions(root: Path, held_out: float, count: int) -> None:
    dataset = open_dataset(settings(root, caption="x"))
    parts = split(dataset, held_out, seed=5)
    assert len(parts.held_out) == count and len(parts.train) == 10 - count
    assert sorted(keys(parts.train) + keys(parts.held_out)) == keys(dataset)
    assert parts.notes == ()


def test_the_choice_is_of_the_seed_and_the_content(root: Path) -> None:
    dataset = open_dataset(settings(root, caption="x"))
    first = keys(split(dataset, 3, seed=5).held_out)
    assert first == keys(split(dataset, 3, seed=5, workers=0).held_out)
    assert len({tuple(keys(split(dataset, 3, seed=seed).held_out)) for seed in range(6)}) > 3
    for index in range(10):
        (root / f"{index}.png").rename(root / f"z{9 - index}.png")
    renamed = keys(split(open_dataset(settings(root, caption="x")), 3, seed=5).held_out)
    assert sorted(f"{9 - int(name[1])}.png" for name in renamed) == sorted(first)


def test_equal_files_stay_together(root: Path) -> None:
    for copy in range(10, 14):
        shutil.copy(root / "4.png", root / f"{copy}.png")
    same = {"4.png", *(f"{copy}.png" for copy in range(10, 14))}
    sides = set()
    for seed in range(12):
        parts = split(open_dataset(settings(root, caption="x")), 6, seed=seed)
        inside = same & set(keys(parts.held_out))
        assert inside in (set(), same)
        sides.add(bool(inside))
    assert sides == {True, False}


def test_near_duplicates_on_both_sides_are_told(root: Path) -> None:
    with Image.open(root / "0.png") as picture:
        picture.resize((40, 40)).save(root / "again.jpg", quality=90)
    told = []
    for seed in range(8):
        parts = split(open_dataset(settings(root, caption="x")), 4, seed=seed)
        apart = ("0.png" in keys(parts.held_out)) != ("again.jpg" in keys(parts.held_out))
        assert bool(parts.notes) == apart
        told += parts.notes
    assert "0.png and again.jpg look alike; one is held out, one is trained on." in told


def test_nothing_left_is_refused(root: Path) -> None:
    dataset = open_dataset(settings(root, caption="x"))
    with pytest.raises(DataError, match=r"held_out = 10 of 10 pictures .* leaves nothing on one side"):
        split(dataset, 10, seed=0)
    for index in range(1, 10):
        (root / f"{index}.png").write_bytes((root / "0.png").read_bytes())
    with pytest.raises(DataError, match=r"\(1 different ones\)"):
        split(open_dataset(settings(root, caption="x")), 2, seed=0)


def test_records_still_open_after_the_split(root: Path) -> None:
    parts = split(open_dataset(settings(root, caption="x")), 2, seed=0)
    for record in parts.held_out.records:
        assert open_upright(record).tobytes() == noise(24, 24, int(record.key[0])).tobytes()
