"""Commands: the scripts as modules and as processes, and what their tests have in common."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from scumble.formats import read
from scumble.formats.codec import Read

ROOT = Path(__file__).parents[2]
WEIGHTS = "pytorch_lora_weights.safetensors"
NEEDED = ("--pretrained_model_name_or_path=base", "--instance_prompt=a photo of sks dog")
"""What DreamBooth's later commands ask for."""
FOLDER = (*NEEDED, "--instance_data_dir=dog")
"""The same with pictures."""

RUN_ROWS: list[tuple[str, str, Any]] = [
    ("--pretrained_model_name_or_path=owner/base", "base", "owner/base"),
    ("--revision=fp16", "revision", "fp16"),
    ("--variant=fp16", "variant", "fp16"),
    ("--num_validation_images=2", "preview.prompts", ()),
    ("--output_dir=out", "output", Path("out")),
    ("--seed=1337", "train.seed", 1337),
    ("--resolution=256", "data.resolution", 256),
    ("", "data.resolution", 512),
    ("--center_crop", "data.center_crop", True),
    ("", "data.center_crop", False),
    ("--train_batch_size=3", "train.batch", 3),
    ("--num_train_epochs=5 --max_train_steps=15000", "train.steps", 15000),
    ("--gradient_accumulation_steps=4", "train.accumulate", 4),
    ("--gradient_checkpointing", "train.gradient_checkpointing", True),
    ("--learning_rate=1e-05", "train.optimizer.learning_rate", 1e-5),
    ("--lr_scheduler=cosine", "train.schedule.name", "cosine"),
    ("--use_8bit_adam", "train.optimizer.name", "adamw8bit"),
    ("--allow_tf32", "train.tf32", True),
    ("--dataloader_num_workers=8", "data.workers", 8),
    ("--adam_beta1=0.8", "train.optimizer.betas", (0.8, 0.999)),
    ("--adam_beta2=0.99", "train.optimizer.betas", (0.9, 0.99)),
    ("--adam_weight_decay=0.1", "train.optimizer.weight_decay", 0.1),
    ("--adam_epsilon=1e-6", "train.optimizer.epsilon", 1e-6),
    ("--max_grad_norm=0", "train.max_grad_norm", None),
    ("--push_to_hub", "hub.push", True),
    ("--push_to_hub --hub_model_id=me/fox", "hub.id", "me/fox"),
    ("--mixed_precision=bf16", "train.precision", "bf16"),
    ("--report_to=none", "trackers", ()),
    ("--checkpointing_steps=100", "train.checkpoint_every", 100),
    ("--checkpoints_total_limit=2", "train.checkpoint_limit", 2),
    ("--rank=16", "adapter.rank", 16),
    ("--rank=16", "adapter.alpha", None),
    ("", "adapter.targets", "attention"),
    ("--image_interpolation_mode=bicubic", "data.interpolation", "bicubic"),
]
"""Flags of every command, what each becomes, and the value that it has then."""


def load(name: str) -> Any:
    """A script as a module."""
    spec = importlib.util.spec_from_file_location(f"scripts_{name}", ROOT / f"scripts/{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def values(script: Any, arguments: Sequence[str], **world: Any) -> dict[str, Any]:
    """Dotted setting -> value, as the flags say."""
    flags = script.parser().parse_args(arguments)
    return {".".join(given.path): given.value for given in script.translate(flags, script.World(**world))}


def run_config(script: Any, arguments: Sequence[str], **world: Any) -> Any:
    """What a command line means as a run; 20 pictures unless said otherwise."""
    from scumble.runs.config import RunConfig
    from scumble.runs.load import assemble

    flags = script.parser().parse_args(arguments)
    world = {"count": lambda data: 20, **world}
    return assemble(RunConfig, script.translate(flags, script.World(**world)))


def meaning(script: Any, given: Sequence[str]) -> Callable[..., Any]:
    """(more flags, what the world is) -> what they mean as a run, after those that are always given."""
    return lambda *flags, **world: run_config(script, [*given, *flags], **world)


def at(settings: Any, path: str) -> Any:
    """The setting of a dotted name."""
    for part in path.split("."):
        settings = getattr(settings, part)
    return settings


def about(value: Any) -> Any:
    """A float up to rounding, anything else as it is."""
    return pytest.approx(value) if isinstance(value, float) else value


def defaults(script: Any) -> dict[str, Any]:
    """Flag -> its default; `...` for a required one. None is there twice."""
    assert len({flag.name for flag in script.FLAGS}) == len(script.FLAGS)
    return {
        flag.name: ... if flag.required else (False if flag.type is None else flag.default)
        for flag in script.FLAGS
    }


def named_in(rows: Sequence[tuple[str, str, Any]]) -> set[str]:
    """The flags of a table of (flags, setting, value)."""
    return {part.split("=")[0].removeprefix("--") for flags, _, _ in rows for part in flags.split()}


def notes_of(script: Any, *flags: str) -> list[str]:
    """What a person is told of these flags."""
    notes: list[str] = script.COMMAND.notes(script.parser().parse_args(flags))
    return notes


def trained(script: Any, folder: Path, *flags: str) -> Read:
    """Train on 16x16 pixels in this process and `folder` with these flags; the adapter in `folder`/out."""
    done = script.main(
        [
            *(
                "--resolution=16",
                "--train_batch_size=2",
                "--max_train_steps=2",
                "--learning_rate=0.01",
                "--rank=2",
            ),
            *("--output_dir=out", "--report_to=none", *flags),
        ]
    )
    assert done == 0
    events = [json.loads(line) for line in (folder / "out/events.jsonl").read_text().splitlines()]
    assert sum("loss" in event for event in events) >= 2
    return read(folder / "out" / WEIGHTS)


def launch(
    script: str,
    world: Path,
    *flags: str,
    environment: Mapping[str, str] = {},
    first: tuple[str, ...] = (),
) -> subprocess.CompletedProcess[str]:
    """Run a script as a command, in `world` and on its base. `first`: what goes before it, such as a launcher."""
    command = [sys.executable, *first, str(ROOT / f"scripts/{script}.py")]
    command += [f"--pretrained_model_name_or_path={world / 'base'}", "--resolution=16"]
    command += ["--train_batch_size=2", "--seed=1337", *flags]
    surroundings = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(ROOT / "src"),
        **environment,
    }
    return subprocess.run(command, env=surroundings, capture_output=True, text=True, cwd=world, check=False)


def lose_the_end(out: Path, checkpoint: str, world: Path) -> bytes:
    """Take the last checkpoint and the adapter out of a run, as if it had been cut before them; the adapter's bytes."""
    weights = (out / WEIGHTS).read_bytes()
    for path in (out / checkpoint, out / WEIGHTS):
        path.rename(world / path.name)
    return weights
