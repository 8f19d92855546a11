#!/usr/bin/env python
"""The command people already have for textual inversion, with the same flags, on scumble.

    accelerate launch scripts/textual_inversion.py --pretrained_model_name_or_path=picturebook \\
        --train_data_dir=cat/ --learnable_property="object" --placeholder_token="<cat-toy>" --initializer_token="toy" \\
        --max_train_steps=3000 --learning_rate=5e-4 --output_dir=out --validation_prompt="a <cat-toy> on a beach"

`FLAGS` is the whole translation: each row names a flag and what it becomes in our settings. The output folder is
laid out as expected: `learned_embeds.safetensors`, `checkpoint-N/`, `README.md`.

What behaves otherwise, on purpose, beside what `train_text_to_image_lora.py` says:
  * The sentences around the word are our own, about as many.
  * Pictures that are not square are cut, not squeezed.
  * The table of embeddings is not trained and copied back: only the new word's vectors exist for the optimizer. Their
    length is held near the table's mean.
  * The embedding so far is in every checkpoint; `--save_steps` makes one, too.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # already there when this file is run, not when it is imported

from flags import (
    Command,
    Flag,
    Refused,
    Values,
    World,
    base_flags,
    in_steps,
    nothing,
    only,
    only_with_prompt,
    own_tokenizer,
    preview_prompt,
    resume,
    run_flags,
)


def pictures(value: str, flags: argparse.Namespace, world: World) -> Values:
    """The folder, how that command shows its pictures (mirrored at half of the visits), and no limit on the
    gradient."""
    shown = {"data.images": value, "data.random_flip": True, "data.interpolation": "bicubic"}
    return {**shown, "train.max_grad_norm": None}


def learns(value: str, flags: argparse.Namespace, world: World) -> Values:
    if value not in ("object", "style"):
        raise Refused(f"--learnable_property={value} is neither object nor style.")
    return {"textual_inversion.learns": value}


def _epochs(epochs: float, flags: argparse.Namespace, world: World) -> int:
    data = {**COMMAND.data(flags, world), "data.images": flags.train_data_dir, "data.caption": ""}
    return in_steps(epochs, world.count(data), flags, world)


def checkpoint_every(value: int, flags: argparse.Namespace, world: World) -> Values:
    return {"train.checkpoint_every": min(value, flags.save_steps)}


def preview_every(value: int, flags: argparse.Namespace, world: World) -> Values:
    if flags.validation_prompt is None:
        return {}
    epochs = flags.validation_epochs
    return {"train.preview_every": value if epochs is None else _epochs(epochs, flags, world)}


ELSEWHERE = {"use_8bit_adam", "max_grad_norm", "checkpointing_steps"}
"""Rows of the common table that this command has not, or has otherwise."""

FLAGS: tuple[Flag, ...] = (
    *base_flags(),
    Flag("tokenizer_name", "Accepted where it names the base's own tokenizer.", own_tokenizer),
    Flag("train_data_dir", "Folder of pictures of the concept.", pictures, required=True),
    Flag("placeholder_token", "The new word.", "textual_inversion.placeholders", required=True),
    Flag("initializer_token", "A known word to start from.", "textual_inversion.initial", required=True),
    Flag("learnable_property", "object or style.", learns, default="object"),
    Flag("num_vectors", "Vectors of the new word.", "textual_inversion.vectors", int, 1),
    Flag("repeats", "How often a picture counts in one epoch.", "data.repeats", int, 100),
    Flag(
        "save_steps",
        "Steps between saved embeddings: each is in a checkpoint.",
        nothing,
        int,
        500,
        note=lambda value, flags: (
            f"--save_steps={value}: a checkpoint is made every {value} steps, and the embedding is in it."
            if value < flags.checkpointing_steps
            else ""
        ),
    ),
    Flag(
        "save_as_full_pipeline",
        "Refused: the base is not changed.",
        only(
            False,
            "the base is not changed, so it is not saved again. Load it with diffusers, then "
            "pipe.load_textual_inversion(output_dir) and pipe.save_pretrained(folder).",
            "save_as_full_pipeline",
        ),
        None,
        False,
    ),
    Flag(
        "no_safe_serialization",
        "Refused: pickles are not written.",
        only(False, "pickles are not written; everything reads safetensors.", "no_safe_serialization"),
        None,
        False,
    ),
    Flag("validation_prompt", "Prompt to draw during and after training.", preview_prompt(25)),
    Flag("num_validation_images", "Pictures of it at a time.", only_with_prompt("preview.count"), int, 4),
    Flag("validation_steps", "Draw it every this many steps, and at the end.", preview_every, int, 100),
    Flag("validation_epochs", "The same in epochs; better: --validation_steps.", nothing, int),
    Flag("lr_num_cycles", "Falls of cosine_with_restarts.", "train.schedule.cycles", int, 1),
    Flag("checkpointing_steps", "Steps between checkpoints.", checkpoint_every, int, 500),
    *(
        replace(flag, default=5000) if flag.name == "max_train_steps" else flag
        for flag in run_flags(output="text-inversion-model", batch=16, rate=1e-4, epochs=100, count=_epochs)
        if flag.name not in ELSEWHERE
    ),
)
COMMAND = Command("Teach Stable Diffusion a new word: textual inversion.", FLAGS, method="textual-inversion")

parser, translate, main = COMMAND.parser, COMMAND.translate, COMMAND.run

__all__ = ["COMMAND", "FLAGS", "Refused", "World", "main", "parser", "resume", "translate"]

if __name__ == "__main__":
    sys.exit(main())
