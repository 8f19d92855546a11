from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scumble.data.buckets import choose, kept, shapes, target_shapes
from scumble.data.images import center
from scumble.data.settings import DataSettings
from scumble.errors import DataError


@pytest.mark.parametrize(
    ("resolution", "step"), [(512, 64), (512, 8), (64, 8), (64, 64), (768, 64), (1024, 32)]
)
def test_shapes_are_multiples_of_about_the_area(resolution: int, step: int) -> None:
    found = shapes(resolution, step)
    assert (resolution, resolution) in found and len(set(found)) == len(found)
    for height, width in found:
        assert height % step == 0 and width % step == 0
        assert resolution / 2 <= min(height, width) and max(height, width) <= 2 * resolution
        assert height * width <= resolution**2 < max(height, width) * (min(height, width) + step)
        assert (width, height) in found


def loss(size: tuple[int, int], shape: tuple[int, int]) -> float:
    """Cropped part of the area, from first principles: resize to cover, then cut."""
    scale = max(shape[0] / size[0], shape[1] / size[1])
    return 1 - shape[0] * shape[1] / (size[0] * scale * size[1] * scale)


@settings(deadline=None)
@given(st.integers(16, 6000), st.integers(16, 6000), st.sampled_from([(512, 64), (64, 8)]))
def test_the_chosen_bucket_crops_least(height: int, width: int, kind: tuple[int, int]) -> None:
    size, found = (height, width), shapes(*kind)
    chosen = choose(size, found)
    assert loss(size, chosen) <= min(loss(size, shape) for shape in found) + 1e-12
    assert loss(size, chosen) == pytest.approx(float(1 - kept(size, chosen)), abs=1e-9)


def test_ten_thousand_sizes_are_cropped_least() -> None:
    rng, found = random.Random(0), shapes(512, 64)
    for _ in range(10_000):
        size = rng.randint(64, 4000), rng.randint(64, 4000)
        assert loss(size, choose(size, found)) <= min(loss(size, shape) for shape in found) + 1e-12


@pytest.mark.parametrize("shape", shapes(512, 64))
def test_a_picture_of_a_buckets_size_is_its_own(shape: tuple[int, int]) -> None:
    assert choose(shape, shapes(512, 64)) == shape
    geometry = center(shape, choose(shape, shapes(512, 64)))
    assert geometry.resized == shape and geometry.lost_area == 0


def test_kohyas_example_is_not_cropped_much() -> None:
    chosen = choose((1050, 1080), shapes(1024, 64))
    assert chosen == (1024, 1024) and center((1050, 1080), chosen).lost_area < 0.03


def test_targets_are_a_square_or_the_buckets() -> None:
    plain = DataSettings(images="x")
    assert target_shapes(plain, resolution=64, size_multiple=8) == ((64, 64),)
    own = plain.model_copy(update={"resolution": 128})
    assert target_shapes(own, resolution=64, size_multiple=8) == ((128, 128),)
    buckets = DataSettings(images="x", buckets=True, bucket_step=16)
    assert target_shapes(buckets, resolution=64, size_multiple=8) == shapes(64, 16)


def test_a_resolution_that_does_not_fit_names_its_neighbours() -> None:
    with pytest.raises(DataError, match=r"resolution 500 is not a multiple of 64.*448 or 512"):
        target_shapes(DataSettings(images="x", resolution=500), resolution=512, size_multiple=64)
    with pytest.raises(DataError, match=r"bucket_step 12 must be a multiple of 8"):
        target_shapes(DataSettings(images="x", buckets=True, bucket_step=12), resolution=64, size_multiple=8)
