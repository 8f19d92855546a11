"""The DreamBooth command for Stable Diffusion 3: each flag becomes what it should, and the whole of it runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from scumble.adapters.layers import layers_of
from scumble.adapters.targets import resolve
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
    "max_sequence_length": 77,
    "validation_prompt": None,
    "num_validation_images": 4,
    "validation_epochs": 50,
    "rank": 4,
    "lora_dropout": 0.0,
    "with_prior_preservation": False,
    "prior_loss_weight": 1.0,
    "num_class_images": 100,
    "output_dir": "sd3-dreambooth",
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
    "learning_rate": 1e-4,
    "text_encoder_lr": 5e-6,
    "scale_lr": False,
    "lr_scheduler": "constant",
    "lr_warmup_steps": 500,
    "lr_num_cycles": 1,
    "lr_power": 1.0,
    "dataloader_num_workers": 0,
    "weighting_scheme": "logit_normal",
    "logit_mean": 0.0,
    "logit_std": 1.0,
    "mode_scale": 1.29,
    "precondition_outputs": 1,
    "optimizer": "AdamW",
    "use_8bit_adam": False,
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "prodigy_beta3": None,
    "prodigy_decouple": True,
    "adam_weight_decay": 1e-4,
    "adam_weight_decay_text_encoder": 1e-3,
    "lora_layers": None,
    "lora_blocks": None,
    "adam_epsilon": 1e-8,
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
}
REQUIRED = ("--pretrained_model_name_or_path=base", "--instance_prompt=a photo of sks dog")
FOLDER = (*REQUIRED, "--instance_data_dir=dog")

script = load("train_dreambooth_lora_sd3")


def config(*flags: str, **world: Any) -> Any:
    return run_config(script, [*FOLDER, *flags], **world)


def test_the_flags_are_theirs_with_their_defaults() -> None:
    assert defaults(script) == THEIRS
    assert len({flag.name for flag in script.FLAGS}) == len(script.FLAGS)


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
    found = run_config(script, [*REQUIRED, "--dataset_name=owner/dogs", "--caption_column=said"])
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
        ((*REQUIRED,), "either --dataset_name"),
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
    flags = script.parser().parse_args([*FOLDER, "--max_sequence_length=128", "--train_text_encoder"])
    notes = " ".join(script.COMMAND.notes(flags))
    assert "--max_sequence_length=128 is not used" in notes and "--adam_weight_decay_text_encoder" in notes
    assert script.COMMAND.notes(script.parser().parse_args([*FOLDER])) == []


def test_the_whole_of_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import Image

    from scumble.models.tiny import save

    save("sd3", tmp_path / "base")
    (tmp_path / "dog").mkdir()
    for number in range(2):
        Image.new("RGB", (16, 16), (90 * number, 200, 90)).save(tmp_path / f"dog/{number}.png")
    monkeypatch.chdir(tmp_path)
    code = script.main(
        [
            *FOLDER, "--resolution=16", "--train_batch_size=2", "--max_train_steps=2", "--learning_rate=0.01",
            "--output_dir=out", "--train_text_encoder", "--validation_prompt=a dog", "--num_validation_images=1",
            "--report_to=none", "--rank=2",
        ]
    )  # fmt: skip
    assert code == 0
    found = read(tmp_path / "out" / WEIGHTS)
    assert found.dialect == "diffusers" and found.state.metadata.base_family == "sd3"
    roots = {path.partition(".")[0] for path in found.state.layers}
    assert roots == {"transformer", "text_encoder", "text_encoder_2"}
    events = [json.loads(line) for line in (tmp_path / "out/events.jsonl").read_text().splitlines()]
    assert sum("loss" in event for event in events) >= 2
