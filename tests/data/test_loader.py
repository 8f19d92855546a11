from __future__ import annotations

import shutil
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from scumble.data.cache import Cache
from scumble.data.images import cut, to_tensor
from scumble.data.loader import Loader, still_batches
from scumble.data.record import Batch
from scumble.data.sources import open_dataset
from scumble.errors import DataError, ModelError
from tests.data.fakes import FakeBase, embedding, folder, settings, shade

SIZES = ((32, 32), (32, 48), (48, 32), (40, 72), (33, 32), (64, 64))
EVERYTHING: dict[str, Any] = {
    "center_crop": False,
    "random_flip": True,
    "shuffle_tags": True,
    "keep_tags": 1,
    "caption_dropout": 0.2,
    "templates": ("a photo of {caption}", "{caption}"),
    "crop_variants": 3,
}


def loader(
    root: Path, base: FakeBase | None = None, *, options: dict[str, Any] | None = None, **changes: Any
) -> Loader:
    dataset = open_dataset(settings(root))
    given = {"batch_size": 3, "seed": 5, **(options or {})}
    return Loader(dataset, base or FakeBase(), settings(root, **changes), **given)


def some(batches: Loader, count: int = 20, **start: int) -> list[Batch]:
    first = start.pop("number", 0)
    return list(islice(batches.start(first, **start), count))


def equal(one: Batch, other: Batch) -> bool:
    assert one.conditioning is not None and other.conditioning is not None
    return (
        torch.equal(one.latents, other.latents)
        and torch.equal(one.conditioning.tokens, other.conditioning.tokens)
        and all(
            torch.equal(getattr(one.frame, n), getattr(other.frame, n))
            for n in ("original", "corner", "target")
        )
        and (one.captions, one.keys, one.positions) == (other.captions, other.keys, other.positions)
        and torch.equal(one.weight, other.weight)
    )


def check_pairs(batch: Batch) -> None:
    """Each row's latents, caption and embedding belong to the picture that it names."""
    assert batch.conditioning is not None
    for row, key in enumerate(batch.keys):
        index = int(Path(key).stem)
        reds = (batch.latents[row, 0] + 1) * 127.5
        assert (reds - shade(index)).abs().max() < 0.01, (key, reds)
        caption = batch.captions[row]
        assert caption == "" or f"picture {index}" in caption
        assert torch.equal(batch.conditioning.tokens[row], embedding(caption))


