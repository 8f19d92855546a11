"""The command people already have: each flag becomes what it should, and the whole of it runs."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.runs.worlds import drawn_by_diffusers, write_world
from tests.scripts.commands import (
    RUN_ROWS,
    WEIGHTS,
    about,
    at,
    defaults,
    launch,
    load,
    lose_the_end,
    named_in,
    notes_of,
    run_config,
)
from tests.scripts.theirs import CAPTIONED

THEIRS: dict[str, Any] = {
    **CAPTIONED,
    "resolution": 512,
}


script = load("train_text_to_image_lora")


def config(*flags: str, **world: Any) -> Any:
    named = any(flag.startswith(("--dataset_name", "--train_data_dir")) for flag in flags)
    folder = () if named else ("--train_data_dir=pictures",)
    return run_config(script, ["--pretrained_model_name_or_path=base", *folder, *flags], **world)


def test_the_flags_are_theirs_with_their_defaults() -> None:
    assert defaults(script) == THEIRS
    assert script.parser().parse_args(["--pretrained_model_name_or_path=x"]).__dict__ == {
        **THEIRS,
        "pretrained_model_name_or_path": "x",
    }


ROWS: list[tuple[str, str, Any]] = [
    *RUN_ROWS,
    ("--dataset_name=owner/pictures", "data.images", "owner/pictures"),
    ("--dataset_name=owner/pictures --train_data_dir=x", "data.images", "owner/pictures"),
    ("--dataset_name=imagefolder --train_data_dir=x", "data.images", "x"),
    ("--train_data_dir=x", "data.images", "x"),
    ("--dataset_config_name=small", "data.dataset_config", "small"),
    ("--image_column=picture", "data.image_column", "picture"),
    ("--caption_column=words", "data.caption_column", "words"),
    ("--validation_prompt=Totoro", "preview.prompts", ("Totoro",)),
    ("--validation_prompt=Totoro", "preview.count", 4),
    ("--validation_prompt=Totoro", "preview.steps", 30),
    ("--validation_prompt=Totoro --seed=1337", "preview.seed", 1337),
    ("--validation_prompt=x --num_validation_images=2", "preview.count", 2),
    ("--validation_prompt=x --validation_epochs=3 --train_batch_size=4", "train.preview_every", 15),
    ("--validation_epochs=3", "train.preview_every", 0),
    ("--max_train_samples=7", "data.max_samples", 7),
    ("", "output", Path("sd-model-finetuned-lora")),
    ("", "train.seed", 0),
    ("--random_flip", "data.random_flip", True),
    ("", "train.batch", 16),
    ("--num_train_epochs=5 --train_batch_size=4", "train.steps", 25),
    ("--scale_lr --learning_rate=1e-05 --train_batch_size=2 --gradient_accumulation_steps=4",
     "train.optimizer.learning_rate", 8e-5),
    ("--lr_scheduler=cosine", "train.schedule.warmup_steps", 500),
    ("--lr_scheduler=cosine --lr_warmup_steps=0", "train.schedule.warmup_steps", 0),
    ("--lr_scheduler=constant", "train.schedule.warmup_steps", 0),
    ("--snr_gamma=5.0", "train.objective.snr_gamma", 5.0),
    ("", "train.objective.snr_gamma", None),
    ("", "train.optimizer.name", "adamw"),
    ("--max_grad_norm=0.5", "train.max_grad_norm", 0.5),
    ("--hub_model_id=me/fox", "hub.push", False),
    ("--prediction_type=v_prediction", "prediction", "v_prediction"),
    ("", "train.precision", "no"),
    ("--report_to=wandb", "trackers", ("wandb",)),
    ("--report_to=all", "trackers", ("tensorboard", "wandb")),
    ("", "trackers", ("tensorboard",)),
    ("--noise_offset=0.1", "train.objective.noise_offset", 0.1),
    ("", "data.interpolation", "lanczos"),
]  # fmt: skip


@pytest.mark.parametrize(("flags", "path", "value"), ROWS)
def test_a_flag_becomes_its_setting(flags: str, path: str, value: Any) -> None:
    assert at(config(*flags.split()), path) == about(value)


#: flags that are no setting: what becomes of them is tested below or in a run
ELSEWHERE = {"cache_dir", "hub_token", "logging_dir", "local_rank", "resume_from_checkpoint"}
ELSEWHERE |= {"enable_xformers_memory_efficient_attention"}


def test_every_flag_has_a_row() -> None:
    assert named_in(ROWS) | ELSEWHERE == set(THEIRS)


def test_the_precision_is_the_flag_then_accelerate_then_none() -> None:
    launched = {"ACCELERATE_MIXED_PRECISION": "fp16"}
    assert config(environment=launched).train.precision == "fp16"
    assert config("--mixed_precision=no", environment=launched).train.precision == "no"


def test_epochs_are_counted_as_theirs() -> None:
    """20 pictures, 2 processes, batch 3, accumulation 2: 7 batches, 4 a process, 2 steps an epoch."""
    flags = ("--train_batch_size=3", "--gradient_accumulation_steps=2", "--num_train_epochs=10")
    assert config(*flags, processes=2).train.steps == 20
    assert config(*flags, "--scale_lr", processes=2).train.optimizer.learning_rate == pytest.approx(12e-4)


def test_what_is_installed_decides_what_all_trackers_are() -> None:
    assert config("--report_to=all", installed=lambda name: name != "wandb").trackers == ("tensorboard",)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--dataset_config_name=x"], "--dataset_name"),
        (["--train_data_dir=x", "--report_to=comet_ml"], "not supported"),
        (["--train_data_dir=x", "--report_to=wandb", "--hub_token=secret"], "hf auth login"),
    ],
)
def test_what_can_not_be_honoured_is_refused(flags: list[str], message: str) -> None:
    given = script.parser().parse_args(["--pretrained_model_name_or_path=base", *flags])
    with pytest.raises(script.Refused, match=message):
        script.translate(given, script.World())


def test_a_wrong_value_is_named_by_its_flag() -> None:
    from scumble.errors import ConfigError

    with pytest.raises(
        ConfigError, match=r'--lr_scheduler: train\.schedule\.name = "cosin": .*Did you mean "cosine"'
    ):
        config("--lr_scheduler=cosin")


def test_notes_say_what_is_otherwise() -> None:
    flags = ("--dataset_name=d", "--train_data_dir=x", "--enable_xformers_memory_efficient_attention")
    notes = notes_of(script, "--pretrained_model_name_or_path=b", *flags)
    assert len(notes) == 2 and "not used" in notes[0] and "scaled_dot_product_attention" in notes[1]


def test_a_checkpoint_is_found_however_its_path_is_spelled(tmp_path: Path) -> None:
    assert script.resume(None, tmp_path) is None
    assert script.resume("latest", tmp_path) is None, "nothing is there yet: a new run starts"
    (tmp_path / "checkpoint-500").mkdir()
    assert script.resume("latest", tmp_path) == "latest"
    assert script.resume("checkpoint-500", tmp_path) == tmp_path / "checkpoint-500"
    assert script.resume(str(tmp_path / "checkpoint-500"), Path("elsewhere")) == tmp_path / "checkpoint-500"
    assert script.resume("old/place/checkpoint-500/", tmp_path) == tmp_path / "checkpoint-500"


# -- whole runs, as a command ----------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny base on disk, and an image folder with metadata.jsonl."""
    return write_world(tmp_path_factory.mktemp("world"), size=(20, 18), wider=1)


