#!/usr/bin/env python
"""The command people already have for training a LoRA on captioned pictures, with the same flags, on scumble.

    accelerate launch --mixed_precision="bf16" scripts/train_text_to_image_lora.py \\
        --pretrained_model_name_or_path=picturebook --train_data_dir=pictures/ --max_train_steps=500 \\
        --output_dir=out --validation_prompt="a red fox" --report_to=tensorboard --seed=1337

`FLAGS` is the whole translation: each row names a flag and what it becomes in our settings. The output folder is
laid out as expected: `pytorch_lora_weights.safetensors`, `checkpoint-N/`, `README.md`.

What behaves otherwise, on purpose:
  * `--max_grad_norm` clips.
  * The factor A of each layer starts from the Kaiming-uniform distribution (as in the LoRA paper's code and in
    peft's default), not from a narrow Gaussian; B starts at zero, so step 0 draws the base's pictures either way.
    alpha = rank.
  * Pictures and captions are encoded once and kept. Without `--center_crop`, four random crops of each picture
    are prepared and drawn from.
  * `--validation_epochs=N` draws after every N-th epoch (and at the end), not after the first, the (N+1)-th, ...
  * Without `--seed`, the seed is 0, so that a run can be continued.
  * A folder that already holds a run is not written over: continue with `--resume_from_checkpoint=latest`.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from scumble.runs.load import Given

Values = Mapping[str, object]
"""Dotted name of a setting -> value."""


@dataclass(frozen=True)
class World:
    """What a translation may ask about besides the flags."""

    processes: int = 1
    environment: Mapping[str, str] = field(default_factory=dict)
    count: Callable[[Values], int] = lambda values: 1
    """How many pictures the data settings give; asked only where epochs have to become steps."""
    installed: Callable[[str], bool] = lambda name: True
    """Whether a package is installed; asked only for `--report_to all`."""


class Refused(Exception):
    """A flag's value that can't be honoured: the text is for the person who typed it."""


@dataclass(frozen=True)
class Flag:
    """One flag: how it is typed, and what it becomes."""

    name: str
    help: str
    becomes: str | Callable[[Any, argparse.Namespace, World], Values]
    """The setting of the same value, or a function of (value, all flags, world) that gives settings."""
    type: Callable[[str], Any] | None = str
    """None: a switch, false unless given."""
    default: Any = None
    choices: Sequence[str] | None = None
    required: bool = False
    note: Callable[[Any, argparse.Namespace], str] = lambda value, flags: ""
    """A sentence to print when the flag's effect differs from what one might expect."""

    def settings(self, flags: argparse.Namespace, world: World) -> Values:
        """What this flag contributes. None says nothing and leaves the setting at its default."""
        value = getattr(flags, self.name)
        if not isinstance(self.becomes, str):
            return self.becomes(value, flags, world)
        return {} if value is None else {self.becomes: value}


def nothing(value: Any, flags: argparse.Namespace, world: World) -> Values:
    """For flags that another row reads, or that are no settings."""
    return {}


def data_source(value: Any, flags: argparse.Namespace, world: World) -> Values:
    name, folder = flags.dataset_name, flags.train_data_dir
    if name is None and folder is None:
        raise Refused(
            "Give --dataset_name (a dataset of the Hub or a folder) or --train_data_dir (a folder)."
        )
    return {"data.images": folder if name in (None, "imagefolder") else name}


def learning_rate(value: float, flags: argparse.Namespace, world: World) -> Values:
    if flags.scale_lr:
        value *= flags.gradient_accumulation_steps * flags.train_batch_size * world.processes
    return {"train.optimizer.learning_rate": value}


def warmup(value: int, flags: argparse.Namespace, world: World) -> Values:
    return {"train.schedule.warmup_steps": 0 if flags.lr_scheduler == "constant" else value}


def _epochs(epochs: float, flags: argparse.Namespace, world: World) -> int:
    from scumble.runs.arithmetic import steps_for_epochs

    data: dict[str, object] = {}
    for row in FLAGS:
        if isinstance(row.becomes, str) and row.becomes.startswith("data."):
            data |= row.settings(flags, world)
    pictures = world.count({**data, **data_source(None, flags, world)})
    return steps_for_epochs(
        epochs, pictures, flags.train_batch_size, flags.gradient_accumulation_steps, world.processes
    )


