#!/usr/bin/env python
"""The command people already have for DreamBooth with a LoRA, with the same flags, on scumble.

    accelerate launch --mixed_precision="bf16" scripts/train_dreambooth_lora.py \\
        --pretrained_model_name_or_path=picturebook --instance_data_dir=dog/ --instance_prompt="a photo of sks dog" \\
        --with_prior_preservation --class_data_dir=dogs/ --class_prompt="a photo of dog" --num_class_images=200 \\
        --train_text_encoder --max_train_steps=500 --output_dir=out --validation_prompt="sks dog in a bucket"

`FLAGS` is the whole translation: each row names a flag and what it becomes in our settings. The output folder is
laid out as expected: `pytorch_lora_weights.safetensors`, `checkpoint-N/`, `README.md`; class pictures that are missing
are drawn into `--class_data_dir`.

What behaves otherwise, on purpose, beside what `train_text_to_image_lora.py` says:
  * All pictures in `--class_data_dir` are used, also where there are more than `--num_class_images`.
  * Class pictures are drawn at `--resolution`, from fixed seeds, so that a second run finds the same ones. Pictures
    that were drawn for another prompt or base are refused, not used.
  * Text embeddings are kept whenever the text encoder does not train, with `--pre_compute_text_embeddings` or without.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))  # already there when this file is run, not when it is imported

from flags import (
    Becomes,
    Command,
    Flag,
    Refused,
    Values,
    World,
    base_flags,
    in_steps,
    lora_flags,
    nothing,
    only,
    only_with_prompt,
    own_tokenizer,
    preview_every,
    preview_prompt,
    resume,
    run_flags,
)


def prior(value: bool, flags: argparse.Namespace, world: World) -> Values:
    if not value:
        return {}
    for name, what in (("class_data_dir", "a folder for class pictures"), ("class_prompt", "their prompt")):
        if getattr(flags, name) is None:
            raise Refused(f"--with_prior_preservation needs --{name}: {what}.")
    return {"dreambooth.prior": "images", "dreambooth.class_steps": 50}


def only_with_prior(setting: str) -> Becomes:
    return lambda value, flags, world: {setting: value} if flags.with_prior_preservation else {}


def unused_without_prior(name: str) -> Any:
    return lambda value, flags: (
        f"--{name} is not used without --with_prior_preservation."
        if value is not None and not flags.with_prior_preservation
        else ""
    )


def _epochs(epochs: float, flags: argparse.Namespace, world: World) -> int:
    """An epoch is as long as the larger of both sets of pictures."""
    images = {"data.images": flags.instance_data_dir, "data.caption": flags.instance_prompt}
    pictures = world.count({**COMMAND.data(flags, world), **images})
    if flags.with_prior_preservation:
        pictures = max(pictures, flags.num_class_images)
    return in_steps(epochs, pictures, flags, world)


def text_encoder(value: bool, flags: argparse.Namespace, world: World) -> Values:
    if value and flags.pre_compute_text_embeddings:
        raise Refused(
            "--pre_compute_text_embeddings keeps what the text encoder says, and --train_text_encoder changes it. "
            "Give one of them."
        )
    return {"dreambooth.train_text_encoder": value}


def drawn_in_other_numbers(value: str | None, flags: argparse.Namespace) -> str:
    if value is None or not flags.with_prior_preservation:
        return ""
    return (
        f"--prior_generation_precision={value} is not used: class pictures are drawn by the base in the precision that "
        "it is trained in."
    )


FLAGS: tuple[Flag, ...] = (
    *base_flags(),
    Flag("tokenizer_name", "Accepted where it names the base's own tokenizer.", own_tokenizer),
    Flag("instance_data_dir", "Folder of pictures of the subject.", "data.images", required=True),
    Flag(
        "class_data_dir",
        "Folder of class pictures; missing ones are drawn into it.",
        only_with_prior("dreambooth.class_images"),
        note=unused_without_prior("class_data_dir"),
    ),
    Flag(
        "instance_prompt",
        "Caption of every picture of the subject, with a rare word for it.",
        "dreambooth.instance_prompt",
        required=True,
    ),
    Flag(
        "class_prompt",
        "Caption of every class picture.",
        only_with_prior("dreambooth.class_prompt"),
        note=unused_without_prior("class_prompt"),
    ),
    Flag("validation_prompt", "Prompt to draw during and after training.", preview_prompt(25)),
    Flag("num_validation_images", "Pictures of it at a time.", only_with_prompt("preview.count"), int, 4),
    Flag(
        "validation_epochs",
        "Draw it every this many epochs, and at the end.",
        preview_every(_epochs),
        int,
        50,
    ),
    Flag("with_prior_preservation", "Train class pictures beside the subject's.", prior, None, False),
    Flag(
        "prior_loss_weight",
        "How much class pictures count.",
        only_with_prior("dreambooth.prior_weight"),
        float,
        1.0,
    ),
    Flag(
        "num_class_images",
        "Class pictures; missing ones are drawn.",
        only_with_prior("dreambooth.class_count"),
        int,
        100,
    ),
    Flag("train_text_encoder", "Adapt the text encoder too.", text_encoder, None, False),
    Flag(
        "sample_batch_size",
        "Class pictures drawn at once.",
        only_with_prior("dreambooth.class_batch"),
        int,
        4,
    ),
    Flag("lr_num_cycles", "Falls of cosine_with_restarts.", "train.schedule.cycles", int, 1),
    Flag("lr_power", "Exponent of polynomial.", "train.schedule.power", float, 1.0),
    Flag(
        "prior_generation_precision",
        "Accepted. Class pictures are drawn in the precision of the training.",
        nothing,
        choices=("no", "fp32", "fp16", "bf16"),
        note=drawn_in_other_numbers,
    ),
    Flag(
        "pre_compute_text_embeddings",
        "Accepted. Text embeddings are kept whenever the text encoder does not train.",
        nothing,
        None,
        False,
    ),
    Flag(
        "tokenizer_max_length",
        "Accepted where it is 77, what these bases read.",
        only(77, "these bases read 77 tokens. Leave it out.", "tokenizer_max_length"),
        int,
    ),
    Flag(
        "text_encoder_use_attention_mask",
        "Refused: these bases read padding too.",
        only(
            False,
            "these bases read padding too when they draw. Leave it out.",
            "text_encoder_use_attention_mask",
        ),
        None,
        False,
    ),
    Flag(
        "validation_images",
        "Refused: for bases that start from a picture.",
        only(
            None,
            "these bases draw from a prompt, not from a picture. Use --validation_prompt.",
            "validation_images",
        ),
        several=True,
    ),
    Flag(
        "class_labels_conditioning",
        "Refused: for upscalers that are told the noise level.",
        only(
            None,
            "these bases take no class labels. It is for DeepFloyd's upscalers.",
            "class_labels_conditioning",
        ),
    ),
    Flag("lora_dropout", "Chance that an input of the LoRA is dropped.", "adapter.dropout", float, 0.0),
    *run_flags(output="lora-dreambooth-model", batch=4, rate=5e-4, epochs=1, count=_epochs),
    *lora_flags(),
)
COMMAND = Command("Teach Stable Diffusion a subject: DreamBooth with a LoRA.", FLAGS, method="dreambooth")

parser, translate, main = COMMAND.parser, COMMAND.translate, COMMAND.run

__all__ = ["COMMAND", "FLAGS", "Refused", "World", "main", "parser", "resume", "translate"]

if __name__ == "__main__":
    sys.exit(main())
