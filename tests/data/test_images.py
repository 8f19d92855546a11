from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps

from scumble.data.images import (
    ORIENTATION,
    Geometry,
    center,
    crops,
    cut,
    frame,
    measure,
    mirrored,
    normalise,
    open_upright,
    to_tensor,
)
from scumble.data.problems import Refused
from scumble.data.record import Record
from tests.data.fakes import noise


def stored(image: Image.Image, form: str = "PNG", **options: object) -> Record:
    """A record of the picture in this file format."""
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return of_bytes(buffer.getvalue())


def of_bytes(data: bytes) -> Record:
    return Record("a/cat.png", lambda: Image.open(io.BytesIO(data)), ("",), read=lambda: data)


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image)


def test_a_plain_picture_keeps_its_pixels() -> None:
    picture = noise(24, 40)
    assert np.array_equal(pixels(open_upright(stored(picture))), pixels(picture))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["JPEG", "PNG"])
def test_exif_orientation_turns_pixels_and_size(orientation: int, form: str) -> None:
    picture = noise(16, 48, seed=3)
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    options = {"quality": 98, "subsampling": 0} if form == "JPEG" else {}
    record = stored(picture, form, exif=exif, **options)
    turn: dict[int, Callable[[Image.Image], Image.Image]] = {
        1: lambda p: p,
        2: ImageOps.mirror,
        3: lambda p: p.rotate(180),
        4: ImageOps.flip,
        5: lambda p: ImageOps.mirror(p.rotate(-90, expand=True)),
        6: lambda p: p.rotate(-90, expand=True),
        7: lambda p: ImageOps.mirror(p.rotate(90, expand=True)),
        8: lambda p: p.rotate(90, expand=True),
    }
    expected = pixels(turn[orientation](picture)).astype(int)
    upright = pixels(open_upright(record)).astype(int)
    assert upright.shape == expected.shape
    assert np.abs(upright - expected).mean() < (4 if form == "JPEG" else 1e-9)
    assert measure(record).size == upright.shape[:2]


def test_transparency_is_laid_on_white() -> None:
    picture = Image.new("RGBA", (8, 8), (200, 0, 0, 0))
    picture.paste((10, 20, 30, 255), (0, 0, 4, 8))
    picture.putpixel((7, 7), (0, 0, 0, 128))
    done = pixels(open_upright(stored(picture)))
    assert done[0, 0].tolist() == [10, 20, 30] and done[0, 7].tolist() == [255, 255, 255]
    assert np.abs(done[7, 7].astype(int) - 127).max() <= 1


def test_palette_and_its_transparent_colour() -> None:
    picture = Image.new("P", (8, 8), 1)
    picture.putpalette([0, 0, 0, 250, 0, 0] + [0] * 750)
    picture.putpixel((0, 0), 0)
    done = pixels(open_upright(stored(picture, "PNG", transparency=0)))
    assert done[0, 0].tolist() == [255, 255, 255] and done[5, 5].tolist() == [250, 0, 0]
    assert pixels(open_upright(stored(picture)))[0, 0].tolist() == [0, 0, 0]


def test_grey_with_a_transparent_shade() -> None:
    picture = Image.new("L", (4, 4), 90)
    picture.putpixel((0, 0), 17)
    done = pixels(open_upright(stored(picture, "PNG", transparency=17)))
    assert done[0, 0].tolist() == [255] * 3 and done[1, 1].tolist() == [90] * 3


