"""The command for SDXL on captioned pictures: each flag becomes what it should, and the whole of it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from scumble.formats import read
from tests.scripts.commands import WEIGHTS, about, at, defaults, load, named_in, run_config

#: every flag of diffusers 0.42's script with its default; `...` for a required one
THEIRS: dict[str, Any] = {
    "pretrained_model_name_or_path": ...,
    "pretrained_vae_model_name_or_path": None,
    "revision": None,
    "variant": None,
    "dataset_name": None,
    "dataset_config_name": None,
    "train_data_dir": None,
    "image_column": "image",
    "caption_column": "text",
    "validation_prompt": None,
    "num_validation_images": 4,
    "validation_epochs": 1,
    "max_train_samples": None,
    "output_dir": "sd-model-finetuned-lora",
    "cache_dir": None,
    "seed": None,
    "resolution": 1024,
    "center_crop": False,
    "random_flip": False,
    "train_text_encoder": False,
    "train_batch_size": 16,
    "num_train_epochs": 100,
    "max_train_steps": None,
    "checkpointing_steps": 500,
    "checkpoints_total_limit": None,
    "resume_from_checkpoint": None,
    "gradient_accumulation_steps": 1,
    "gradient_checkpointing": False,
    "learning_rate": 1e-4,
    "scale_lr": False,
    "lr_scheduler": "constant",
    "lr_warmup_steps": 500,
    "snr_gamma": None,
    "allow_tf32": False,
    "dataloader_num_workers": 0,
    "use_8bit_adam": False,
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "adam_weight_decay": 1e-2,
    "adam_epsilon": 1e-08,
    "max_grad_norm": 1.0,
    "push_to_hub": False,
    "hub_token": None,
    "prediction_type": None,
    "hub_model_id": None,
    "logging_dir": "logs",
    "report_to": "tensorboard",
    "mixed_precision": None,
    "local_rank": -1,
    "enable_xformers_memory_efficient_attention": False,
    "enable_npu_flash_attention": False,
    "noise_offset": 0,
    "rank": 4,
    "debug_loss": False,
    "image_interpolation_mode": "lanczos",
}
GIVEN = ("--pretrained_model_name_or_path=base", "--train_data_dir=pictures")

script = load("train_text_to_image_lora_sdxl")


def config(*flags: str, **world: Any) -> Any:
    return run_config(script, [*GIVEN, *flags], **world)


def test_the_flags_are_theirs_with_their_defaults() -> None:
    assert defaults(script) == THEIRS
    assert len({flag.name for flag in script.FLAGS}) == len(script.FLAGS)


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
    flags = script.parser().parse_args([*GIVEN, "--pretrained_vae_model_name_or_path=madebyollin/fix"])
    (note,) = script.COMMAND.notes(flags)
    assert "madebyollin/fix is not used" in note and "fp32" in note
    assert script.COMMAND.notes(script.parser().parse_args([*GIVEN])) == []


def test_the_whole_of_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.runs.worlds import write_world

    write_world(tmp_path, 3, family="sdxl", wider=4, size=(20, 16))
    monkeypatch.chdir(tmp_path)
    code = script.main(
        [
            *GIVEN, "--resolution=16", "--train_batch_size=2", "--max_train_steps=2", "--learning_rate=0.01",
            "--random_flip", "--output_dir=out", "--train_text_encoder", "--validation_prompt=a colour",
            "--num_validation_images=1", "--report_to=none", "--rank=2",
        ]
    )  # fmt: skip
    assert code == 0
    found = read(tmp_path / "out" / WEIGHTS)
    assert found.dialect == "diffusers" and found.state.metadata.base_family == "sdxl"
    roots = {path.partition(".")[0] for path in found.state.layers}
    assert roots == {"unet", "text_encoder", "text_encoder_2"}
