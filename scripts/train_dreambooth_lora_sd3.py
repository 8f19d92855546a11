#!/usr/bin/env python
"""The command people already have for DreamBooth on Stable Diffusion 3 and 3.5, with the same flags, on scumble.

    accelerate launch --mixed_precision="bf16" scripts/train_dreambooth_lora_sd3.py \\
        --pretrained_model_name_or_path=stabilityai/stable-diffusion-3.5-medium --instance_data_dir=dog/ \\
        --instance_prompt="a photo of sks dog" --resolution=512 --max_train_steps=500 --output_dir=out

`FLAGS` is the whole translation: each row names a flag and what it becomes in our settings.

What behaves otherwise, on purpose, beside what `train_dreambooth_lora.py` says:
  * T5 reads 256 tokens while training too, as it does when the pipeline draws; `--max_sequence_length` is accepted.
  * Noise levels are continuous; the script's are the thousand of the schedule.
  * One weight decay holds for the whole adapter: that of `--adam_weight_decay`.
  * Latents and text embeddings are kept whenever they don't change, with `--cache_latents` or without.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))  # already there when this file is run, not when it is imported

from flags import (
    Command,
    Flag,
    Refused,
    Values,
    World,
    base_flags,
    changed,
    in_steps,
    lora_flags,
    nothing,
    only,
    only_with_prompt,
    preview_every,
    preview_prompt,
    resume,
    run_flags,
)
from train_dreambooth_lora import FLAGS as DREAMBOOTH

_ROWS = {flag.name: flag for flag in DREAMBOOTH}
_WINDOW = 256


def data_source(value: Any, flags: argparse.Namespace, world: World) -> Values:
    if (flags.dataset_name is None) == (flags.instance_data_dir is None):
        raise Refused(
            "Give either --dataset_name (a dataset of the Hub or a folder) or --instance_data_dir (a folder)."
        )
    return {"data.images": flags.dataset_name or flags.instance_data_dir}


def captions(flags: argparse.Namespace) -> bool:
    """Whether the dataset says what is on each picture."""
    return flags.caption_column is not None and flags.dataset_name is not None


def instance_prompt(value: str, flags: argparse.Namespace, world: World) -> Values:
    return {} if captions(flags) else {"dreambooth.instance_prompt": value}


def caption_column(value: str | None, flags: argparse.Namespace, world: World) -> Values:
    return {"data.caption_column": value} if captions(flags) else {}


def _epochs(epochs: float, flags: argparse.Namespace, world: World) -> int:
    """An epoch is as long as the larger of both sets of pictures."""
    said = {} if captions(flags) else {"data.caption": flags.instance_prompt}
    images = data_source(None, flags, world)
    pictures = world.count(
        {**COMMAND.data(flags, world), **caption_column(flags.caption_column, flags, world), **images, **said}
    )
    if flags.with_prior_preservation:
        pictures = max(pictures, flags.num_class_images)
    return in_steps(epochs, pictures, flags, world)


def layers(value: str | None, flags: argparse.Namespace, world: World) -> Values:
    """Which layers: `--lora_layers`, or those of joint attention, in `--lora_blocks` or everywhere."""
    names = ["attn.*"] if value is None else [name.strip() for name in value.split(",")]
    try:
        blocks = [] if flags.lora_blocks is None else [int(block) for block in flags.lora_blocks.split(",")]
    except ValueError as error:
        raise Refused(
            f"--lora_blocks={flags.lora_blocks} can't be read: give numbers of blocks, e.g. 12,30."
        ) from error
    places = [f"transformer.transformer_blocks.{block}" for block in blocks] or ["*"]
    return {"adapter.targets": tuple(f"{place}.{name}" for place in places for name in names)}


def optimizer(value: str, flags: argparse.Namespace, world: World) -> Values:
    name = value.lower()
    if name not in ("adamw", "prodigy"):
        raise Refused(f"--optimizer={value} is not supported. Use AdamW or prodigy.")
    return {"train.optimizer.name": "adamw8bit" if flags.use_8bit_adam and name == "adamw" else name}


def of_prodigy(setting: str) -> Any:
    return lambda value, flags, world: {setting: value} if flags.optimizer.lower() == "prodigy" else {}


def text_encoder_rate(value: float, flags: argparse.Namespace, world: World) -> Values:
    if not flags.train_text_encoder or flags.optimizer.lower() == "prodigy":
        return {}
    return {"dreambooth.text_encoder_learning_rate": value or flags.learning_rate}


def weighting(value: str, flags: argparse.Namespace, world: World) -> Values:
    """Levels are drawn by two of the schemes, and errors weighed by the two others."""
    levels = "train.objective.timesteps."
    if value == "logit_normal":
        # diffusers counts levels from noise, we from clean: the mean has the other sign
        return {
            f"{levels}distribution": "logit-normal",
            f"{levels}mean": -flags.logit_mean,
            f"{levels}spread": flags.logit_std,
        }
    if value == "mode":
        return {f"{levels}distribution": "mode", f"{levels}mode_scale": flags.mode_scale}
    return {f"{levels}distribution": "uniform", "train.objective.weighting": value.replace("_", "-")}


def validation(value: str | None, flags: argparse.Namespace, world: World) -> Values:
    found = preview_prompt(28)(value, flags, world)
    return {**found, "preview.guidance": 7.0} if found else {}


def given_otherwise(name: str, usual: Any, why: str) -> Any:
    return lambda value, flags: "" if value in usual else f"--{name}={value} is not used: {why}."


FLAGS: tuple[Flag, ...] = (
    *base_flags(),
    Flag("dataset_name", "Dataset of the Hub, or a folder that holds one.", data_source),
    Flag("dataset_config_name", "Configuration of a dataset that has several.", "data.dataset_config"),
    Flag("instance_data_dir", "Folder of pictures of the subject.", nothing),
    Flag("cache_dir", "Folder for downloaded bases and datasets.", nothing),
    Flag("image_column", "Column with the picture.", "data.image_column", default="image"),
    Flag(
        "caption_column",
        "Column of --dataset_name with the caption of each picture. Unset: --instance_prompt is that of all.",
        caption_column,
        note=lambda value, flags: (
            "--caption_column is not used without --dataset_name."
            if value is not None and not captions(flags)
            else ""
        ),
    ),
    Flag("repeats", "How often each picture counts in an epoch.", "data.repeats", int, 1),
    _ROWS["class_data_dir"],
    Flag(
        "instance_prompt",
        "Caption of every picture of the subject, with a rare word for it. Unused with --caption_column.",
        instance_prompt,
        required=True,
    ),
    _ROWS["class_prompt"],
    Flag(
        "max_sequence_length",
        f"Accepted. T5 reads {_WINDOW} tokens, as it does when the pipeline draws.",
        nothing,
        int,
        77,
        note=given_otherwise("max_sequence_length", (77, _WINDOW), f"T5 reads {_WINDOW} tokens"),
    ),
    Flag("validation_prompt", "Prompt to draw during and after training.", validation),
    Flag("num_validation_images", "Pictures of it at a time.", only_with_prompt("preview.count"), int, 4),
    Flag(
        "validation_epochs",
        "Draw it every this many epochs, and at the end.",
        preview_every(_epochs),
        int,
        50,
    ),
    *(
        _ROWS[name]
        for name in ("lora_dropout", "with_prior_preservation", "prior_loss_weight", "num_class_images")
    ),
    Flag("random_flip", "Mirror pictures at half of the visits.", "data.random_flip", None, False),
    Flag(
        "train_text_encoder",
        "Adapt both CLIPs too; T5 is left alone.",
        "dreambooth.train_text_encoder",
        None,
        False,
    ),
    *(
        _ROWS[name]
        for name in ("sample_batch_size", "lr_num_cycles", "lr_power", "prior_generation_precision")
    ),
    Flag(
        "text_encoder_lr",
        "Learning rate of the CLIPs; prodigy has one for all.",
        text_encoder_rate,
        float,
        5e-6,
    ),
    Flag(
        "weighting_scheme",
        "Which noise levels are drawn (logit_normal, mode), or how errors are weighed (sigma_sqrt, cosmap).",
        weighting,
        default="logit_normal",
        choices=("sigma_sqrt", "logit_normal", "mode", "cosmap"),
    ),
    Flag("logit_mean", "Of logit_normal: above 0 favours clean levels.", nothing, float, 0.0),
    Flag("logit_std", "Of logit_normal: the spread.", nothing, float, 1.0),
    Flag("mode_scale", "Of mode: how much more often middle levels come.", nothing, float, 1.29),
    Flag(
        "precondition_outputs",
        "1: measure the error in the clean latents; 0: in what the transformer predicts.",
        lambda v, f, w: {"train.objective.measured": "clean" if v else "prediction"},
        int,
        1,
    ),
    Flag("optimizer", "AdamW or prodigy.", optimizer, default="AdamW"),
    Flag(
        "prodigy_beta3",
        "Refused: Prodigy's own, the root of beta2, is used.",
        only(None, "the root of --adam_beta2 is used, as without the flag. Leave it out.", "prodigy_beta3"),
        float,
    ),
    Flag("prodigy_decouple", "Accepted. Weight decay is decoupled, as in AdamW.", nothing, bool, True),
    Flag(
        "prodigy_use_bias_correction",
        "Adam's bias correction, for prodigy.",
        of_prodigy("train.optimizer.prodigy.bias_correction"),
        bool,
        True,
    ),
    Flag(
        "prodigy_safeguard_warmup",
        "Keep warm-up out of prodigy's estimate.",
        of_prodigy("train.optimizer.prodigy.safeguard_warmup"),
        bool,
        True,
    ),
    Flag(
        "adam_weight_decay_text_encoder",
        "Accepted. The weight decay is that of --adam_weight_decay.",
        nothing,
        float,
        1e-3,
        note=lambda value, flags: (
            f"--adam_weight_decay_text_encoder={value:g} is not used: the whole adapter has --adam_weight_decay."
            if flags.train_text_encoder and value != flags.adam_weight_decay
            else ""
        ),
    ),
    Flag("lora_layers", "Layers by the end of their names, with commas: attn.to_q,attn.to_k.", layers),
    Flag("lora_blocks", "Numbers of the blocks they are in, with commas: 12,30. Unset: all.", nothing),
    Flag("cache_latents", "Accepted. Latents are kept anyway.", nothing, None, False),
    Flag("upcast_before_saving", "Accepted. The adapter is saved in fp32 anyway.", nothing, None, False),
    *changed(
        run_flags(output="sd3-dreambooth", batch=4, rate=1e-4, epochs=1, count=_epochs),
        without=("enable_xformers_memory_efficient_attention",),
        defaults={"adam_weight_decay": 1e-4},
        becomes={"use_8bit_adam": nothing},  # read by --optimizer
    ),
    *changed(lora_flags(), without=("image_interpolation_mode",)),
)
COMMAND = Command("Teach Stable Diffusion 3 a subject: DreamBooth with a LoRA.", FLAGS, method="dreambooth")

parser, translate, main = COMMAND.parser, COMMAND.translate, COMMAND.run

__all__ = ["COMMAND", "FLAGS", "Refused", "World", "main", "parser", "resume", "translate"]

if __name__ == "__main__":
    sys.exit(main())
