#!/usr/bin/env python
"""The command people already have for DreamBooth on Stable Diffusion XL, with the same flags, on scumble.

    accelerate launch --mixed_precision="bf16" scripts/train_dreambooth_lora_sdxl.py \\
        --pretrained_model_name_or_path=stabilityai/stable-diffusion-xl-base-1.0 --instance_data_dir=dog/ \\
        --instance_prompt="a photo of sks dog" --resolution=1024 --max_train_steps=500 --output_dir=out \\
        --train_text_encoder --output_kohya_format

`FLAGS` is the whole translation: each row names a flag and what it becomes in our settings.

What behaves otherwise, on purpose, beside what `train_dreambooth_lora.py` and `train_text_to_image_lora_sdxl.py` say:
  * Class pictures are told their own size and crop, not those of the subject's picture beside them.
  * `--snr_gamma` weighs a base of velocity prediction as Hang et al. 2023 do, by min(snr, gamma) / (snr + 1).
  * One weight decay holds for the whole adapter: that of `--adam_weight_decay`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # already there when this file is run, not when it is imported

from flags import (
    Command,
    Flag,
    Refused,
    Values,
    World,
    changed,
    in_steps,
    lora_flags,
    nothing,
    only,
    preview_every,
    resume,
    run_flags,
)
from train_dreambooth_lora import prior
from train_dreambooth_lora_sd3 import FLAGS as SD3
from train_dreambooth_lora_sd3 import data_source
from train_text_to_image_lora_sdxl import GUIDANCE, sdxl_flags, validation


def guided_prior(value: bool, flags: argparse.Namespace, world: World) -> Values:
    found = prior(value, flags, world)
    return {**found, "dreambooth.class_guidance": GUIDANCE} if found else {}


def _epochs(epochs: float, flags: argparse.Namespace, world: World) -> int:
    """An epoch is as long as the larger of both sets of pictures."""
    pictures = world.count({**COMMAND.data(flags, world), **data_source(None, flags, world)})
    if flags.with_prior_preservation:
        pictures = max(pictures, flags.num_class_images)
    return in_steps(epochs, pictures, flags, world)


_RUN = changed(
    run_flags(output="lora-dreambooth-model", batch=4, rate=1e-4, epochs=1, count=_epochs),
    defaults={"adam_weight_decay": 1e-4, "resolution": 1024},
    becomes={"use_8bit_adam": nothing},  # read by --optimizer
)
_NOT_HERE = (
    *(
        "max_sequence_length",
        "weighting_scheme",
        "logit_mean",
        "logit_std",
        "mode_scale",
        "precondition_outputs",
    ),
    *("lora_layers", "lora_blocks", "cache_latents", "upcast_before_saving"),
    *(flag.name for flag in (*_RUN, *lora_flags())),
)

FLAGS: tuple[Flag, ...] = (
    *changed(
        SD3,
        without=_NOT_HERE,
        becomes={
            "validation_prompt": validation,
            "validation_epochs": preview_every(_epochs),
            "with_prior_preservation": guided_prior,
        },
    ),
    *sdxl_flags(),
    Flag(
        "do_edm_style_training",
        "Refused: the base's own noise schedule is trained on.",
        only(
            False,
            "adapters are trained on the noise schedule of their base. Leave it out.",
            "do_edm_style_training",
        ),
        None,
        False,
    ),
    Flag(
        "output_kohya_format",
        "Write pytorch_lora_weights_kohya.safetensors as well.",
        lambda value, flags, world: {"save.also": ("kohya",)} if value else {},
        None,
        False,
    ),
    Flag("snr_gamma", "Min-SNR weighting; 5.0 is usual.", "train.objective.snr_gamma", float),
    Flag(
        "use_dora",
        "Learn lengths and directions apart (DoRA).",
        lambda value, flags, world: {"adapter.family": "dora"} if value else {},
        None,
        False,
    ),
    *_RUN,
    *lora_flags(),
)
COMMAND = Command("Teach Stable Diffusion XL a subject: DreamBooth with a LoRA.", FLAGS, method="dreambooth")

parser, translate, main = COMMAND.parser, COMMAND.translate, COMMAND.run

__all__ = ["COMMAND", "FLAGS", "Refused", "World", "main", "parser", "resume", "translate"]

if __name__ == "__main__":
    sys.exit(main())
