"""The command for SDXL on captioned pictures: each flag becomes what it should, and the whole of it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.runs.worlds import write_world
from tests.scripts.commands import (
    about,
    at,
    defaults,
    load,
    meaning,
    named_in,
    notes_of,
    trained,
)
from tests.scripts.theirs import CAPTIONED

THEIRS: dict[str, Any] = {
    **CAPTIONED,
    "pretrained_vae_model_name_or_path": None,
    "resolution": 1024,
    "train_text_encoder": False,
    "enable_npu_flash_attention": False,
    "debug_loss": False,
}
GIVEN = ("--pretrained_model_name_or_path=base", "--train_data_dir=pictures")

script = load("train_text_to_image_lora_sdxl")


config = meaning(script, GIVEN)


def test_the_flags_are_theirs_with_their_defaults() -> None:
    assert defaults(script) == THEIRS


ROWS: list[tuple[str, str, Any]] = [
    ("", "method", "text-to-image"),
    ("", "data.images", "pictures"),
    ("", "data.resolution", 1024),
    ("--resolution=512", "data.resolution", 512),
    ("--train_text_encoder", "text_to_image.train_text_encoder", True),
    ("", "text_to_image.train_text_encoder", False),
    ("--validation_prompt=fox", "preview.prompts", ("fox",)),
    ("--validation_prompt=fox", "preview.steps", 25),
    ("--validation_prompt=fox", "preview.guidance", 5.0),
    ("", "preview.prompts", ()),
    ("--pretrained_vae_model_name_or_path=other", "base", "base"),
    ("--num_train_epochs=5 --train_batch_size=4", "train.steps", 25),
    ("--validation_prompt=x --validation_epochs=3 --train_batch_size=4", "train.preview_every", 15),
]  # fmt: skip


@pytest.mark.parametrize(("flags", "setting", "value"), ROWS)
def test_each_flag_becomes_its_setting(flags: str, setting: str, value: Any) -> None:
    assert at(config(*flags.split()), setting) == about(value)


def test_every_flag_is_in_a_table_refused_or_shared() -> None:
    """Rows shared with the other command are tested there."""
    shared = {flag.name for flag in load("train_text_to_image_lora").FLAGS}
    assert set(THEIRS) <= shared | named_in(ROWS) | {"enable_npu_flash_attention", "debug_loss"}


@pytest.mark.parametrize("flag", ["--enable_npu_flash_attention", "--debug_loss"])
def test_what_can_not_be_honoured_is_refused(flag: str) -> None:
    with pytest.raises(script.Refused, match=f"{flag} can't be honoured"):
        config(flag)


def test_another_vae_is_noted() -> None:
    (note,) = notes_of(script, *GIVEN, "--pretrained_vae_model_name_or_path=madebyollin/fix")
    assert "madebyollin/fix is not used" in note and "fp32" in note
    assert notes_of(script, *GIVEN) == []


def test_the_whole_of_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(write_world(tmp_path, 3, family="sdxl", wider=4, size=(20, 16)))
    flags = ("--random_flip", "--train_text_encoder", "--validation_prompt=a colour")
    found = trained(script, tmp_path, *GIVEN, *flags, "--num_validation_images=1")
    assert found.dialect == "diffusers" and found.state.metadata.base_family == "sdxl"
    assert found.state.roots == {"unet", "text_encoder", "text_encoder_2"}
