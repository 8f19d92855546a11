from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from scumble.data.settings import NOT_SHOWN, DataSettings


def test_every_setting_has_a_help_text() -> None:
    for name, field in DataSettings.model_fields.items():
        assert field.description and field.description.endswith("."), name


def test_a_path_is_taken_as_text() -> None:
    assert DataSettings(images=Path("dog")).images == "dog"  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"keep_tags": 2}, "keep_tags = 2 has no effect without shuffle_tags"),
        ({"bucket_step": 64}, "bucket_step = 64 has no effect without buckets"),
        ({"templates": ("a photo",)}, "does not contain {caption}"),
        ({"templates": ()}, "at least 1"),
        ({"held_out": 2.5}, "neither a fraction below 1 nor a whole number"),
        ({"images": " "}, "images is empty"),
        ({"caption_dropout": 1.5}, "less than or equal to 1"),
        ({"caption_colum": "text"}, "Extra inputs are not permitted"),
    ],
)
def test_a_setting_without_effect_or_sense_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        DataSettings(**{"images": "dog", **changes})


def test_what_a_fingerprint_leaves_out_are_settings() -> None:
    assert set(DataSettings.model_fields) > NOT_SHOWN
