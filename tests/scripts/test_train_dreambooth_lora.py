"""The DreamBooth command people already have: each flag becomes what it should, and the whole of it runs."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.runs.worlds import write_world
from tests.scripts.commands import (
    RUN_ROWS,
    WEIGHTS,
    about,
    at,
    defaults,
    launch,
    load,
    lose_the_end,
    meaning,
    named_in,
    notes_of,
)
from tests.scripts.theirs import SUBJECT

THEIRS: dict[str, Any] = {
    **SUBJECT,
    "tokenizer_name": None,
    "instance_data_dir": ...,
    "output_dir": "lora-dreambooth-model",
    "resolution": 512,
    "learning_rate": 0.0005,
    "adam_weight_decay": 0.01,
    "enable_xformers_memory_efficient_attention": False,
    "pre_compute_text_embeddings": False,
    "tokenizer_max_length": None,
    "text_encoder_use_attention_mask": False,
    "validation_images": None,
    "class_labels_conditioning": None,
    "image_interpolation_mode": "lanczos",
}
REQUIRED = (
    "--pretrained_model_name_or_path=base",
    "--instance_data_dir=dog",
    "--instance_prompt=a photo of sks dog",
)
PRIOR = ("--with_prior_preservation", "--class_data_dir=dogs", "--class_prompt=a dog")


script = load("train_dreambooth_lora")


config = meaning(script, REQUIRED)


def test_the_flags_are_theirs_with_their_defaults() -> None:
    assert defaults(script) == THEIRS
    given = script.parser().parse_args([*REQUIRED])
    assert given.__dict__ == {**THEIRS, **{key: getattr(given, key) for key, v in THEIRS.items() if v is ...}}


ROWS: list[tuple[str, str, Any]] = [
    *RUN_ROWS,
    ("", "method", "dreambooth"),
    ("--instance_data_dir=cat", "data.images", "cat"),
    ("--instance_prompt=cat", "dreambooth.instance_prompt", "cat"),
    ("--instance_prompt=cat", "pictures.caption", "cat"),
    ("", "dreambooth.prior", "none"),
    ("--validation_prompt=sks", "preview.prompts", ("sks",)),
    ("--validation_prompt=sks", "preview.count", 4),
    ("--validation_prompt=sks", "preview.steps", 25),
    ("--validation_prompt=sks --seed=7", "preview.seed", 7),
    ("--validation_prompt=sks --num_validation_images=2", "preview.count", 2),
    ("--validation_prompt=sks --validation_epochs=3", "train.preview_every", 15),
    ("", "output", Path("lora-dreambooth-model")),
    ("--train_text_encoder", "dreambooth.train_text_encoder", True),
    ("", "dreambooth.train_text_encoder", False),
    ("--num_train_epochs=5", "train.steps", 25),
    ("", "train.steps", 5),
    ("", "train.optimizer.learning_rate", 5e-4),
    ("--scale_lr --learning_rate=1e-05", "train.optimizer.learning_rate", 4e-5),
    ("--lr_scheduler=cosine --lr_warmup_steps=9", "train.schedule.warmup_steps", 9),
    ("", "train.schedule.warmup_steps", 0),
    ("--lr_scheduler=cosine_with_restarts --lr_num_cycles=3", "train.schedule.cycles", 3),
    ("--lr_scheduler=polynomial --lr_power=2", "train.schedule.power", 2.0),
    ("--lora_dropout=0.1", "adapter.dropout", 0.1),
    ("--tokenizer_name=base", "base", "base"),
    ("--tokenizer_max_length=77", "base", "base"),
    ("--pre_compute_text_embeddings", "dreambooth.train_text_encoder", False),
]  # fmt: skip
WITH_PRIOR: list[tuple[str, str, Any]] = [
    ("--with_prior_preservation", "dreambooth.prior", "images"),
    ("--class_data_dir=cats", "dreambooth.class_images", "cats"),
    ("--class_prompt=cat", "dreambooth.class_prompt", "cat"),
    ("", "dreambooth.class_count", 100),
    ("--num_class_images=7", "dreambooth.class_count", 7),
    ("--prior_loss_weight=0.5", "dreambooth.prior_weight", 0.5),
    ("--sample_batch_size=9", "dreambooth.class_batch", 9),
    ("", "dreambooth.class_steps", 50),
    ("", "train.steps", 25),  # an epoch is as long as the larger set, here the 100 class pictures
]  # fmt: skip


@pytest.mark.parametrize(("flags", "path", "value"), ROWS)
def test_a_flag_becomes_its_setting(flags: str, path: str, value: Any) -> None:
    assert at(config(*flags.split()), path) == about(value)


@pytest.mark.parametrize(("flags", "path", "value"), WITH_PRIOR)
def test_a_flag_of_the_prior_becomes_its_setting(flags: str, path: str, value: Any) -> None:
    assert at(config(*PRIOR, *flags.split()), path) == about(value)


#: flags that are no setting: what becomes of them is tested below or in a run
ELSEWHERE = {"hub_token", "logging_dir", "local_rank", "resume_from_checkpoint", "prior_generation_precision"}
ELSEWHERE |= {"enable_xformers_memory_efficient_attention", "text_encoder_use_attention_mask"}
ELSEWHERE |= {"validation_images", "class_labels_conditioning"}


def test_every_flag_has_a_row() -> None:
    assert named_in([*ROWS, *WITH_PRIOR]) | ELSEWHERE == set(THEIRS)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--with_prior_preservation"], "--class_data_dir"),
        (["--with_prior_preservation", "--class_data_dir=x"], "--class_prompt"),
        (["--train_text_encoder", "--pre_compute_text_embeddings"], "one of them"),
        (["--tokenizer_name=other"], "other tokens"),
        (["--tokenizer_max_length=50"], "77 tokens"),
        (["--text_encoder_use_attention_mask"], "--text_encoder_use_attention_mask can't.*padding"),
        (["--validation_images", "a.png", "b.png"], "from a prompt"),
        (["--class_labels_conditioning=timesteps"], "=timesteps can't be honoured"),
        (["--report_to=comet_ml"], "not supported"),
        (["--report_to=wandb", "--hub_token=secret"], "hf auth login"),
    ],
)
def test_what_can_not_be_honoured_is_refused(flags: list[str], message: str) -> None:
    given = script.parser().parse_args([*REQUIRED, *flags])
    with pytest.raises(script.Refused, match=message):
        script.translate(given, script.World(count=lambda data: 20))


def test_notes_say_what_is_otherwise() -> None:
    flags = ["--class_data_dir=x", "--class_prompt=y", "--enable_xformers_memory_efficient_attention"]
    notes = notes_of(script, *REQUIRED, *flags)
    assert len(notes) == 3 and all("without --with_prior_preservation" in note for note in notes[:2])
    assert "scaled_dot_product_attention" in notes[2]
    notes = notes_of(script, *REQUIRED, *PRIOR, "--prior_generation_precision=fp16")
    assert len(notes) == 1 and "precision that it is trained in" in notes[0]


# -- whole runs, as a command ----------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny base on disk, and three pictures."""
    folder = tmp_path_factory.mktemp("world")
    return write_world(folder, 3, caption=None, pictures="dog", size=(20, 18), wider=1)


