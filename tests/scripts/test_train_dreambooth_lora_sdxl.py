"""The DreamBooth command for SDXL: each flag becomes what it should, and the whole of it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from scumble.formats import read
from tests.runs.worlds import write_world
from tests.scripts.commands import (
    FOLDER,
    NEEDED,
    about,
    at,
    defaults,
    load,
    meaning,
    named_in,
    run_config,
    trained,
)
from tests.scripts.theirs import SUBJECT_LATER

THEIRS: dict[str, Any] = {
    **SUBJECT_LATER,
    "pretrained_vae_model_name_or_path": None,
    "do_edm_style_training": False,
    "output_dir": "lora-dreambooth-model",
    "output_kohya_format": False,
    "resolution": 1024,
    "snr_gamma": None,
    "enable_xformers_memory_efficient_attention": False,
    "use_dora": False,
    "image_interpolation_mode": "lanczos",
}
PRIOR = "--with_prior_preservation --class_data_dir=dogs --class_prompt=dog"

script = load("train_dreambooth_lora_sdxl")


config = meaning(script, FOLDER)


def test_the_flags_are_theirs_with_their_defaults() -> None:
    assert defaults(script) == THEIRS


ROWS: list[tuple[str, str, Any]] = [
    ("", "method", "dreambooth"),
    ("", "data.images", "dog"),
    ("", "data.resolution", 1024),
    ("--resolution=512", "data.resolution", 512),
    ("", "dreambooth.instance_prompt", "a photo of sks dog"),
    ("--train_text_encoder", "dreambooth.train_text_encoder", True),
    ("--train_text_encoder", "dreambooth.text_encoder_learning_rate", 5e-6),
    ("--validation_prompt=sks", "preview.steps", 25),
    ("--validation_prompt=sks", "preview.guidance", 5.0),
    ("--validation_prompt=sks --validation_epochs=3", "train.preview_every", 15),
    (PRIOR, "dreambooth.prior", "images"),
    (PRIOR, "dreambooth.class_guidance", 5.0),
    (PRIOR, "train.steps", 25),  # an epoch is as long as the larger set, here the 100 class pictures
    ("--output_kohya_format", "save.also", ("kohya",)),
    ("", "save.also", ()),
    ("--snr_gamma=5", "train.objective.snr_gamma", 5.0),
    ("--use_dora", "adapter.family", "dora"),
    ("", "adapter.family", "lora"),
    ("--use_dora --rank=8 --lora_dropout=0.1", "adapter.dropout", 0.1),
    ("--optimizer=prodigy --use_8bit_adam", "train.optimizer.name", "prodigy"),
    ("--use_8bit_adam", "train.optimizer.name", "adamw8bit"),
    ("", "train.optimizer.weight_decay", 1e-4),
    ("", "train.optimizer.learning_rate", 1e-4),
    ("", "adapter.targets", "attention"),
    ("", "output", Path("lora-dreambooth-model")),
    ("", "train.steps", 5),
    ("--pretrained_vae_model_name_or_path=other", "base", "base"),
]  # fmt: skip


@pytest.mark.parametrize(("flags", "setting", "value"), ROWS)
def test_each_flag_becomes_its_setting(flags: str, setting: str, value: Any) -> None:
    assert at(config(*flags.split()), setting) == about(value)


def test_every_flag_is_in_a_table_refused_or_shared() -> None:
    """Rows shared with the other commands are tested there."""
    shared = {flag.name for name in ("", "_sd3") for flag in load(f"train_dreambooth_lora{name}").FLAGS}
    assert set(THEIRS) <= shared | named_in(ROWS) | {"do_edm_style_training"}


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ((*NEEDED,), "either --dataset_name"),
        ((*FOLDER, "--do_edm_style_training"), "noise schedule of their base"),
        ((*FOLDER, "--with_prior_preservation"), "--class_data_dir"),
        ((*FOLDER, "--optimizer=sgd"), "Use AdamW or prodigy"),
        ((*FOLDER, "--prodigy_beta3=0.9"), "prodigy_beta3"),
    ],
)
def test_what_can_not_be_honoured_is_refused(flags: tuple[str, ...], said: str) -> None:
    with pytest.raises(script.Refused, match=said):
        run_config(script, list(flags))


@pytest.mark.slow
def test_the_whole_of_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(write_world(tmp_path, 2, family="sdxl", pictures="dog", caption=None))
    flags = ("--num_class_images=2", "--train_text_encoder", "--output_kohya_format")
    found = trained(script, tmp_path, *FOLDER, *PRIOR.split(), *flags)
    assert len(list((tmp_path / "dogs").glob("*.png"))) == 2
    assert found.state.roots == {"unet", "text_encoder", "text_encoder_2"}
    also = read(tmp_path / "out" / "pytorch_lora_weights_kohya.safetensors", list(found.state.layers))
    assert also.dialect == "kohya" and also.state.layers.keys() == found.state.layers.keys()