def steps(value: int | None, flags: argparse.Namespace, world: World) -> Values:
    return {"train.steps": value if value is not None else _epochs(flags.num_train_epochs, flags, world)}


def preview_every(value: int, flags: argparse.Namespace, world: World) -> Values:
    return {} if flags.validation_prompt is None else {"train.preview_every": _epochs(value, flags, world)}


def preview_prompt(value: str | None, flags: argparse.Namespace, world: World) -> Values:
    if value is None:
        return {}
    return {"preview.prompts": (value,), "preview.steps": 30, "preview.seed": flags.seed or 0}


def only_with_prompt(setting: str) -> Callable[[Any, argparse.Namespace, World], Values]:
    return lambda value, flags, world: {} if flags.validation_prompt is None else {setting: value}


def precision(value: str | None, flags: argparse.Namespace, world: World) -> Values:
    return {"train.precision": value or world.environment.get("ACCELERATE_MIXED_PRECISION") or "no"}


def trackers(value: str, flags: argparse.Namespace, world: World) -> Values:
    ours = ("tensorboard", "wandb")
    if value == "all":
        return {"trackers": tuple(name for name in ours if world.installed(name))}
    if value == "none":
        return {"trackers": ()}
    if value not in ours:
        raise Refused(f"--report_to={value} is not supported. Use tensorboard, wandb, all or none.")
    return {"trackers": (value,)}


def hub_id(value: str | None, flags: argparse.Namespace, world: World) -> Values:
    return {"hub.id": value} if flags.push_to_hub and value is not None else {}


def clip(value: float, flags: argparse.Namespace, world: World) -> Values:
    return {"train.max_grad_norm": value if value > 0 else None}


def beta(index: int) -> Callable[[Any, argparse.Namespace, World], Values]:
    """Both betas are one setting; the first flag sets it."""
    both = lambda value, flags, world: {"train.optimizer.betas": (flags.adam_beta1, flags.adam_beta2)}  # noqa: E731
    return both if index == 1 else nothing


