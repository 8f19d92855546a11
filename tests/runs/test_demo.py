"""The demo: a style is taught, drawn beside the base, and loaded in unmodified diffusers."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from scumble.errors import DataError, UnknownName
from scumble.runs.demo import held_out_scenes, run_demo, table


def test_held_out_scenes_are_never_in_a_style_set() -> None:
    from scumble.picturebook.scenes import held_out

    assert all(held_out(s.things[0].subject, s.things[0].color, s.background) for s in held_out_scenes(30))


def test_an_unknown_style_and_a_used_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UnknownName, match=r"no style 'wodcut'.*Did you mean"):
        run_demo("wodcut", tmp_path, say=lambda _: None)
    (tmp_path / "run").mkdir()
    with pytest.raises(DataError, match="--overwrite"):
        run_demo("woodcut", tmp_path)


@pytest.mark.slow
def test_a_short_demo_goes_all_the_way(tmp_path: Path) -> None:
    said: list[str] = []
    made = run_demo(
        "neon", tmp_path / "demo", pictures=2, say=said.append, train__steps=6, train__preview_every=0,
        train__held_out_every=0, data__held_out=0, preview__prompts=("a red fox, in neon style",),
    )  # fmt: skip
    assert len(said) == 4 and made.psnr >= 50
    assert made.adapter.is_file() and made.report.is_file()
    sheet = Image.open(made.grid)
    assert sheet.width > 4 * 64 and len(list((tmp_path / "demo" / "pictures").glob("*.png"))) == 40
    assert [row[0] for row in table(made)] == ["in the style", "right subject", "right colour"]