def text_to_image(world: Path, *flags: str, **more: Any) -> subprocess.CompletedProcess[str]:
    return launch("train_text_to_image_lora", world, f"--train_data_dir={world / 'pictures'}", *flags, **more)


@pytest.mark.slow
def test_the_whole_command_runs_and_resumes(world: Path) -> None:
    out = world / "out"
    flags = [
        "--output_dir=out",
        "--center_crop",
        "--random_flip",
        "--gradient_accumulation_steps=2",
        "--learning_rate=1e-03",
        "--max_grad_norm=1",
        "--lr_scheduler=cosine",
        "--lr_warmup_steps=0",
        "--checkpointing_steps=2",
        "--checkpoints_total_limit=2",
        "--validation_prompt=Totoro",
        "--num_validation_images=1",
        "--validation_epochs=2",
        "--report_to=tensorboard",
    ]
    done = text_to_image(world, *flags, "--max_train_steps=6")
    assert done.returncode == 0, done.stderr
    names = {path.name for path in out.iterdir()}
    assert {"pytorch_lora_weights.safetensors", "README.md", "checkpoint-4", "checkpoint-6", "logs"} <= names
    assert "checkpoint-2" not in names
    assert list((out / "logs").rglob("events.out.tfevents.*"))
    card = (out / "README.md").read_text()
    assert "Totoro" in card and "| optimizer steps | 6 |" in card
    again = text_to_image(world, *flags, "--max_train_steps=6")
    assert again.returncode == 2 and "already holds" in again.stderr
    # The same run, cut after four steps and continued, gives the same file.
    weights = lose_the_end(out, "checkpoint-6", world)
    more = text_to_image(world, *flags, "--max_train_steps=6", "--resume_from_checkpoint=latest")
    assert more.returncode == 0, more.stderr
    assert (out / WEIGHTS).read_bytes() == weights


