"""Data sets: ordinary image folders, deterministic, and never written over somebody's files."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from scumble.errors import DataError, UnknownName
from scumble.picturebook.creatures import CREATURES, creature_caption, draw_creature
from scumble.picturebook.dataset import (
    CREATURE_NAMES,
    METADATA,
    STYLE_NAMES,
    style_scenes,
    write_dataset,
)
from scumble.picturebook.scenes import BACKGROUNDS, COLORS, SUBJECTS, held_out


def _records(folder: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (folder / METADATA).read_text(encoding="utf-8").splitlines()]


def test_there_are_enough_styles_and_creatures() -> None:
    assert len(STYLE_NAMES) >= 4
    assert len(CREATURE_NAMES) >= 5
    assert not set(STYLE_NAMES) & set(CREATURE_NAMES)


@pytest.mark.parametrize(("name", "count"), [("woodcut", 40), ("zorbik", 5)])
def test_a_data_set_is_an_image_folder(name: str, count: int, tmp_path: Path) -> None:
    folder = tmp_path / "deep" / name
    paths = write_dataset(name, folder)
    assert len(paths) == count
    assert sorted(folder.iterdir()) == sorted([*paths, folder / METADATA])
    records = _records(folder)
    assert [record["file_name"] for record in records] == [path.name for path in paths]
    assert all(set(record) == {"file_name", "text"} and name in record["text"] for record in records)
    for path in paths:
        with Image.open(path) as image:
            assert (image.format, image.mode, image.size) == ("PNG", "RGB", (64, 64))
    assert len({path.read_bytes() for path in paths}) == count


def test_style_captions_end_in_the_style(tmp_path: Path) -> None:
    write_dataset("neon", tmp_path, count=3)
    assert all(record["text"].endswith(", in neon style") for record in _records(tmp_path))


def test_a_styles_scenes_cover_the_vocabulary_without_held_out_combinations() -> None:
    for seed in range(5):
        scenes = style_scenes(40, random.Random(seed))
        things = [(thing, scene.background) for scene in scenes for thing in scene.things]
        assert {thing.subject for thing, _ in things} == set(SUBJECTS)
        assert {thing.color for thing, _ in things} == set(COLORS)
        assert {background for _, background in things} == set(BACKGROUNDS)
        assert not any(held_out(thing.subject, thing.color, background) for thing, background in things)
        assert 30 <= sum(len(scene.things) == 1 for scene in scenes) < 40


def test_equal_arguments_give_equal_bytes_and_other_seeds_do_not(tmp_path: Path) -> None:
    def written(folder: str, seed: int) -> list[bytes]:
        paths = write_dataset("mosaic", tmp_path / folder, count=4, resolution=48, seed=seed)
        return [path.read_bytes() for path in [*paths, tmp_path / folder / METADATA]]

    assert written("first", 1) == written("second", 1)
    assert written("third", 2) != written("first", 1)


def test_resolution_and_count_are_followed(tmp_path: Path) -> None:
    paths = write_dataset("plimmo", tmp_path, count=7, resolution=96)
    assert len(paths) == 7
    with Image.open(paths[0]) as image:
        assert image.size == (96, 96)
    with pytest.raises(ValueError, match="count=0"):
        write_dataset("plimmo", tmp_path, count=0)


def test_an_own_folder_is_written_again_without_remains(tmp_path: Path) -> None:
    write_dataset("vumbra", tmp_path, count=6)
    paths = write_dataset("vumbra", tmp_path, count=2)
    assert sorted(tmp_path.iterdir()) == sorted([*paths, tmp_path / METADATA])


def test_a_folder_with_other_files_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "holiday.png").write_bytes(b"precious")
    with pytest.raises(DataError, match=r"holiday\.png"):
        write_dataset("neon", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["holiday.png"]
    with pytest.raises(DataError, match="not a folder"):
        write_dataset("neon", tmp_path / "holiday.png")


def test_an_unknown_name_is_refused_and_the_known_ones_are_listed(tmp_path: Path) -> None:
    with pytest.raises(UnknownName) as caught:
        write_dataset("cubism", tmp_path)
    message = str(caught.value)
    assert all(name in message for name in (*STYLE_NAMES, *CREATURE_NAMES, "cubism"))
    with pytest.raises(UnknownName, match="zorbik"):
        draw_creature("fox", "snow")


@pytest.mark.parametrize("name", CREATURE_NAMES)
def test_a_creature_is_the_same_individual_in_varied_pictures(name: str) -> None:
    creature = CREATURES[name]
    pictures = [
        np.asarray(draw_creature(name, background, "center", "big", seed, 96), dtype=np.int64)
        for seed, background in enumerate(("snow", "sea", "desert"))
    ]
    for color in (creature.body, creature.second, creature.third):
        # Its own colours are in every picture, some of them lit or shaded a little.
        for picture in pictures:
            near = np.abs(picture - np.array(color)).sum(axis=2) < 75
            assert near.sum() > 12, (name, color)
    first = draw_creature(name, "snow", "center", "big", 1)
    assert first.tobytes() == draw_creature(name, "snow", "center", "big", 1).tobytes()
    assert first.tobytes() != draw_creature(name, "snow", "center", "big", 2).tobytes()


def test_creature_captions_use_the_name_and_the_words_of_scenes() -> None:
    assert creature_caption("zorbik", "snow", "left") == "a zorbik creature on the left, in a snowy field"
    assert creature_caption("kettrix", "beach", size_word="big") == "a big kettrix robot on a sandy beach"


def test_wrong_words_for_a_creature_are_refused() -> None:
    with pytest.raises(ValueError, match="background 'moon'"):
        draw_creature("zorbik", "moon")
    with pytest.raises(ValueError, match="position 'up'"):
        draw_creature("zorbik", "snow", "up")
    with pytest.raises(ValueError, match="negative"):
        draw_creature("zorbik", "snow", seed=-1)