@pytest.mark.parametrize("changes", [{}, {"buckets": True}, EVERYTHING, {**EVERYTHING, "buckets": True}])
@pytest.mark.parametrize("workers", [0, 4])
def test_each_caption_stays_with_its_picture(tmp_path: Path, changes: dict[str, Any], workers: int) -> None:
    batches = loader(folder(tmp_path, SIZES), workers=workers, **changes)
    batches.prepare()
    seen = [batch for process in (0, 1) for batch in some(batches, 30, process=process, processes=2)]
    for batch in seen:
        check_pairs(batch)
        assert len(batch) == 3 and batch.latents.dtype == torch.float32
        assert (batch.frame.target // 8).tolist() == [list(batch.latents.shape[2:])] * 3
    assert {key for batch in seen for key in batch.keys} == {f"{index}.png" for index in range(6)}
    if changes is EVERYTHING:
        captions = {caption for batch in seen for caption in batch.captions}
        assert (
            "" in captions
            and any(c.startswith("a photo of picture") for c in captions)
            and len(captions) > 20
        )


def test_latents_are_of_the_cut_that_the_frame_tells(tmp_path: Path) -> None:
    root = tmp_path
    ramp = np.zeros((32, 96, 3), np.uint8)
    ramp[..., 0] = np.arange(96)[None] * 2
    Image.fromarray(ramp).save(root / "0.png")
    (root / "0.txt").write_text("picture 0")
    batches = loader(root, center_crop=False, random_flip=True, crop_variants=6)
    corners = set()
    for batch in some(batches, 20):
        for row in range(3):
            left = batch.frame.corner[row, 1].item()
            across = batch.latents[row, 0, 0]
            flipped = bool(across[0] > across[-1])
            start = 64 - left if flipped else left
            columns = torch.arange(start, start + 32).float() * 2 / 127.5 - 1
            expected = (columns.flip(0) if flipped else columns).view(4, 8).mean(1)
            assert torch.allclose(across, expected, atol=1e-5)
            corners.add((start, flipped))
    assert len({start for start, _ in corners}) == 6 and len(corners) > 8


def test_threads_and_preparation_change_nothing(tmp_path: Path) -> None:
    root = folder(tmp_path, SIZES)
    lazy = loader(root, workers=0, **EVERYTHING)
    eager = loader(root, workers=4, **EVERYTHING)
    eager.prepare()
    assert all(equal(one, other) for one, other in zip(some(lazy), some(eager), strict=True))


def test_after_preparation_no_encoder_is_needed(tmp_path: Path) -> None:
    base = FakeBase()
    batches = loader(folder(tmp_path, SIZES), base, **EVERYTHING)
    told: list[tuple[int, int, str]] = []
    batches.prepare(progress=lambda *step: told.append(step))
    encoded, spoken = len(base.images), len(base.prompts)
    assert spoken == len(set(base.prompts)), "a caption is encoded once"
    assert [step for step in told if step[2] == "pictures"] == [
        (n, encoded, "pictures") for n in range(1, encoded + 1)
    ]
    assert told[-1] == (spoken, spoken, "captions")
    some(batches, 60)
    assert (len(base.images), len(base.prompts)) == (encoded, spoken)
    assert not batches.needs_image_encoder and not batches.needs_text_encoder
    assert encoded == 2 * (1 + 3 + 3 + 3 + 2 + 1), (
        "one place, three of many, or two places; plain and mirrored"
    )


def test_only_what_a_run_shows_is_prepared(tmp_path: Path) -> None:
    base = FakeBase()
    batches = loader(folder(tmp_path, SIZES), base, **EVERYTHING)
    batches.prepare(first=3, visits=7)
    encoded, spoken = len(base.images), len(base.prompts)
    assert 0 < encoded <= 9 and 0 < spoken <= 9
    some(batches, 3, number=1)
    assert (len(base.images), len(base.prompts)) == (encoded, spoken)
    some(batches, 20)
    assert len(base.images) > encoded


def test_a_warm_cache_gives_the_bits_of_a_cold_one(tmp_path: Path) -> None:
    root, where = folder(tmp_path / "data", SIZES), str(tmp_path / "cache")
    cold = some(loader(root, cache=where, **EVERYTHING))
    base = FakeBase()
    warm = some(loader(root, base, cache=where, **EVERYTHING))
    assert all(equal(one, other) for one, other in zip(cold, warm, strict=True))
    assert base.images == [] and base.prompts == []


def test_one_changed_byte_rebuilds_one_picture(tmp_path: Path) -> None:
    root, where = folder(tmp_path / "data"), str(tmp_path / "cache")
    before = loader(root, cache=where, random_flip=True)
    before.prepare()
    with (root / "2.png").open("ab") as file:
        file.write(b"\n")
    base = FakeBase()
    after = loader(root, base, cache=where, random_flip=True)
    after.prepare()
    assert len(base.images) == 2 and base.prompts == []
    assert {round((pixels[0].max().item() + 1) * 127.5) for pixels in base.images} == {shade(2)}
    assert after.fingerprint != before.fingerprint


def test_one_changed_caption_encodes_one_caption(tmp_path: Path) -> None:
    root, where = folder(tmp_path / "data"), str(tmp_path / "cache")
    loader(root, cache=where).prepare()
    (root / "2.txt").write_text("picture 2 anew")
    base = FakeBase()
    loader(root, base, cache=where).prepare()
    assert base.images == [] and base.prompts == ["picture 2 anew"]


def test_another_encoder_or_size_is_never_served_from_the_cache(tmp_path: Path) -> None:
    root, where = folder(tmp_path / "data"), str(tmp_path / "cache")
    loader(root, cache=where).prepare()
    other = FakeBase()
    with torch.no_grad():
        other.vae.weight.fill_(0.5)
    batches = loader(root, other, cache=where)
    batches.prepare()
    assert len(other.images) == 6 and other.prompts == []
    assert batches.batch(0).latents.min() > -0.51
    smooth = FakeBase()
    loader(root, smooth, cache=where, resolution=24, interpolation="bilinear").prepare()
    loader(root, smooth, cache=where, resolution=24, interpolation="box").prepare()
    assert len(smooth.images) == 12
    larger = FakeBase()
    loader(root, larger, cache=where, resolution=64).prepare()
    assert len(larger.images) == 6 and larger.images[0].shape == (3, 64, 64)


def test_a_moved_dataset_is_the_same(tmp_path: Path) -> None:
    root = folder(tmp_path / "data")
    one = loader(root, cache=str(tmp_path / "cache"))
    one.prepare()
    shutil.move(root, tmp_path / "elsewhere")
    base = FakeBase()
    other = loader(tmp_path / "elsewhere", base, cache=str(tmp_path / "cache"))
    other.prepare()
    assert other.fingerprint == one.fingerprint and base.images == []


def test_the_fingerprint_follows_what_is_shown(tmp_path: Path) -> None:
    root = folder(tmp_path / "data")
    plain = loader(root).fingerprint
    for changes in (
        {"resolution": 64},
        {"random_flip": True},
        {"caption_dropout": 0.1},
        {"templates": ("a {caption}",)},
        {"center_crop": False},
    ):
        assert loader(root, **changes).fingerprint != plain, changes
    for changes in ({"workers": 0}, {"cache": str(tmp_path / "c")}, {"resolution": 32}):
        assert loader(root, **changes).fingerprint == plain, changes
    assert loader(root, options={"batch_size": 5}).fingerprint == plain
    assert loader(root, options={"weights": [1, 1, 1, 1, 1, 0.5]}).fingerprint != plain
    (root / "3.txt").write_text("other words")
    assert loader(root).fingerprint != plain


def test_a_damaged_cache_file_is_made_again_and_told(tmp_path: Path) -> None:
    root, where = folder(tmp_path / "data"), tmp_path / "cache"
    whole = some(loader(root, cache=str(where)), 4)
    for file in where.rglob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:-5])
    again = loader(root, cache=str(where))
    assert all(equal(one, other) for one, other in zip(whole, some(again, 4), strict=True))
    assert len(again.cache.notes) == 12 and "is damaged" in again.cache.notes[0]


