"""The command people have for textual inversion: every flag is there, and means what it says."""

from __future__ import annotations

import re
from typing import Any

import pytest

from tests.scripts.commands import load, run_config, values

script = load("textual_inversion")

THEIRS = re.findall(
    r"\w+",
    """
    save_steps save_as_full_pipeline num_vectors pretrained_model_name_or_path revision variant tokenizer_name
    train_data_dir placeholder_token initializer_token learnable_property repeats output_dir seed resolution
    center_crop train_batch_size num_train_epochs max_train_steps gradient_accumulation_steps
    gradient_checkpointing learning_rate scale_lr lr_scheduler lr_warmup_steps lr_num_cycles
    dataloader_num_workers adam_beta1 adam_beta2 adam_weight_decay adam_epsilon push_to_hub hub_token
    hub_model_id logging_dir mixed_precision allow_tf32 report_to validation_prompt num_validation_images
    validation_steps validation_epochs local_rank checkpointing_steps checkpoints_total_limit
    resume_from_checkpoint enable_xformers_memory_efficient_attention no_safe_serialization
    """,
)

NEEDED = [
    "--pretrained_model_name_or_path=picturebook",
    "--train_data_dir=cat",
    "--placeholder_token=<cat-toy>",
    "--initializer_token=toy",
]


def settings(*more: str, **world: Any) -> dict[str, Any]:
    return values(script, [*NEEDED, *more], **world)


def test_every_flag_is_there_once() -> None:
    names = [flag.name for flag in script.FLAGS]
    assert sorted(names) == sorted(set(names))
    assert set(THEIRS) - {"variant"} <= set(names) and set(names) <= set(THEIRS) | {"variant"}


def test_the_defaults_are_theirs() -> None:
    found = settings()
    assert found["method"] == "textual-inversion"
    assert found["textual_inversion.placeholders"] == "<cat-toy>"
    assert found["textual_inversion.initial"] == "toy" and found["textual_inversion.vectors"] == 1
    assert found["textual_inversion.learns"] == "object"
    assert (found["train.steps"], found["train.batch"], found["train.optimizer.learning_rate"]) == (
        5000,
        16,
        1e-4,
    )
    assert (found["data.images"], found["data.repeats"], found["data.random_flip"]) == ("cat", 100, True)
    assert found["train.max_grad_norm"] is None and found["data.interpolation"] == "bicubic"
    assert found["output"] == "text-inversion-model" and "train.preview_every" not in found


def test_flags_become_settings() -> None:
    found = settings(
        *("--num_vectors=4", "--learnable_property=style", "--max_train_steps=30", "--scale_lr"),
        *("--gradient_accumulation_steps=2", "--train_batch_size=3", "--learning_rate=1e-3"),
        *("--save_steps=10", "--validation_prompt=a <cat-toy>", "--validation_steps=15", "--lr_num_cycles=3"),
        processes=2,
    )
    assert (found["textual_inversion.vectors"], found["textual_inversion.learns"]) == (4, "style")
    assert found["train.optimizer.learning_rate"] == pytest.approx(1e-3 * 2 * 3 * 2)
    assert (found["train.checkpoint_every"], found["train.preview_every"]) == (10, 15)
    assert found["preview.prompts"] == ("a <cat-toy>",) and found["train.schedule.cycles"] == 3


def test_they_are_a_run() -> None:
    config = run_config(script, [*NEEDED, "--resolution=64"])
    assert config.options.placeholders == ("<cat-toy>",)
    assert config.pictures is not None and config.pictures.caption == "<cat-toy>"
    assert (
        all("{caption}" in one for one in config.pictures.templates) and len(config.pictures.templates) > 10
    )


def test_epochs_of_pictures_become_steps() -> None:
    found = settings(
        *("--validation_prompt=x", "--validation_epochs=2", "--train_batch_size=4"), count=lambda data: 8
    )
    assert found["train.preview_every"] == 4


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("--save_as_full_pipeline", "pipe.save_pretrained"),
        ("--no_safe_serialization", "pickles are not written"),
        ("--learnable_property=person", "neither object nor style"),
        ("--tokenizer_name=other", "other tokens"),
    ],
)
def test_what_can_not_be_honoured_is_refused(flag: str, said: str) -> None:
    with pytest.raises(script.Refused, match=said):
        settings(flag)
