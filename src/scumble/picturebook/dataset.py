"""Small training sets, written as ordinary image folders: PNG files and `metadata.jsonl`."""

from __future__ import annotations

import json
import random
from pathlib import Path

from PIL import Image

from scumble.errors import DataError, UnknownName
from scumble.picturebook.captions import caption
from scumble.picturebook.creatures import CREATURES, creature_caption, draw_creature
from scumble.picturebook.draw import draw
from scumble.picturebook.scenes import (
    BACKGROUNDS,
    COLORS,
    POSITIONS,
    SEED_LIMIT,
    SIZES,
    SUBJECTS,
    Scene,
    Thing,
    held_out,
    random_scene,
)
from scumble.picturebook.styles import STYLES

STYLE_NAMES: tuple[str, ...] = tuple(STYLES)
CREATURE_NAMES: tuple[str, ...] = tuple(CREATURES)

STYLE_COUNT = 40
CREATURE_COUNT = 5
METADATA = "metadata.jsonl"
#: One scene in this many of a style's pictures holds two things.
_PAIR_EVERY = 8


class _Deck:
    """Words dealt so that all of them come before any comes again."""

    def __init__(self, words: tuple[str, ...], rng: random.Random) -> None:
        self._words, self._rng = words, rng
        self._left: list[str] = []

    def deal(self) -> str:
        if not self._left:
            self._left = list(self._words)
            self._rng.shuffle(self._left)
        return self._left.pop()


def style_scenes(count: int, rng: random.Random) -> list[Scene]:
    """`count` scenes for a style: all subjects, colours and backgrounds in turn, no held-out combination.

    Mostly one thing; every eighth scene has two.
    """
    subjects, colors, backgrounds = _Deck(SUBJECTS, rng), _Deck(COLORS, rng), _Deck(BACKGROUNDS, rng)
    positions, sizes = _Deck(POSITIONS, rng), _Deck(SIZES, rng)
    scenes = []
    for index in range(count):
        if index % _PAIR_EVERY == _PAIR_EVERY - 1:
            scenes.append(random_scene(rng, things=2))
            continue
        subject, color, background = subjects.deal(), colors.deal(), backgrounds.deal()
        while held_out(subject, color, background):
            color = rng.choice(COLORS)
        thing = Thing(subject, color, positions.deal(), sizes.deal())
        scenes.append(Scene((thing,), background, rng.randrange(SEED_LIMIT)))
    return scenes


def _style_pictures(style: str, count: int, size: int, rng: random.Random) -> list[tuple[Image.Image, str]]:
    return [(draw(scene, size, style), caption(scene, style=style)) for scene in style_scenes(count, rng)]


def _creature_pictures(name: str, count: int, size: int, rng: random.Random) -> list[tuple[Image.Image, str]]:
    backgrounds, positions, sizes = _Deck(BACKGROUNDS, rng), _Deck(POSITIONS, rng), _Deck(SIZES[1:], rng)
    pictures = []
    for _ in range(count):
        background, position, size_word = backgrounds.deal(), positions.deal(), sizes.deal()
        image = draw_creature(name, background, position, size_word, rng.randrange(SEED_LIMIT), size)
        pictures.append((image, creature_caption(name, background, position, size_word)))
    return pictures


def write_dataset(
    name: str, folder: Path, *, count: int | None = None, resolution: int = 64, seed: int = 0
) -> list[Path]:
    """Writes the training set of a style or a creature, and returns the pictures' paths.

    count: how many pictures (None: 40 for a style, 5 for a creature); resolution: their side in pixels. The
    same arguments give the same bytes. A folder that an earlier call has written is written again; pictures
    of a longer earlier set are removed.

    Raises UnknownName for an unknown name, DataError where the folder holds files of another origin, and
    ValueError for a count below 1 or a resolution that cannot be drawn.
    """
    if name not in STYLE_NAMES and name not in CREATURE_NAMES:
        raise UnknownName("data set", name, (*STYLE_NAMES, *CREATURE_NAMES))
    if count is not None and count < 1:
        raise ValueError(f"a data set needs at least one picture, got count={count}")
    _refuse_foreign_files(name, folder)
    rng = random.Random(seed)
    if name in STYLE_NAMES:
        pictures = _style_pictures(name, STYLE_COUNT if count is None else count, resolution, rng)
    else:
        pictures = _creature_pictures(name, CREATURE_COUNT if count is None else count, resolution, rng)
    folder.mkdir(parents=True, exist_ok=True)
    for earlier in folder.iterdir():
        earlier.unlink()
    paths, lines = [], []
    for index, (image, text) in enumerate(pictures):
        path = folder / f"{name}_{index:03d}.png"
        image.save(path)
        paths.append(path)
        lines.append(json.dumps({"file_name": path.name, "text": text}))
    (folder / METADATA).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return paths


def _refuse_foreign_files(name: str, folder: Path) -> None:
    """Only an absent, an empty or an own folder may be written: nobody's pictures are lost."""
    if not folder.exists():
        return
    if not folder.is_dir():
        problem = "it is not a folder"
    else:
        foreign = sorted(
            path.name
            for path in folder.iterdir()
            if path.name != METADATA and not (path.suffix == ".png" and path.name.startswith(f"{name}_"))
        )
        if not foreign:
            return
        problem = f"it holds other files: {', '.join(foreign[:5])}{' ...' if len(foreign) > 5 else ''}"
    raise DataError(f"cannot write the data set {name!r} to {folder}: {problem}; name an empty or new folder")