def test_latents_that_are_not_finite_name_the_picture(tmp_path: Path) -> None:
    root = folder(tmp_path / "data")
    base = FakeBase()
    healthy = loader(root, base)
    with Image.open(root / "4.png") as picture:
        base.poison = base.encode_images(to_tensor(picture)[None], None)[0]
    with pytest.raises(
        DataError, match=r"4\.png: the base's encoder gave 48 of 48 numbers that are not finite"
    ):
        healthy.prepare()

    def overflows(pixels: torch.Tensor, rng: object) -> torch.Tensor:
        raise ModelError("The VAE can't encode rows [0] of this batch")

    base.encode_images = overflows  # type: ignore[method-assign]
    with pytest.raises(DataError, match=r"\d.png: The VAE can't encode rows"):
        loader(root, base, workers=0).prepare()


def test_unbounded_crops_are_cut_anew_and_never_cached(tmp_path: Path) -> None:
    root, where = folder(tmp_path / "data", ((32, 200), (32, 32))), tmp_path / "cache"
    base = FakeBase()
    batches = loader(root, base, center_crop=False, crop_variants=0, cache=str(where))
    assert batches.needs_image_encoder and not batches.needs_text_encoder
    batches.prepare()
    assert len(base.images) == 1, "the square picture has one cut"
    seen = some(batches, 20)
    corners = {tuple(corner) for batch in seen for corner in batch.frame.corner.tolist()}
    assert len(corners) > 15 and len(list(where.rglob("*.safetensors"))) == 3
    assert all(equal(one, other) for one, other in zip(seen, some(batches, 20), strict=True))
    square = loader(folder(tmp_path / "square"), center_crop=False, crop_variants=0)
    assert not square.needs_image_encoder


def test_unbounded_tag_orders_are_encoded_anew(tmp_path: Path) -> None:
    root, where = folder(tmp_path / "data"), tmp_path / "cache"
    base = FakeBase()
    batches = loader(root, base, shuffle_tags=True, tag_variants=0, cache=str(where))
    assert batches.needs_text_encoder
    batches.prepare()
    batches.prepare(visits=9)
    assert base.prompts == [] and len(base.images) == 6
    for batch in some(batches, 10):
        check_pairs(batch)
    assert len(set(base.prompts)) > 20 and len(list(where.rglob("*.safetensors"))) == 6


def test_a_text_encoder_that_trains_gets_captions(tmp_path: Path) -> None:
    base = FakeBase()
    batches = loader(folder(tmp_path), base, options={"text_embeddings": False})
    batches.prepare()
    (batch,) = some(batches, 1)
    assert batch.conditioning is None and len(batch.captions) == 3 and base.prompts == []
    assert batches.needs_text_encoder


