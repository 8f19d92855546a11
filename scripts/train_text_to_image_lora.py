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
    in_steps,
    lora_flags,
    nothing,
    only_with_prompt,
    preview_every,
    preview_prompt,
    resume,
    run_flags,
)


def data_source(value: Any, flags: argparse.Namespace, world: World) -> Values:
    name, folder = flags.dataset_name, flags.train_data_dir
    if name is None and folder is None:
        raise Refused(
            "Give --dataset_name (a dataset of the Hub or a folder) or --train_data_dir (a folder)."
        )
    return {"data.images": folder if name in (None, "imagefolder") else name}


def _epochs(epochs: float, flags: argparse.Namespace, world: World) -> int:
    pictures = world.count({**COMMAND.data(flags, world), **data_source(None, flags, world)})
    return in_steps(epochs, pictures, flags, world)


FLAGS: tuple[Flag, ...] = (
    *base_flags(),
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
    Flag("validation_prompt", "Prompt to draw during and after training.", preview_prompt(30)),
    Flag("num_validation_images", "Pictures of it at a time.", only_with_prompt("preview.count"), int, 4),
    Flag(
        "validation_epochs", "Draw it every this many epochs, and at the end.", preview_every(_epochs), int, 1
    ),
    Flag("max_train_samples", "Train on this many pictures only.", "data.max_samples", int),
    Flag("cache_dir", "Folder for downloaded bases and datasets.", nothing),
    Flag("random_flip", "Mirror pictures at half of the visits.", "data.random_flip", None, False),
    Flag("snr_gamma", "Min-SNR weighting; 5.0 is usual.", "train.objective.snr_gamma", float),
    Flag("prediction_type", "What the base predicts. Unset: what its scheduler says.", "prediction"),
    Flag(
        "noise_offset",
        "Strength of a constant per channel in the noise.",
        "train.objective.noise_offset",
        float,
        0,
    ),
    *run_flags(output="sd-model-finetuned-lora", batch=16, rate=1e-4, epochs=100, count=_epochs),
    *lora_flags(),
)
COMMAND = Command("Train a LoRA of Stable Diffusion on captioned pictures.", FLAGS)

parser, translate, main = COMMAND.parser, COMMAND.translate, COMMAND.run

__all__ = ["COMMAND", "FLAGS", "Refused", "World", "main", "parser", "resume", "translate"]

if __name__ == "__main__":
    sys.exit(main())