FLAGS: tuple[Flag, ...] = (
    Flag(
        "pretrained_model_name_or_path",
        'Base model: a Hub id, a folder, a .safetensors checkpoint, or "picturebook".',
        "base",
        required=True,
    ),
    Flag("revision", "Branch, tag or commit of a Hub base.", "revision"),
    Flag("variant", "Variant of the base's weight files, e.g. fp16.", "variant"),
    Flag("dataset_name", "Dataset of the Hub, or a folder that holds one.", data_source),
    Flag("dataset_config_name", "Configuration of a dataset that has several.", "data.dataset_config"),
    Flag(
        "train_data_dir",
        "Folder of pictures with metadata.jsonl, .csv or a text file beside each. Unused with --dataset_name.",
        nothing,
        note=lambda value, flags: (
            "--train_data_dir is not used, since --dataset_name is given."
            if value is not None and flags.dataset_name not in (None, "imagefolder")
            else ""
        ),
    ),
    Flag("image_column", "Column with the picture.", "data.image_column", default="image"),
    Flag(
        "caption_column",
        "Column with the caption, or a list of captions.",
        "data.caption_column",
        default="text",
    ),
    Flag("validation_prompt", "Prompt to draw during and after training.", preview_prompt),
    Flag("num_validation_images", "Pictures of it at a time.", only_with_prompt("preview.count"), int, 4),
    Flag("validation_epochs", "Draw it every this many epochs, and at the end.", preview_every, int, 1),
    Flag("max_train_samples", "Train on this many pictures only.", "data.max_samples", int),
    Flag("output_dir", "Folder of the run.", "output", default="sd-model-finetuned-lora"),
    Flag("cache_dir", "Folder for downloaded bases and datasets.", nothing),
    Flag("seed", "Seed of all randomness. Unset: 0.", lambda v, f, w: {"train.seed": v or 0}, int),
    Flag("resolution", "Side of the square that is trained, in pixels.", "data.resolution", int, 512),
    Flag(
        "center_crop",
        "Cut the middle out of a picture that is not square, instead of a random part.",
        "data.center_crop",
        None,
        False,
    ),
    Flag("random_flip", "Mirror pictures at half of the visits.", "data.random_flip", None, False),
    Flag("train_batch_size", "Pictures in one forward pass of one process.", "train.batch", int, 16),
    Flag(
        "num_train_epochs",
        "How often all pictures are shown. Unused with --max_train_steps.",
        nothing,
        int,
        100,
    ),
    Flag("max_train_steps", "Optimizer steps.", steps, int),
    Flag("gradient_accumulation_steps", "Forward passes per optimizer step.", "train.accumulate", int, 1),
    Flag(
        "gradient_checkpointing",
        "Recompute activations in the backward pass: less memory, more time.",
        "train.gradient_checkpointing",
        None,
        False,
    ),
    Flag("learning_rate", "Learning rate after warm-up.", learning_rate, float, 1e-4),
    Flag("scale_lr", "Multiply the rate by processes, accumulation and batch size.", nothing, None, False),
    Flag(
        "lr_scheduler",
        "constant, constant_with_warmup, linear, cosine, cosine_with_restarts or polynomial.",
        "train.schedule.name",
        default="constant",
    ),
    Flag("lr_warmup_steps", "Steps of linear warm-up; constant has none.", warmup, int, 500),
    Flag("snr_gamma", "Min-SNR weighting; 5.0 is usual.", "train.objective.snr_gamma", float),
    Flag(
        "use_8bit_adam",
        "AdamW with 8-bit state, from bitsandbytes.",
        lambda v, f, w: {"train.optimizer.name": "adamw8bit" if v else "adamw"},
        None,
        False,
    ),
    Flag("allow_tf32", "TF32 matrix products on Ampere and later GPUs.", "train.tf32", None, False),
    Flag("dataloader_num_workers", "Threads that read pictures.", "data.workers", int, 0),
    Flag("adam_beta1", "Decay of the running mean of the gradient.", beta(1), float, 0.9),
    Flag("adam_beta2", "Decay of the running mean of its square.", beta(2), float, 0.999),
    Flag("adam_weight_decay", "Decoupled weight decay.", "train.optimizer.weight_decay", float, 1e-2),
    Flag("adam_epsilon", "Added to the denominator of the update.", "train.optimizer.epsilon", float, 1e-8),
    Flag("max_grad_norm", "Gradients are scaled down to this norm; 0 leaves them.", clip, float, 1.0),
    Flag("push_to_hub", "Upload the result to the Hub.", "hub.push", None, False),
    Flag("hub_token", "Token for it; better: `hf auth login`.", nothing),
    Flag("prediction_type", "What the base predicts. Unset: what its scheduler says.", "prediction"),
    Flag("hub_model_id", "Repository to upload to. Unset: the output folder's name.", hub_id),
    Flag("logging_dir", "Folder of TensorBoard's files, in the output folder.", nothing, default="logs"),
    Flag(
        "mixed_precision",
        "no, fp16 (GPU only) or bf16. Unset: what `accelerate launch` was told.",
        precision,
        choices=("no", "fp16", "bf16"),
    ),
    Flag("report_to", "tensorboard, wandb, all or none.", trackers, default="tensorboard"),
    Flag("local_rank", "Read from the environment by Accelerate; the flag is accepted.", nothing, int, -1),
    Flag("checkpointing_steps", "Steps between checkpoints.", "train.checkpoint_every", int, 500),
    Flag("checkpoints_total_limit", "Keep this many checkpoints.", "train.checkpoint_limit", int),
    Flag("resume_from_checkpoint", 'A checkpoint\'s folder, or "latest".', nothing),
    Flag(
        "enable_xformers_memory_efficient_attention",
        "Accepted. Attention is torch's own memory-efficient one anyway.",
        nothing,
        None,
        False,
        note=lambda value, flags: (
            "--enable_xformers_memory_efficient_attention: torch's scaled_dot_product_attention is used, "
            "which needs as little memory; xformers is not."
            if value
            else ""
        ),
    ),
    Flag(
        "noise_offset",
        "Strength of a constant per channel in the noise.",
        "train.objective.noise_offset",
        float,
        0,
    ),
    Flag("rank", "Rank of the LoRA; alpha is the same number.", "adapter.rank", int, 4),
    Flag(
        "image_interpolation_mode",
        "How pictures are resized.",
        "data.interpolation",
        default="lanczos",
        choices=("lanczos", "bicubic", "bilinear", "box", "hamming", "nearest", "nearest_exact"),
    ),
)


