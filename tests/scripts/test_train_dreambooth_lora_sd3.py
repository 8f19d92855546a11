"""The DreamBooth command for Stable Diffusion 3: each flag becomes what it should, and the whole of it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from scumble.adapters.layers import layers_of
from scumble.adapters.targets import resolve
from scumble.models import FAMILIES
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
    notes_of,
    run_config,
    trained,
)
from tests.scripts.theirs import SUBJECT_FLOW

THEIRS: dict[str, Any] = {
    **SUBJECT_FLOW,
    "max_sequence_length": 77,
    "output_dir": "sd3-dreambooth",
    "weighting_scheme": "logit_normal",
    "precondition_outputs": 1,
    "lora_blocks": None,
}

script = load("train_dreambooth_lora_sd3")


config = meaning(script, FOLDER)


def test_the_flags_are_theirs_with_their_defaults() -> None:
    assert defaults(script) == THEIRS


LEVELS = "train.objective.timesteps"
ROWS: list[tuple[str, str, Any]] = [
    ("", "method", "dreambooth"),
    ("", "data.images", "dog"),
    ("--repeats=3", "data.repeats", 3),
    ("--image_column=picture", "data.image_column", "picture"),
    ("--dataset_config_name=small", "data.dataset_config", "small"),
    ("--random_flip", "data.random_flip", True),
    ("", "dreambooth.instance_prompt", "a photo of sks dog"),
    ("--validation_prompt=sks", "preview.steps", 28),
    ("--validation_prompt=sks", "preview.guidance", 7.0),
    ("--num_validation_images=2", "preview.prompts", ()),
    ("--validation_epochs=3", "train.preview_every", 0),
    ("--train_text_encoder", "dreambooth.train_text_encoder", True),
    ("--train_text_encoder", "dreambooth.text_encoder_learning_rate", 5e-6),
    ("--train_text_encoder --text_encoder_lr=1e-5", "dreambooth.text_encoder_learning_rate", 1e-5),
    ("--train_text_encoder --optimizer=prodigy", "dreambooth.text_encoder_learning_rate", None),
    ("", "dreambooth.text_encoder_learning_rate", None),
    ("", f"{LEVELS}.distribution", "logit-normal"),
    ("--logit_mean=0.5 --logit_std=0.8", f"{LEVELS}.mean", -0.5),
    ("--logit_mean=0.5 --logit_std=0.8", f"{LEVELS}.spread", 0.8),
    ("", f"{LEVELS}.shift", None),
    ("--weighting_scheme=mode --mode_scale=0.8", f"{LEVELS}.distribution", "mode"),
    ("--weighting_scheme=mode --mode_scale=0.8", f"{LEVELS}.mode_scale", 0.8),
    ("--weighting_scheme=sigma_sqrt", f"{LEVELS}.distribution", "uniform"),
    ("--weighting_scheme=sigma_sqrt", "train.objective.weighting", "sigma-sqrt"),
    ("--weighting_scheme=cosmap", "train.objective.weighting", "cosmap"),
    ("", "train.objective.weighting", "none"),
    ("", "train.objective.measured", "clean"),
    ("--precondition_outputs=0", "train.objective.measured", "prediction"),
    ("", "train.optimizer.name", "adamw"),
    ("--use_8bit_adam", "train.optimizer.name", "adamw8bit"),
    ("--optimizer=Prodigy --use_8bit_adam", "train.optimizer.name", "prodigy"),
    ("--optimizer=prodigy", "train.optimizer.prodigy.bias_correction", True),
    ("--optimizer=prodigy", "train.optimizer.prodigy.safeguard_warmup", True),
    ("", "train.optimizer.prodigy.safeguard_warmup", False),
    ("--adam_weight_decay=0.1", "train.optimizer.weight_decay", 0.1),
    ("", "train.optimizer.weight_decay", 1e-4),
    ("", "adapter.targets", ("*.attn.*",)),
    ("--lora_layers=attn.to_q,attn.to_k", "adapter.targets", ("*.attn.to_q", "*.attn.to_k")),
    ("--lora_blocks=12,30", "adapter.targets",
     ("transformer.transformer_blocks.12.attn.*", "transformer.transformer_blocks.30.attn.*")),
    ("--rank=8", "adapter.rank", 8),
    ("--lora_dropout=0.1", "adapter.dropout", 0.1),
    ("", "train.optimizer.learning_rate", 1e-4),
    ("", "output", Path("sd3-dreambooth")),
    ("--max_train_steps=7", "train.steps", 7),
    ("", "train.steps", 5),
]  # fmt: skip


@pytest.mark.parametrize(("flags", "setting", "value"), ROWS)
def test_each_flag_becomes_its_setting(flags: str, setting: str, value: Any) -> None:
    assert at(config(*flags.split()), setting) == about(value)


def test_every_flag_is_in_a_table_or_shared() -> None:
    """Rows shared with the other commands are tested there."""
    shared = {flag.name for flag in load("train_dreambooth_lora").FLAGS}
    without_setting = {"dataset_name", "caption_column", "cache_dir", "max_sequence_length", "cache_latents"}
    without_setting |= {"upcast_before_saving", "adam_weight_decay_text_encoder"}
    without_setting |= {name for name in THEIRS if name.startswith("prodigy_")}
    assert set(THEIRS) <= shared | named_in(ROWS) | without_setting


def test_captions_of_a_dataset_take_the_place_of_the_prompt() -> None:
    found = run_config(script, [*NEEDED, "--dataset_name=owner/dogs", "--caption_column=said"])
    assert found.data.images == "owner/dogs" and found.data.caption_column == "said"
    assert found.dreambooth.instance_prompt is None


def test_targets_are_the_layers_that_diffusers_trains() -> None:
    """But for the last block's add_q_proj, which reaches nothing."""
    base = FAMILIES.get("sd3").tiny()
    found = set(resolve(base.roots, config().adapter.targets).layers)
    theirs = ("add_k_proj", "add_q_proj", "add_v_proj", "to_add_out", "to_k", "to_out.0", "to_q", "to_v")
    expected = {
        path
        for path in layers_of(base.roots)
        if path.startswith("transformer.") and path.endswith(tuple(f".attn.{name}" for name in theirs))
    }
    assert expected - found == {"transformer.transformer_blocks.2.attn.add_q_proj"} and found < expected


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ((*NEEDED,), "either --dataset_name"),
        ((*FOLDER, "--dataset_name=owner/dogs"), "either --dataset_name"),
        ((*FOLDER, "--optimizer=sgd"), "Use AdamW or prodigy"),
        ((*FOLDER, "--lora_blocks=first"), "give numbers of blocks"),
        ((*FOLDER, "--prodigy_beta3=0.9"), "prodigy_beta3"),
    ],
)
def test_what_can_not_be_honoured_is_refused(flags: tuple[str, ...], said: str) -> None:
    with pytest.raises(script.Refused, match=said):
        run_config(script, list(flags))


def test_notes_name_what_is_not_used() -> None:
    notes = " ".join(notes_of(script, *FOLDER, "--max_sequence_length=128", "--train_text_encoder"))
    assert "--max_sequence_length=128 is not used" in notes and "--adam_weight_decay_text_encoder" in notes
    assert notes_of(script, *FOLDER) == []


def test_the_whole_of_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(write_world(tmp_path, 2, family="sd3", pictures="dog", caption=None))
    flags = ("--train_text_encoder", "--validation_prompt=a dog", "--num_validation_images=1")
    found = trained(script, tmp_path, *FOLDER, *flags)
    assert found.dialect == "diffusers" and found.state.metadata.base_family == "sd3"
    assert found.state.roots == {"transformer", "text_encoder", "text_encoder_2"}
