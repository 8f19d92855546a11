from __future__ import annotations

import shutil
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from scumble.data.check import DataReport, check, summary
from scumble.errors import DataError
from tests.data.fakes import FakeBase, count_words, folder, noise, settings


def told(report: DataReport) -> dict[str, list[str]]:
    kinds: dict[str, list[str]] = defaultdict(list)
    for problem in report.problems:
        kinds[problem.kind].append(str(problem))
    return dict(kinds)


@pytest.fixture(scope="module")
def messy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one of everything that goes wrong."""
    root = tmp_path_factory.mktemp("messy")

    def add(
        name: str, picture: Image.Image | None, caption: str | bytes | None = "a fox", **options: object
    ) -> Path:
        path = root / name
        if picture is not None:
            picture.save(path, **options)
        if caption is not None:
            path.with_suffix(".txt").write_bytes(caption if isinstance(caption, bytes) else caption.encode())
        return path

    add("good.png", noise(64, 64, 1))
    whole = add("truncated.jpg", noise(64, 64, 2))
    whole.write_bytes(whole.read_bytes()[:-200])
    add("unreadable.png", None).write_bytes(b"\x89PNG\r\n")
    add("moving.gif", noise(64, 64, 3), save_all=True, append_images=[noise(64, 64, 4)])
    add("small.png", noise(40, 40, 5))
    add("wide.png", noise(64, 128, 6))
    add("silent.png", noise(64, 64, 7), None)
    add("blank.png", noise(64, 64, 8), "  \n")
    add("long.png", noise(64, 64, 9), "one two three four five six seven")
    add("windows.png", noise(64, 64, 10), "a caf\xe9".encode("cp1252"))
    shutil.copy(add("first.png", noise(64, 64, 11)), root / "second.png")
    (root / "second.txt").write_text("other words")
    add("likeness.jpg", noise(64, 64, 11).resize((80, 80)), quality=95)
    add("float.tif", Image.new("F", (64, 64)))
    return root


def test_all_problems_are_told_at_once_by_name(messy: Path, tmp_path: Path) -> None:
    report = check(
        settings(messy),
        resolution=64,
        size_multiple=8,
        count_tokens=count_words,
        sheet=tmp_path / "s" / "sheet.png",
    )
    kinds = told(report)
    assert {problem.kind for problem in report.errors} == {
        "truncated",
        "unreadable",
        "animated",
        "no caption",
        "32-bit",
    }
    assert {problem.kind for problem in report.warnings} == {
        "too small",
        "cropped",
        "empty caption",
        "long caption",
        "encoding",
        "duplicate",
        "look alike",
    }
    assert all(len(said) == 1 for said in kinds.values()), kinds
    assert kinds["too small"][0].startswith("small.png: is 40x40 pixels")
    assert "enlarged 1.60x to fill 64x64" in kinds["too small"][0]
    assert kinds["cropped"][0].startswith("wide.png: 128x64 loses 50% of its area to 64x64")
    assert "right 32, bottom 0, left 32" in kinds["cropped"][0] and "buckets = true" in kinds["cropped"][0]
    assert kinds["duplicate"] == ["first.png: is the same file as second.png, with another caption."]
    assert kinds["look alike"] == ["first.png: looks the same as likeness.jpg."]
    assert "has 9 tokens; the base reads the first 7" in kinds["long caption"][0]
    assert "windows.txt: is read as cp1252: 'a café'" in kinds["encoding"][0]
    assert kinds["no caption"][0].startswith("silent.png")
    assert report.token_limit == 7 and len(report.pictures) == 9
    with pytest.raises(DataError) as caught:
        report.raise_if_errors()
    for name in ("truncated.jpg", "unreadable.png", "moving.gif", "silent.png", "float.tif"):
        assert name in str(caught.value)
    assert "wide.png" not in str(caught.value) and "5 problems" in str(caught.value)
    assert "9 pictures can be trained on" in summary(report)
    assert report.sheet is not None and report.sheet.is_file()


def test_a_good_dataset_has_no_problems(tmp_path: Path) -> None:
    for index in range(5):
        noise(64, 64, index).save(tmp_path / f"{index}.png")
        (tmp_path / f"{index}.txt").write_text(f"picture {index}")
    report = check(settings(tmp_path), resolution=64, count_tokens=FakeBase().token_counts)
    assert report.problems == () and summary(report) == "5 pictures can be trained on; no problems."
    report.raise_if_errors()
    assert [bucket.size for bucket in report.buckets] == [(64, 64)]
    assert report.buckets[0].scales == (1, 1, 1) and report.buckets[0].lost_area == 0
    assert [picture.tokens for picture in report.pictures] == [4] * 5


def test_no_upscale_makes_small_an_error(tmp_path: Path) -> None:
    root = folder(tmp_path, ((64, 64), (40, 40), (63, 64)))
    report = check(settings(root, allow_upscale=False), resolution=64)
    assert [problem.key for problem in report.errors] == ["1.png", "2.png"]
    assert "enlarged 1.02x" in str(report.errors[1])
    assert [picture.key for picture in report.pictures] == ["0.png"]


def test_figures_on_plain_paper_do_not_look_alike(tmp_path: Path) -> None:
    for index in range(4):
        picture = Image.new("RGB", (64, 64), "white")
        picture.paste((200, 20, 20), (8 + 6 * index, 20, 30 + 6 * index, 50))
        picture.save(tmp_path / f"{index}.png")
    assert check(settings(tmp_path, caption="x"), resolution=64).problems == ()


def test_buckets_are_reported_and_crop_less(tmp_path: Path) -> None:
    root = folder(tmp_path, ((64, 64), (64, 128), (128, 64), (120, 66)))
    square, shaped = (check(settings(root, buckets=on), resolution=64) for on in (False, True))
    assert sum(bucket.pictures for bucket in shaped.buckets) == 4 and len(shaped.buckets) >= 3
    for before, after in zip(square.pictures, shaped.pictures, strict=True):
        assert after.geometry.lost_area <= 0.1 and (before.geometry.lost_area > 0.4 or before.key == "0.png")
    assert shaped.pictures[0].geometry.target == (64, 64)
    assert "set buckets = true" in told(square)["cropped"][0]
    assert all("buckets" not in text for text in told(shaped)["cropped"])


def test_options_that_do_harm_or_nothing_are_told(tmp_path: Path) -> None:
    root = folder(tmp_path, caption="picture {index} on the left")
    report = check(settings(root, random_flip=True, shuffle_tags=True), resolution=32)
    kinds = told(report)
    assert kinds["mirrored"] == [
        '0.png: says "left" or "right", as 6 captions do, and random_flip mirrors the picture.'
    ]
    assert kinds["no effect"] == ["captions: shuffle_tags has no effect: no caption contains ','."]
    assert [problem.kind for problem in report.errors] == ["no effect"]


def test_a_template_can_make_a_caption_too_long(tmp_path: Path) -> None:
    root = folder(tmp_path, caption="picture {index}")
    fits = check(settings(root), resolution=32, count_tokens=count_words)
    assert "long caption" not in told(fits)
    long = settings(root, templates=("{caption}", "a very good photo of {caption}"))
    assert len(told(check(long, resolution=32, count_tokens=count_words))["long caption"]) == 6


def test_the_sheet_shows_the_pixels_that_are_trained(tmp_path: Path) -> None:
    left, right = (250, 10, 10), (10, 10, 250)
    picture = Image.new("RGB", (192, 96), left)
    picture.paste(right, (96, 0, 192, 96))
    (tmp_path / "data").mkdir()
    picture.save(tmp_path / "data" / "a.png")
    sheet = tmp_path / "sheet.png"
    check(settings(tmp_path / "data", caption="two colours"), resolution=96, sheet=sheet)
    pixels = np.asarray(Image.open(sheet)).astype(int)
    reds = (np.abs(pixels - left).sum(-1) < 30).sum()
    blues = (np.abs(pixels - right).sum(-1) < 30).sum()
    assert reds == blues == 192 * 96, "the middle square, shown twice as large"


def test_the_sheet_shows_every_crop(tmp_path: Path) -> None:
    root = folder(tmp_path / "data", ((64, 200),) * 2)
    one, four = tmp_path / "one.png", tmp_path / "four.png"
    check(settings(root), resolution=64, sheet=one)
    check(settings(root, center_crop=False, crop_variants=4), resolution=64, sheet=four)
    with Image.open(one) as few, Image.open(four) as many:
        assert few.height < many.height


def test_large_datasets_have_a_sheet_of_bounded_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import scumble.data.check as module

    monkeypatch.setattr(module, "MOST", 4)
    root = folder(tmp_path / "data", ((16, 16),) * 10)
    seen = []
    monkeypatch.setattr(
        module,
        "contact_sheet",
        lambda tiles, **rest: seen.append((len(tiles), rest["left_out"])) or Image.new("L", (1, 1)),
    )
    check(settings(root), resolution=16, sheet=tmp_path / "sheet.png")
    assert seen == [(4, 6)]


def test_rows_with_problems_are_in_the_report_too(tmp_path: Path) -> None:
    root = folder(tmp_path)
    (root / "metadata.jsonl").write_text(
        '{"file_name": "0.png", "text": "x"}\n{"file_name": "9.png", "text": "y"}\n'
    )
    kinds = told(check(settings(root), resolution=32))
    assert kinds["missing"] == ["9.png: there is no such file; metadata.jsonl:2 names it."]
    assert kinds["not named"][0].startswith("1.png: and 4 more pictures")


def test_threads_change_nothing(messy: Path) -> None:
    reports = [check(settings(messy, workers=workers), resolution=64) for workers in (0, 4)]
    assert reports[0] == reports[1]


def test_a_thousand_small_files_take_seconds(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (1000, 8, 8, 3), dtype=np.uint8)
    for index in range(1000):
        Image.fromarray(pixels[index]).resize((96, 96), Image.Resampling.BICUBIC).save(
            tmp_path / f"{index}.jpg"
        )
        (tmp_path / f"{index}.txt").write_text(f"picture {index}")
    start = time.process_time()  # of this process alone, whatever else the machine does
    report = check(settings(tmp_path), resolution=64, sheet=tmp_path / "sheet" / "s.png")
    assert time.process_time() - start < 20
    assert len(report.pictures) == 1000 and report.problems == ()