def test_cmyk_becomes_rgb() -> None:
    picture = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    done = pixels(open_upright(stored(picture, "TIFF")))
    assert done[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled_not_clipped(form: str) -> None:
    ramp = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    done = pixels(open_upright(stored(Image.fromarray(ramp), form)))
    assert np.array_equal(done[..., 0], np.round(ramp / 257).astype(np.uint8))
    assert len(np.unique(done)) > 60


def test_big_endian_sixteen_bits() -> None:
    picture = Image.frombytes("I;16B", (2, 1), struct.pack(">2H", 65535, 257))
    assert pixels(normalise(picture))[0, :, 0].tolist() == [255, 1]


def test_one_bit_becomes_rgb() -> None:
    assert pixels(open_upright(stored(Image.new("1", (4, 4), 1)))).min() == 255


@pytest.mark.parametrize("mode", ["I", "F"])
def test_thirty_two_bits_are_refused_by_name(mode: str) -> None:
    with pytest.raises(Refused, match=r"a/cat.png: holds 32-bit numbers") as caught:
        open_upright(stored(Image.new(mode, (4, 4)), "TIFF"))
    assert caught.value.kind == "32-bit"


@pytest.mark.parametrize("form", ["GIF", "PNG", "WEBP", "TIFF"])
def test_animations_are_refused_by_name(form: str) -> None:
    frames = [noise(16, 16, seed) for seed in range(3)]
    record = stored(frames[0], form, save_all=True, append_images=frames[1:])
    with pytest.raises(Refused, match=r"a/cat.png: has 3 frames") as caught:
        open_upright(record)
    assert caught.value.kind == "animated"


def test_a_single_gif_frame_is_a_picture() -> None:
    assert open_upright(stored(noise(16, 16), "GIF")).size == (16, 16)


def test_a_phones_mpo_is_a_picture() -> None:
    record = stored(noise(16, 16), "MPO", save_all=True, append_images=[noise(8, 8, 1)])
    assert open_upright(record).size == (16, 16)


def test_damaged_files_are_refused_by_name() -> None:
    buffer = io.BytesIO()
    noise(64, 64).save(buffer, "JPEG")
    whole = buffer.getvalue()
    for data, kind in (
        (whole[: len(whole) // 2], "truncated"),
        (b"", "unreadable"),
        (b"<html>not found</html>", "unreadable"),
        (whole[:20], "unreadable"),
    ):
        with pytest.raises(Refused, match=r"a/cat\.png: ") as caught:
            open_upright(of_bytes(data))
        assert caught.value.kind == kind, (len(data), str(caught.value))


def test_a_damaged_png_is_refused() -> None:
    buffer = io.BytesIO()
    noise(64, 64).save(buffer, "PNG")
    data = bytearray(buffer.getvalue())
    data[len(data) // 2] ^= 0xFF
    with pytest.raises(Refused):
        open_upright(of_bytes(bytes(data)))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "gone.png"
    record = Record("gone.png", lambda: Image.open(path), ("",), path, read=path.read_bytes)
    for look in (open_upright, measure):
        with pytest.raises(Refused, match=r"gone.png: there is no such file"):
            look(record)


def test_a_decompression_bomb_is_refused() -> None:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 0, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")
    with pytest.raises(Refused, match="decompression bomb") as caught:
        open_upright(of_bytes(data))
    assert caught.value.kind == "too large"


def test_content_is_that_of_the_bytes_else_of_the_pixels() -> None:
    picture, other = noise(8, 8), noise(8, 8, 1)
    assert measure(stored(picture)).content == measure(stored(picture)).content
    assert measure(stored(picture)).content != measure(stored(other)).content

    def bare(image: Image.Image) -> Record:
        return Record("row 1", lambda: image.copy(), ("",))

    assert measure(bare(picture)) == measure(bare(picture.copy()))
    assert measure(bare(picture)).content != measure(bare(other)).content


def test_a_picture_of_the_targets_size_is_untouched() -> None:
    picture = noise(48, 64)
    for geometry in (center((48, 64), (48, 64)), *crops((48, 64), (48, 64), [12345, 7])):
        assert np.array_equal(pixels(cut(picture, geometry)), pixels(picture))
        assert geometry.lost == (0, 0, 0, 0) and geometry.lost_area == 0 and geometry.scale == 1


@given(
    st.tuples(st.integers(1, 900), st.integers(1, 900)),
    st.tuples(st.integers(1, 40).map(lambda n: 8 * n), st.integers(1, 40).map(lambda n: 8 * n)),
    st.lists(st.integers(0, 2**63), min_size=1, max_size=5),
)
def test_every_crop_lies_inside(size: tuple[int, int], target: tuple[int, int], draws: list[int]) -> None:
    for geometry in (center(size, target), *crops(size, target, draws)):
        for side in (0, 1):
            assert geometry.resized[side] >= target[side]
            assert 0 <= geometry.corner[side] <= geometry.resized[side] - target[side]
        assert geometry.resized[0] == target[0] or geometry.resized[1] == target[1]


def test_the_crop_is_where_the_geometry_says() -> None:
    ramp = np.zeros((20, 60, 3), np.uint8)
    ramp[..., 0] = np.arange(60)[None]
    picture = Image.fromarray(ramp)
    (geometry,) = crops((20, 60), (20, 20), [33])
    assert geometry.corner == (0, 33) and geometry.lost == (0, 7, 0, 33)
    assert pixels(cut(picture, geometry))[0, :, 0].tolist() == list(range(33, 53))
    assert pixels(cut(picture, mirrored(geometry)))[0, :, 0].tolist() == list(range(52, 32, -1))
    assert center((20, 60), (20, 20)).corner == (0, 20)


def test_few_places_are_all_taken_once() -> None:
    found = crops((32, 34), (32, 32), [5, 5, 5, 5])
    assert [geometry.corner for geometry in found] == [(0, 0), (0, 1), (0, 2)]


def test_variants_are_named_apart() -> None:
    geometry = Geometry((64, 80), (32, 40), (0, 3), (32, 32))
    names = {
        geometry.variant,
        mirrored(geometry).variant,
        Geometry((64, 80), (32, 40), (0, 4), (32, 32)).variant,
        Geometry((64, 80), (32, 41), (0, 3), (32, 32)).variant,
        Geometry((64, 80), (32, 40), (0, 3), (32, 24)).variant,
    }
    assert len(names) == 5


def test_the_frame_tells_the_mirrored_corner() -> None:
    geometry = Geometry((64, 80), (32, 40), (0, 3), (32, 32))
    told = frame([geometry, mirrored(geometry)])
    assert told.original.tolist() == [[64, 80]] * 2 and told.target.tolist() == [[32, 32]] * 2
    assert told.corner.tolist() == [[0, 3], [0, 5]]


def test_to_tensor_spans_minus_one_to_one() -> None:
    picture = Image.new("RGB", (3, 2), (0, 255, 51))
    tensor = to_tensor(picture)
    assert tensor.shape == (3, 2, 3) and tensor.dtype == torch.float32 and tensor.is_contiguous()
    assert tensor[0].unique().tolist() == [-1] and tensor[1].unique().tolist() == [1]
    assert tensor[2, 0, 0].item() == pytest.approx(-0.6)


@pytest.mark.parametrize(
    "name", ["lanczos", "bicubic", "bilinear", "box", "hamming", "nearest", "nearest_exact"]
)
def test_interpolation_is_the_one_that_is_named(name: str) -> None:
    picture, geometry = noise(48, 48), center((48, 48), (32, 32))
    pillow = getattr(Image.Resampling, name.removesuffix("_exact").upper())
    assert np.array_equal(pixels(cut(picture, geometry, name)), pixels(picture.resize((32, 32), pillow)))
