"""Drawing: sheets where every picture is whole and in its place."""

from __future__ import annotations

import numpy
import pytest
from PIL import Image

from scumble.errors import ConfigError
from scumble.inference.drawing import LARGEST, PAPER, SMALLEST, grid, scaled

RED, BLUE = (200, 20, 30), (10, 40, 220)


def area(sheet: Image.Image, colour: tuple[int, int, int]) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of a colour; every pixel inside has it."""
    rows, columns = numpy.where((numpy.asarray(sheet) == colour).all(-1))
    left, top, right, bottom = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
    assert len(rows) == (right - left) * (bottom - top)
    return int(left), int(top), int(right), int(bottom)


def patch(colour: tuple[int, int, int], width: int = 16, height: int = 16) -> Image.Image:
    return Image.new("RGB", (width, height), colour)


def test_pictures_stand_side_by_side_at_a_whole_multiple_of_their_pixels() -> None:
    sheet = grid([[patch(RED), patch(BLUE)]], ["base", "adapter"], ["a fox"])
    red, blue = area(sheet, RED), area(sheet, BLUE)
    assert red[2] - red[0] == blue[2] - blue[0] == SMALLEST
    assert red[2] < blue[0]
    assert red[1] == blue[1]
    assert red[1] > 30  # words above


def test_words_are_drawn_above_their_column() -> None:
    with_words = numpy.asarray(grid([[patch(RED), patch(BLUE)]], ["base", ""]))
    dark = numpy.where((with_words < 100).all(-1))
    red = area(Image.fromarray(with_words), RED)
    assert len(dark[0]) > 20
    assert dark[0].max() < red[1]
    assert red[0] < dark[1].min() <= dark[1].max() < red[2]


def test_rows_follow_each_other_and_empty_places_stay_empty() -> None:
    sheet = grid([[patch(RED), None], [None, patch(BLUE)]], scale=2)
    red, blue = area(sheet, RED), area(sheet, BLUE)
    assert red[3] <= blue[1]
    assert red[2] <= blue[0]
    assert sheet.getpixel((blue[0] + 1, red[1] + 1)) == PAPER


def test_long_captions_wrap_inside_the_sheet() -> None:
    short = grid([[patch(RED)]], labels=["fox"])
    long = grid([[patch(RED)]], labels=["a fox " * 30 + "x" * 300])
    assert long.width == short.width
    assert long.height > short.height + 100
    pixels = numpy.asarray(long)
    assert (pixels[:, :4] == PAPER).all()
    assert (pixels[:, -4:] == PAPER).all()


def test_large_pictures_are_averaged_down() -> None:
    sheet = grid([[patch(RED, 1024, 2048)]])
    left, top, right, bottom = area(sheet, RED)
    assert (right - left, bottom - top) == (LARGEST // 2, LARGEST)


def test_scaling_keeps_pixels_sharp_or_averages() -> None:
    board = Image.fromarray(numpy.array([[0, 255], [255, 0]], dtype=numpy.uint8))
    assert set(numpy.unique(numpy.asarray(scaled(board, 3)))) == {0, 255}
    assert numpy.asarray(scaled(board, 0.5)).tolist() == [[[128, 128, 128]]]


def test_mistakes_are_named() -> None:
    with pytest.raises(ConfigError, match="at least one picture"):
        grid([[None]])
    with pytest.raises(ConfigError, match="2 columns got 1 column labels"):
        grid([[patch(RED), patch(RED)]], ["one"])
    with pytest.raises(ConfigError, match="1 rows got 2 row labels"):
        grid([[patch(RED)]], labels=["one", "two"])