def test_a_repeated_picture_is_seen_more_often(tmp_path: Path) -> None:
    root = folder(tmp_path)
    dataset = open_dataset(settings(root))
    records = (replace(dataset.records[0], repeats=4), *dataset.records[1:])
    batches = Loader(replace(dataset, records=records), FakeBase(), settings(root), batch_size=3, seed=1)
    assert batches.samples == 9
    keys = [key for batch in some(batches, 6) for key in batch.keys]
    assert keys.count("0.png") == 8 and all(keys.count(f"{index}.png") == 2 for index in range(1, 6))


def test_weights_stay_with_their_pictures(tmp_path: Path) -> None:
    weights = [0.5, 1, 1, 2, 1, 0]
    batches = loader(folder(tmp_path), options={"weights": weights})
    for batch in some(batches, 6):
        assert batch.weight.tolist() == [weights[int(key[0])] for key in batch.keys]
        assert batch.weight.dtype == torch.float32
    with pytest.raises(DataError, match="2 weights were given for 6 pictures"):
        loader(tmp_path, options={"weights": [1, 2]})


def test_all_bad_pictures_are_told_at_once(tmp_path: Path) -> None:
    root = folder(tmp_path)
    (root / "1.png").write_bytes(b"")
    (root / "4.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"2 problems") as caught:
        loader(root)
    assert "1.png: is no picture" in str(caught.value) and "4.png: is no picture" in str(caught.value)


def test_small_pictures_are_enlarged_unless_refused(tmp_path: Path) -> None:
    root = folder(tmp_path, ((32, 32), (16, 16), (32, 24)))
    assert loader(root).batch(0).latents.shape == (3, 3, 4, 4)
    with pytest.raises(
        DataError, match=r"2 problems.*\n  1.png: is 16x16 .* enlarged 2.00x.*\n  2.png: is 24x32"
    ):
        loader(root, allow_upscale=False)


@pytest.mark.parametrize("size", [(32, 32), (40, 50)])
def test_a_picture_swapped_under_the_run_is_noticed(tmp_path: Path, size: tuple[int, int]) -> None:
    root = folder(tmp_path)
    batches = loader(root)
    Image.new("RGB", size).save(root / "2.png")
    with pytest.raises(DataError, match=r"2\.png changed since it was first read"):
        batches.prepare()


def test_each_picture_once(tmp_path: Path) -> None:
    root = folder(tmp_path, SIZES)
    batches = list(loader(root, buckets=True).once(2))
    keys = [key for batch in batches for key in batch.keys]
    assert sorted(keys) == [f"{index}.png" for index in range(6)]
    assert [position for batch in batches for position in batch.positions] == [int(key[0]) for key in keys]
    for batch in batches:
        check_pairs(batch)


def test_held_out_pictures_are_shown_without_chance(tmp_path: Path) -> None:
    root = folder(tmp_path, SIZES)
    cache = Cache()
    chancy = settings(root, **EVERYTHING)
    dataset = open_dataset(chancy)
    dataset = replace(
        dataset, records=tuple(replace(r, captions=(*r.captions, "other")) for r in dataset.records)
    )
    base = FakeBase()
    batches = still_batches(dataset, base, chancy, batch_size=4, cache=cache)
    assert [len(batch) for batch in batches] == [4, 2]
    for batch in batches:
        check_pairs(batch)
        assert batch.captions == tuple(f"a photo of picture {key[0]}, red, small, old" for key in batch.keys)
    again = still_batches(dataset, FakeBase(), chancy, batch_size=4, cache=cache)
    assert all(equal(one, other) for one, other in zip(batches, again, strict=True))
    assert len(base.images) == 6


def test_an_empty_dataset_is_refused(tmp_path: Path) -> None:
    dataset = open_dataset(settings(folder(tmp_path))).only(())
    with pytest.raises(DataError, match="there is no picture to train on"):
        Loader(dataset, FakeBase(), settings(tmp_path), batch_size=1, seed=0)


def test_what_a_visit_shows_is_said_without_opening_it(tmp_path: Path) -> None:
    from scumble.data.order import Visit

    root = folder(tmp_path, SIZES)
    batches = loader(root, **EVERYTHING)
    visit = Visit(11, 3)
    sample = batches.sample(visit)
    assert (sample.record, sample.position, sample.key) == (3, 11, "3.png")
    assert sample.variant == batches.geometry(visit).variant
    with Image.open(root / "3.png") as picture:
        assert cut(picture, batches.geometry(visit)).size == (32, 32)