@pytest.mark.slow
def test_the_file_loads_in_unmodified_diffusers(world: Path) -> None:
    done = text_to_image(
        world, "--output_dir=loads", "--max_train_steps=2", "--report_to=none", "--learning_rate=0.01"
    )
    assert done.returncode == 0, done.stderr
    import torch

    bare, taught = (drawn_by_diffusers(world / "base", adapter) for adapter in (None, world / "loads"))
    assert not torch.equal(bare, taught)


@pytest.mark.slow
def test_accelerate_launch_decides_the_precision(world: Path) -> None:
    launcher = (
        "-m",
        "accelerate.commands.launch",
        "--num_processes=1",
        "--num_machines=1",
        "--dynamo_backend=no",
        "--cpu",
    )
    done = text_to_image(
        world, "--output_dir=half", "--max_train_steps=1", first=(*launcher, "--mixed_precision=fp16")
    )
    assert done.returncode != 0
    assert "fp16 needs a GPU" in done.stderr and "bf16" in done.stderr
    assert not (world / "half").exists(), "refused before anything was written"
    done = text_to_image(
        world,
        "--output_dir=brain",
        "--max_train_steps=2",
        "--report_to=none",
        first=(*launcher, "--mixed_precision=bf16"),
    )
    assert done.returncode == 0, done.stderr
    assert 'precision = "bf16"' in (world / "brain" / "run.toml").read_text()


@pytest.mark.slow
def test_a_push_goes_to_the_hub_and_a_failed_one_keeps_the_run(world: Path) -> None:
    from tests.runs.hub_server import TOKEN, running

    with running() as hub:
        environment = {
            "HF_ENDPOINT": hub.endpoint,
            "HF_HUB_DISABLE_XET": "1",
            "HF_TOKEN": TOKEN,
            "HF_HUB_OFFLINE": "0",
        }
        flags = ["--push_to_hub", "--max_train_steps=2", "--report_to=none", "--learning_rate=0.01"]
        done = text_to_image(
            world, *flags, "--output_dir=pushed", "--hub_model_id=painter/fox", environment=environment
        )
        assert done.returncode == 0, done.stderr
        there = hub.repos["painter/fox"]
        assert (
            there["pytorch_lora_weights.safetensors"]
            == (world / "pushed" / "pytorch_lora_weights.safetensors").read_bytes()
        )
        assert {"README.md", "run.toml", "report.html"} <= set(there)
        assert TOKEN.encode() not in b"".join(there.values())
        hub.failures = {"/commit/": 500}
        done = text_to_image(world, *flags, "--output_dir=kept", environment=environment)
        assert done.returncode == 0, "the training went well"
        assert "scumble push kept painter/kept" in done.stderr
        assert (world / "kept" / "pytorch_lora_weights.safetensors").exists()
        hub.failures = {"whoami": 401}
        done = text_to_image(world, *flags, "--output_dir=never", environment=environment)
        assert done.returncode == 2 and "hf auth login" in done.stderr
        assert not (world / "never").exists(), "asked before the first step"


@pytest.mark.slow
def test_two_processes_share_one_run(world: Path) -> None:
    """Accelerate's processes, over gloo: each sees its part, one writes."""
    launcher = ("-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone")
    flags = ("--output_dir=two", "--num_train_epochs=2", "--report_to=none", "--checkpointing_steps=2")
    done = text_to_image(world, *flags, "--scale_lr", first=launcher)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (world / "two" / "events.jsonl").read_text().splitlines()]
    (started,) = [row for row in rows if row["event"] == "Started"]
    assert started["total_steps"] == 4, "6 pictures, batch 2, 2 processes: 2 steps an epoch"
    steps = [row for row in rows if row["event"] == "StepDone"]
    assert [(row["step"], row["samples"]) for row in steps] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert steps[0]["learning_rates"] == {"unet": pytest.approx(4e-4)}
    assert [row["reason"] for row in rows if row["event"] == "Finished"] == ["complete"]
