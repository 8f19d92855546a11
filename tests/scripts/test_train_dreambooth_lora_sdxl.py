"""The DreamBooth command for SDXL: each flag becomes what it should, and the whole of it runs."""

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
    "instance_data_dir": None,
    "cache_dir": None,
    "image_column": "image",
    "caption_column": None,
    "repeats": 1,
    "class_data_dir": None,
    "instance_prompt": ...,
    "class_prompt": None,
    "validation_prompt": None,
    "num_validation_images": 4,
    "validation_epochs": 50,
    "do_edm_style_training": False,
    "with_prior_preservation": False,
    "prior_loss_weight": 1.0,
    "num_class_images": 100,
    "output_dir": "lora-dreambooth-model",
    "output_kohya_format": False,
    "seed": None,
    "resolution": 1024,
    "center_crop": False,
    "random_flip": False,
    "train_text_encoder": False,
    "train_batch_size": 4,
    "sample_batch_size": 4,
    "num_train_epochs": 1,
    "max_train_steps": None,
    "checkpointing_steps": 500,
    "checkpoints_total_limit": None,
    "resume_from_checkpoint": None,
    "gradient_accumulation_steps": 1,
    "gradient_checkpointing": False,
    "learning_rate": 1e-4,
    "text_encoder_lr": 5e-6,
    "scale_lr": False,
    "lr_scheduler": "constant",
    "snr_gamma": None,
    "lr_warmup_steps": 500,
    "lr_num_cycles": 1,
    "lr_power": 1.0,
    "dataloader_num_workers": 0,
    "optimizer": "AdamW",
    "use_8bit_adam": False,
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "prodigy_beta3": None,
    "prodigy_decouple": True,
    "adam_weight_decay": 1e-4,
    "adam_weight_decay_text_encoder": 1e-3,
    "adam_epsilon": 1e-8,
    "prodigy_use_bias_correction": True,
    "prodigy_safeguard_warmup": True,
    "max_grad_norm": 1.0,
    "push_to_hub": False,
    "hub_token": None,
    "hub_model_id": None,
    "logging_dir": "logs",
    "allow_tf32": False,
    "report_to": "tensorboard",
    "mixed_precision": None,
    "prior_generation_precision": None,
    "local_rank": -1,
    "enable_xformers_memory_efficient_attention": False,
    "rank": 4,
    "lora_dropout": 0.0,
    "use_dora": False,
    "image_interpolation_mode": "lanczos",
}
REQUIRED = ("--pretrained_model_name_or_path=base", "--instance_prompt=a photo of sks dog")
FOLDER = (*REQUIRED, "--instance_data_dir=dog")
PRIOR = "--with_prior_preservation --class_data_dir=dogs --class_prompt=dog"

script = load("train_dreambooth_lora_sdxl")


def config(*flags: str, **world: Any) -> Any:
    return run_config(script, [*FOLDER, *flags], **world)


def test_the_flags_are_theirs_with_their_defaults() -> None:
    assert defaults(script) == THEIRS
    assert len({flag.name for flag in script.FLAGS}) == len(script.FLAGS)


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
        ((*REQUIRED,), "either --dataset_name"),
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
    from tests.runs.worlds import write_world

    write_world(tmp_path, 2, family="sdxl", pictures="dog", caption=None)
    monkeypatch.chdir(tmp_path)
    code = script.main(
        [
            *FOLDER, *PRIOR.split(), "--num_class_images=2", "--resolution=16", "--train_batch_size=2",
            "--max_train_steps=2", "--learning_rate=0.01", "--output_dir=out", "--train_text_encoder",
            "--output_kohya_format", "--report_to=none", "--rank=2",
        ]
    )  # fmt: skip
    assert code == 0
    found = read(tmp_path / "out" / WEIGHTS)
    assert len(list((tmp_path / "dogs").glob("*.png"))) == 2
    roots = {path.partition(".")[0] for path in found.state.layers}
    assert roots == {"unet", "text_encoder", "text_encoder_2"}
    also = read(tmp_path / "out" / "pytorch_lora_weights_kohya.safetensors", list(found.state.layers))
    assert also.dialect == "kohya" and also.state.layers.keys() == found.state.layers.keys()
