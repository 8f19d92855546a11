"""PNG: settings travel with the picture and come back as they were."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image, PngImagePlugin

from scumble.errors import ConfigError, DataError
from scumble.inference.drawing import Drawing
from scumble.inference.png import read_record, read_settings, write_png
from scumble.inference.request import AdapterUse, Request

REQUEST = Request(
    prompt='a "fox", 狐\nin <snow>',
    negative="rain",
    seed=2**62,
    width=16,
    height=24,
    guidance=3.25,
    adapters=(AdapterUse(path=Path("runs/fox/x.safetensors"), strength=-0.5),),
)
SETTINGS = {"base": "picturebook", "scheduler": "DDIMScheduler", "version": "scumble 0.1.0"}


def picture() -> Image.Image:
    return Image.linear_gradient("L").resize((16, 24)).convert("RGB")


def test_settings_come_back_and_pixels_are_untouched(tmp_path: Path) -> None:
    path = Drawing(picture(), REQUEST, REQUEST.seed, SETTINGS).save(tmp_path / "new" / "fox.png")
    assert read_settings(path) == REQUEST
    assert read_record(path)["drawn"] == SETTINGS
    with Image.open(path) as image:
        assert image.tobytes() == picture().tobytes()


def test_other_programs_read_the_paragraph(tmp_path: Path) -> None:
    path = write_png(picture(), tmp_path / "fox.png", REQUEST, SETTINGS)
    with Image.open(path) as image:
        text = image.text["parameters"]  # type: ignore[attr-defined]
    assert text.splitlines() == [
        'a "fox", 狐',
        "in <snow>",
        "Negative prompt: rain",
        f"Steps: 25, Sampler: DDIMScheduler, CFG scale: 3.25, Seed: {2**62}, Size: 16x24, "
        "Model: picturebook, Adapters: runs/fox/x.safetensors at -0.5, Version: scumble 0.1.0",
    ]


def test_a_failed_write_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_png(picture(), tmp_path / "fox.png", REQUEST, SETTINGS)
    before = path.read_bytes()

    def full(self: Image.Image, stream: object, *args: object, **kwargs: object) -> None:
        stream.write(b"half a picture")  # type: ignore[attr-defined]
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(ConfigError, match="No space left on device"):
        write_png(picture(), path, REQUEST, SETTINGS)
    assert path.read_bytes() == before
    assert [item.name for item in tmp_path.iterdir()] == ["fox.png"]


def test_other_formats_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"Call it fox\.png"):
        write_png(picture(), tmp_path / "fox.jpg", REQUEST, SETTINGS)


def test_a_picture_of_somebody_else(tmp_path: Path) -> None:
    picture().save(tmp_path / "plain.png")
    with pytest.raises(DataError, match="holds no settings of scumble"):
        read_settings(tmp_path / "plain.png")
    with pytest.raises(DataError, match="There is no picture"):
        read_settings(tmp_path / "gone.png")
    (tmp_path / "text.png").write_text("not a picture")
    with pytest.raises(DataError, match="can't be read as a picture"):
        read_settings(tmp_path / "text.png")


@pytest.mark.parametrize(
    ("text", "what"), [("{", "damaged"), ("[1]", "no table"), ('{"request": {"promt": 1}}', "promt")]
)
def test_damaged_settings(tmp_path: Path, text: str, what: str) -> None:
    info = PngImagePlugin.PngInfo()
    info.add_text("scumble", text)
    picture().save(tmp_path / "x.png", pnginfo=info)
    with pytest.raises(DataError, match=what):
        read_settings(tmp_path / "x.png")