def parser() -> argparse.ArgumentParser:
    """The flags as argparse takes them."""
    parser = argparse.ArgumentParser(
        description="Train a LoRA of Stable Diffusion on captioned pictures.", allow_abbrev=False
    )
    for flag in FLAGS:
        if flag.type is None:
            parser.add_argument(f"--{flag.name}", action="store_true", help=flag.help)
        else:
            parser.add_argument(
                f"--{flag.name}",
                type=flag.type,
                default=flag.default,
                choices=flag.choices,
                required=flag.required,
                help=flag.help + ("" if flag.default is None else f" Default: {flag.default}."),
            )
    return parser


def translate(flags: argparse.Namespace, world: World) -> list[Given]:
    """Every flag's settings, each with the flag as its place.

    Raises:
        Refused: flags contradict each other, or ask for what there is not.
    """
    from scumble.runs.load import Given

    if flags.report_to in ("wandb", "all") and flags.hub_token is not None:
        raise Refused(
            "--hub_token with --report_to=wandb would put the token into the tracker's log of the command. "
            "Log in with `hf auth login` instead."
        )
    return [
        Given(tuple(name.split(".")), value, f"--{flag.name}")
        for flag in FLAGS
        for name, value in flag.settings(flags, world).items()
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Train; returns the exit code."""
    flags = parser().parse_args(arguments)
    os.environ.setdefault(
        "TRANSFORMERS_VERBOSITY", "error"
    )  # remarks on optional parts that are not used here
    if flags.cache_dir is not None:  # read by the libraries when they are imported
        os.environ["HF_HUB_CACHE"] = os.environ["HF_DATASETS_CACHE"] = flags.cache_dir
    from importlib.util import find_spec

    from scumble.errors import ScumbleError

    def count(data: Values) -> int:
        from scumble.data.settings import DataSettings
        from scumble.data.sources import open_dataset

        settings = DataSettings(**{name.removeprefix("data."): value for name, value in data.items()})  # type: ignore[arg-type]
        return sum(record.repeats for record in open_dataset(settings, seed=flags.seed or 0).records)

    world = World(
        processes=int(os.environ.get("WORLD_SIZE", 1)),
        environment=os.environ,
        count=count,
        installed=lambda name: find_spec(name) is not None,
    )
    try:
        from scumble.runs.config import RunConfig
        from scumble.runs.folder import Layout
        from scumble.runs.load import assemble
        from scumble.runs.train import train

        config = assemble(RunConfig, translate(flags, world))
        if int(os.environ.get("RANK", 0)) == 0:
            for flag in FLAGS:
                note = flag.note(getattr(flags, flag.name), flags)
                if note:
                    print(f"note: {note}", file=sys.stderr)
        train(
            config,
            resume=resume(flags.resume_from_checkpoint, Path(flags.output_dir)),
            layout=Layout(checkpoint="checkpoint-{step}", tensorboard=flags.logging_dir, strict=False),
            hub_token=flags.hub_token,
        )
    except (ScumbleError, Refused) as error:
        print(f"error: {error}", file=sys.stderr)
        return getattr(error, "exit_code", 2)
    return 0


def resume(value: str | None, output: Path) -> str | Path | None:
    """`latest`, or a checkpoint in the output folder however its path is spelled; None when there is none
    yet."""
    if value is None:
        return None
    if value == "latest":
        if not any(output.glob("checkpoint-*")):
            print(f"note: {output} holds no checkpoint yet; a new run starts.", file=sys.stderr)
            return None
        return "latest"
    given = Path(value)
    return given if given.is_dir() else output / given.name


if __name__ == "__main__":
    sys.exit(main())
