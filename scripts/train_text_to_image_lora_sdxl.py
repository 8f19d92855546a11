#!/usr/bin/env python
"""The command people already have for training a LoRA of SDXL on captioned pictures, with the same flags, on scumble.

    accelerate launch --mixed_precision="bf16" scripts/train_text_to_image_lora_sdxl.py \\
        --pretrained_model_name_or_path=stabilityai/stable-diffusion-xl-base-1.0 --train_data_dir=pictures/ \\
        --resolution=1024 --random_flip --max_train_steps=500 --output_dir=out --validation_prompt="a red fox"

`FLAGS` is the whole translation: each row names a flag and what it becomes in our settings.

What behaves otherwise, on purpose, beside what `train_text_to_image_lora.py` says:
  * The base's own VAE is used, in fp32 where it would overflow in fp16.
  * The UNet is told the size, crop and target of each picture unrounded, also where it computes in bf16 or fp16.
  * With `--train_text_encoder`, the last layer of the first text encoder is left out: SDXL reads the one before it, so
    that nothing reaches it.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # already there when this file is run, not when it is imported

from flags import Command, Flag, Refused, Values, World, changed, nothing, only, preview_prompt, resume
from train_text_to_image_lora import FLAGS as TEXT_TO_IMAGE

GUIDANCE = 5.0
"""Of SDXL's pipeline, where nobody says another."""


def validation(value: str | None, flags: argparse.Namespace, world: World) -> Values:
    found = preview_prompt(25)(value, flags, world)
    return {**found, "preview.guidance": GUIDANCE} if found else {}


def own_vae(value: str | None, flags: argparse.Namespace) -> str:
    if value in (None, flags.pretrained_model_name_or_path):
        return ""
    return (
        f"--pretrained_vae_model_name_or_path={value} is not used: the base's own VAE computes in fp32 where it would "
        "overflow in fp16, which is what such VAEs are for."
    )


def sdxl_flags() -> tuple[Flag, ...]:
    """What the commands for SDXL have beside those for the older bases."""
    return (
        Flag(
            "pretrained_vae_model_name_or_path",
            "Accepted. The base's own VAE is used, in fp32 where it would overflow in fp16.",
            nothing,
            note=own_vae,
        ),
    )


FLAGS: tuple[Flag, ...] = (
    *changed(TEXT_TO_IMAGE, defaults={"resolution": 1024}, becomes={"validation_prompt": validation}),
    *sdxl_flags(),
    Flag(
        "train_text_encoder",
        "Adapt both text encoders too.",
        "text_to_image.train_text_encoder",
        None,
        False,
    ),
    Flag(
        "enable_npu_flash_attention",
        "Refused: for Huawei's NPUs.",
        only(
            False,
            "torch's scaled_dot_product_attention is used, which chooses by itself. Leave it out.",
            "enable_npu_flash_attention",
        ),
        None,
        False,
    ),
    Flag(
        "debug_loss",
        "Refused: losses are told of whole steps, and of held-out pictures.",
        only(
            False,
            "losses are told of whole steps. `scumble train` with data.held_out tells those of single pictures, at "
            "fixed noise, so that they compare. Leave it out.",
            "debug_loss",
        ),
        None,
        False,
    ),
)
COMMAND = Command("Train a LoRA of Stable Diffusion XL on captioned pictures.", FLAGS)

parser, translate, main = COMMAND.parser, COMMAND.translate, COMMAND.run

__all__ = ["COMMAND", "FLAGS", "Refused", "World", "main", "parser", "resume", "translate"]

if __name__ == "__main__":
    sys.exit(main())
