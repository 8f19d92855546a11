"""The DreamBooth command people already have for Flux.1: each flag becomes what it should, and the whole of it runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from scumble.adapters import resolve
from scumble.formats import read
from scumble.models import FAMILIES
from tests.scripts.commands import WEIGHTS, about, at, defaults, load, named_in, run_config

#: every flag of diffusers 0.42's script with its default; `...` for a required one
THEIRS: dict[str, Any] = {
    "pretrained_model_name_or_path": ...,
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
    "max_sequence_length": 512,
    "validation_prompt": None,
    "num_validation_images": 4,
    "validation_epochs": 50,
    "rank": 4,
    "lora_alpha": 4,
    "lora_dropout": 0.0,
    "with_prior_preservation": False,
    "prior_loss_weight": 1.0,
    "num_class_images": 100,
    "output_dir": "flux-dreambooth-lora",
    "seed": None,
    "resolution": 512,
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
    "learning_rate": 0.0001,
    "guidance_scale": 3.5,
    "text_encoder_lr": 5e-06,
    "scale_lr": False,
    "lr_scheduler": "constant",
    "lr_warmup_steps": 500,
    "lr_num_cycles": 1,
    "lr_power": 1.0,
    "dataloader_num_workers": 0,
    "weighting_scheme": "none",
    "logit_mean": 0.0,
    "logit_std": 1.0,
    "mode_scale": 1.29,
    "optimizer": "AdamW",
    "use_8bit_adam": False,
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "prodigy_beta3": None,
    "prodigy_decouple": True,
    "adam_weight_decay": 0.0001,
    "adam_weight_decay_text_encoder": 0.001,
    "lora_layers": None,
    "adam_epsilon": 1e-08,
    "prodigy_use_bias_correction": True,
    "prodigy_safeguard_warmup": True,
    "max_grad_norm": 1.0,
    "push_to_hub": False,
    "hub_token": None,
    "hub_model_id": None,
    "logging_dir": "logs",
    "allow_tf32": False,
    "cache_latents": False,
    "report_to": "tensorboard",
    "mixed_precision": None,
    "upcast_before_saving": False,
    "prior_generation_precision": None,
    "local_rank": -1,
    "enable_npu_flash_attention": False,
}
REQUIRED = ("--pretrained_model_name_or_path=base", "--instance_prompt=a photo of sks dog")
FOLDER = (*REQUIRED, "--instance_data_dir=dog")

script = load("train_dreambooth_lora_flux")


def config(*flags: str, **world: Any) -> Any:
    return run_config(script, [*FOLDER, *flags], **world)


def test_the_flags_are_theirs_with_their_defaults() -> None:
    assert defaults(script) == THEIRS
    assert len({flag.name for flag in script.FLAGS}) == len(script.FLAGS)


ROWS: list[tuple[str, str, Any]] = [
    ("", "method", "dreambooth"),
    ("", "data.images", "dog"),
    ("", "dreambooth.instance_prompt", "a photo of sks dog"),
    ("--validation_prompt=sks", "preview.steps", 28),
    ("--validation_prompt=sks", "preview.guidance", None),
    ("--train_text_encoder", "dreambooth.train_text_encoder", True),
    ("--train_text_encoder", "dreambooth.text_encoder_learning_rate", 5e-6),
    ("", "train.objective.guidance", 3.5),
    ("--guidance_scale=1", "train.objective.guidance", 1.0),
    ("", "train.objective.timesteps.distribution", "uniform"),
    ("", "train.objective.timesteps.shift", None),
    ("--weighting_scheme=logit_normal --logit_mean=0.5", "train.objective.timesteps.mean", -0.5),
    ("--weighting_scheme=mode --mode_scale=0.8", "train.objective.timesteps.mode_scale", 0.8),
    ("--weighting_scheme=sigma_sqrt", "train.objective.weighting", "sigma-sqrt"),
    ("", "train.objective.weighting", "none"),
    ("", "train.objective.measured", "prediction"),
    ("--optimizer=Prodigy --use_8bit_adam", "train.optimizer.name", "prodigy"),
    ("", "train.optimizer.weight_decay", 1e-4),
    ("--lora_layers=attn.to_q,attn.to_k", "adapter.targets", ("*.attn.to_q", "*.attn.to_k")),
    ("--rank=16", "adapter.rank", 16),
    ("--rank=16", "adapter.alpha", 4.0),
    ("--rank=16 --lora_alpha=8", "adapter.alpha", 8.0),
    ("", "train.optimizer.learning_rate", 1e-4),
    ("", "output", Path("flux-dreambooth-lora")),
    ("", "train.steps", 5),
]  # fmt: skip


@pytest.mark.parametrize(("flags", "setting", "value"), ROWS)
def test_each_flag_becomes_its_setting(flags: str, setting: str, value: Any) -> None:
    assert at(config(*flags.split()), setting) == about(value)


def test_every_flag_is_in_a_table_or_shared() -> None:
    """Rows shared with the other commands are tested there."""
    shared = {flag.name for flag in load("train_dreambooth_lora_sd3").FLAGS}
    assert set(THEIRS) <= shared | named_in(ROWS) | {"enable_npu_flash_attention"}


def test_class_pictures_are_drawn_as_the_pipeline_draws() -> None:
    found = config("--with_prior_preservation", "--class_data_dir=dogs", "--class_prompt=a dog")
    assert found.dreambooth.prior == "images"
    assert (found.dreambooth.class_steps, found.dreambooth.class_guidance) == (28, None)


def test_a_base_that_is_told_no_guidance_gets_none() -> None:
    assert config("--guidance_scale=2", guided=lambda flags: False).train.objective.guidance is None


def test_targets_are_the_layers_that_diffusers_trains() -> None:
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists

    base = FAMILIES.get("flux").tiny()
    layers = LoraConfig(target_modules=[name.removeprefix("*.") for name in config().adapter.targets])
    expected = {
        f"transformer.{name}"
        for name, _ in base.denoiser.named_modules()
        if check_target_module_exists(layers, name)
    }
    assert set(resolve(base.roots, config().adapter.targets).layers) == expected


def test_notes_name_what_is_not_used() -> None:
    flags = script.parser().parse_args([*FOLDER, "--max_sequence_length=128", "--enable_npu_flash_attention"])
    notes = " ".join(script.COMMAND.notes(flags))
    assert "--max_sequence_length=128 is not used" in notes and "--enable_npu_flash_attention" in notes
    assert script.COMMAND.notes(script.parser().parse_args([*FOLDER])) == []


def test_the_whole_of_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import Image

    from scumble.models.tiny import save

    save("flux", tmp_path / "base")
    (tmp_path / "dog").mkdir()
    for number in range(2):
        Image.new("RGB", (16, 16), (90 * number, 200, 90)).save(tmp_path / f"dog/{number}.png")
    monkeypatch.chdir(tmp_path)
    code = script.main(
        [
            *FOLDER, "--resolution=16", "--train_batch_size=2", "--max_train_steps=2", "--learning_rate=0.01",
            "--output_dir=out", "--train_text_encoder", "--validation_prompt=a dog", "--num_validation_images=1",
            "--report_to=none", "--rank=2", "--guidance_scale=1", "--text_encoder_lr=0.01",
        ]
    )  # fmt: skip
    assert code == 0
    found = read(tmp_path / "out" / WEIGHTS)
    assert found.dialect == "diffusers" and found.state.metadata.base_family == "flux"
    assert {path.partition(".")[0] for path in found.state.layers} == {"transformer", "text_encoder"}
    events = [json.loads(line) for line in (tmp_path / "out/events.jsonl").read_text().splitlines()]
    assert sum("loss" in event for event in events) >= 2
