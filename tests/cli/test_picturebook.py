"""`scumble picturebook`: an ordinary image folder from a style's name, what there is, and a sheet of pictures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from scumble.cli.main import main


def run(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        main(["picturebook", *arguments])
    out, err = capsys.readouterr()
    return int(stop.value.code or 0), out, err


def test_a_style_becomes_an_image_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "pictures"
    code, out, _ = run(["dataset", "woodcut", str(folder), "--count", "3", "--resolution", "32"], capsys)
    assert code == 0 and "3 pictures of woodcut" in out
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    assert len(rows) == 3
    for row in rows:
        assert row["text"] and Image.open(folder / row["file_name"]).size == (32, 32)


def test_what_is_not_there_is_suggested(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(["dataset", "wodcut", str(tmp_path / "new")], capsys)
    assert code == 2 and 'Did you mean "woodcut"' in err
    (tmp_path / "mine.jpg").touch()
    code, _, err = run(["dataset", "woodcut", str(tmp_path)], capsys)
    assert code == 2 and "mine.jpg" in err


def test_the_list_names_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(["list"], capsys)
    assert code == 0
    assert {line.partition(":")[0] for line in out.splitlines()} == {
        *("styles", "creatures", "subjects", "colours", "backgrounds")
    }
    assert "woodcut" in out and "fox" in out


def test_a_sheet_shows_pictures_of_held_out_prompts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from scumble.models import FAMILIES, loading
    from scumble.picturebook.draw import contact_sheet

    monkeypatch.setattr(loading, "load_base", lambda *_, **__: FAMILIES.get("sd1").tiny())
    file = tmp_path / "sub" / "sheet.png"
    code, out, err = run(["sheet", str(file), "--count", "5", "--columns", "3", "--steps", "2"], capsys)
    assert code == 0, err
    side = FAMILIES.get("sd1").tiny().resolution
    page = Image.open(file)
    assert page.size == contact_sheet([Image.new("RGB", (side, side))] * 5, 3).size
    assert page.getcolors(1 << 20) and len(page.getcolors(1 << 20) or []) > 50, "pictures, and no empty page"
    assert "5 pictures" in out