def dreambooth(world: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    given = (f"--instance_data_dir={world / 'dog'}", "--instance_prompt=a photo of sks dog")
    return launch("train_dreambooth_lora", world, *given, *flags)


@pytest.mark.slow
def test_the_whole_command_runs_and_resumes(world: Path) -> None:
    out = world / "out"
    flags = [
        "--output_dir=out",
        "--with_prior_preservation",
        "--class_data_dir=dogs",
        "--class_prompt=a dog",
        "--num_class_images=3",
        "--sample_batch_size=2",
        "--train_text_encoder",
        "--checkpointing_steps=2",
        "--validation_prompt=sks dog",
        "--num_validation_images=1",
        "--report_to=none",
        "--max_train_steps=4",
    ]
    done = dreambooth(world, *flags)
    assert done.returncode == 0, done.stderr
    names = {path.name for path in out.iterdir()}
    assert {"pytorch_lora_weights.safetensors", "README.md", "checkpoint-2", "checkpoint-4"} <= names
    assert len(list((world / "dogs").glob("*.png"))) == 3, "class pictures are drawn into their folder"
    from safetensors import safe_open

    with safe_open(out / "pytorch_lora_weights.safetensors", framework="pt") as file:
        assert {name.split(".")[0] for name in file.keys()} == {"unet", "text_encoder"}  # noqa: SIM118
    weights = lose_the_end(out, "checkpoint-4", world)
    more = dreambooth(world, *flags, "--resume_from_checkpoint=latest")
    assert more.returncode == 0, more.stderr
    assert (out / WEIGHTS).read_bytes() == weights
