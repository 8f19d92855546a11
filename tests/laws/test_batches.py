"""The laws of `Batches` (see `data.record`): a function of (seed, number), the same however the work is
divided."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from scumble.data.loader import Loader
from scumble.data.record import Batch, Batches
from scumble.data.settings import DataSettings
from scumble.data.sources import open_dataset
from scumble.models import FAMILIES
from scumble.models.family import BaseModel

SQUARE = ((32, 32),) * 7
MIXED = ((32, 32), (32, 48), (48, 32), (20, 52), (32, 32), (52, 20), (32, 40))
CHANCE: dict[str, Any] = {
    "center_crop": False,
    "random_flip": True,
    "shuffle_tags": True,
    "caption_dropout": 0.2,
    "templates": ("{caption}", "so: {caption}"),
}
CASES = {
    "one size": (SQUARE, {}),
    "one size, by chance": (SQUARE, CHANCE),
    "crops": (MIXED, CHANCE),
    "several sizes": (MIXED, {"buckets": True}),
    "several sizes, by chance": (MIXED, {"buckets": True, **CHANCE}),
    "unbounded": (MIXED, {**CHANCE, "crop_variants": 0, "tag_variants": 0}),
}


@pytest.fixture(scope="module")
def base() -> BaseModel:
    return FAMILIES.get("sd1").tiny()


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest, tmp_path: Path) -> DataSettings:
    """Settings of a folder of seven pictures with captions."""
    sizes, changes = CASES[request.param]
    rng = np.random.default_rng(0)
    for index, (height, width) in enumerate(sizes):
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(
            tmp_path / f"{index}.png"
        )
        (tmp_path / f"{index}.txt").write_text(f"picture {index}, red, old, shy")
    return DataSettings(images=tmp_path, resolution=32, workers=0, **changes)  # type: ignore[arg-type]


def loader(settings: DataSettings, base: BaseModel, batch_size: int, seed: int = 11) -> Loader:
    return Loader(open_dataset(settings), base, settings, batch_size=batch_size, seed=seed)


def rows(batches: list[Batch]) -> list[tuple[Any, ...]]:
    """Every sample as plain values, bit for bit."""
    return [
        (
            batch.positions[row],
            batch.keys[row],
            batch.captions[row],
            batch.latents[row].numpy().tobytes(),
            batch.conditioning.tokens[row].numpy().tobytes() if batch.conditioning is not None else None,
            batch.frame.corner[row].tolist(),
            batch.frame.original[row].tolist(),
            batch.frame.target[row].tolist(),
            batch.weight[row].item(),
        )
        for batch in batches
        for row in range(len(batch))
    ]


def take(batches: Batches, count: int, number: int = 0, **where: int) -> list[Batch]:
    return list(islice(batches.start(number, **where), count))


def divided(batches: Batches, count: int, processes: int) -> list[Batch]:
    """The first `count` micro-batches of the run, each from the process that it belongs to."""
    each = [batches.start(0, process=process, processes=processes) for process in range(processes)]
    return [next(each[number % processes]) for number in range(count)]


def test_starting_later_is_skipping(case: DataSettings, base: BaseModel) -> None:
    batches = loader(case, base, 2)
    whole = rows(take(batches, 12))
    for number in (1, 5):
        assert rows(take(loader(case, base, 2), 12 - number, number)) == whole[2 * number :]
    theirs = rows(take(batches, 6, process=1, processes=2))
    assert rows(take(batches, 4, 2, process=1, processes=2)) == theirs[4:]


def test_processes_share_one_order(case: DataSettings, base: BaseModel) -> None:
    alone = rows(take(loader(case, base, 2), 12))
    for processes in (2, 3):
        assert rows(divided(loader(case, base, 2), 12, processes)) == alone
    assert [row[0] for row in alone] == list(range(24))


def test_one_size_does_not_depend_on_how_a_step_is_divided(case: DataSettings, base: BaseModel) -> None:
    one = rows(take(loader(case, base, 8), 3))
    two = rows(divided(loader(case, base, 4), 6, 2))  # 2 processes x 4
    four = rows(divided(loader(case, base, 2), 12, 2))  # 2 processes x 2 with 2 accumulations
    if case.buckets:
        assert [row[0] for row in one] == [row[0] for row in two] == [row[0] for row in four]
    else:
        assert one == two == four


def test_every_batch_has_one_size_and_its_own_positions(case: DataSettings, base: BaseModel) -> None:
    batches = loader(case, base, 3)
    sizes = set()
    for number, batch in enumerate(take(batches, 14)):
        assert len(batch) == batches.batch_size == 3
        assert batch.positions == tuple(range(3 * number, 3 * number + 3))
        height, width = (batch.frame.target[0] // base.latent_factor).tolist()
        assert batch.latents.shape == (3, base.latent_channels, height, width)
        assert (batch.frame.target == batch.frame.target[0]).all()
        assert batch.latents.dtype == torch.float32 and not batch.latents.requires_grad
        assert batch.conditioning is not None and len(batch.conditioning) == 3
        assert batch.weight.shape == (3,)
        sizes.add((height, width))
    assert (len(sizes) > 1) == case.buckets


def test_another_seed_is_another_order(case: DataSettings, base: BaseModel) -> None:
    first, second = (rows(take(loader(case, base, 2, seed), 10)) for seed in (1, 2))
    assert first != second
    assert loader(case, base, 2, 1).fingerprint == loader(case, base, 4, 2).fingerprint


def test_each_row_is_what_the_base_makes_of_its_picture_and_words(
    case: DataSettings, base: BaseModel
) -> None:
    from scumble.data.images import cut, open_upright, to_tensor
    from scumble.data.order import Visit

    batches = loader(case, base, 2)
    records = {record.key: (index, record) for index, record in enumerate(batches.dataset.records)}
    for batch in take(batches, 8, 3):
        for row, key in enumerate(batch.keys):
            index, record = records[key]
            geometry = batches.geometry(Visit(batch.positions[row], index))
            pixels = to_tensor(cut(open_upright(record), geometry))[None]
            assert torch.equal(batch.latents[row], base.encode_images(pixels, None)[0])
            caption = batch.captions[row]
            assert caption == "" or f"picture {index}" in caption
            assert batch.conditioning is not None
            assert torch.equal(batch.conditioning.tokens[row], base.encode_prompts([caption]).tokens[0])
