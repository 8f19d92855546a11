#!/usr/bin/env python
"""The command people already have for DreamBooth on Flux.1, with the same flags, on scumble.

    accelerate launch --mixed_precision="bf16" scripts/train_dreambooth_lora_flux.py \\
        --pretrained_model_name_or_path=black-forest-labs/FLUX.1-dev --instance_data_dir=dog/ \\
        --instance_prompt="a photo of sks dog" --guidance_scale=1 --max_train_steps=500 --output_dir=out

`FLAGS` is the whole translation: each row names a flag and what it becomes in our settings.

What behaves otherwise, on purpose, beside what `train_dreambooth_lora_sd3.py` says:
  * T5 reads 512 tokens while training too, as it does when the pipeline draws; `--max_sequence_length` is accepted.
  * Previews and class pictures are drawn with the base's own guidance, 3.5 for dev, as FluxPipeline draws.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # already there when this file is run, not when it is imported

from flags import Command, Flag, Refused, Values, World, changed, nothing, preview_prompt, resume
from train_dreambooth_lora_sd3 import FLAGS as SD3
from train_dreambooth_lora_sd3 import given_otherwise

_ROWS = {flag.name: flag for flag in SD3}
_WINDOW = 512
_DRAWING_STEPS = 28
_LAYERS = (
    *(f"attn.{name}" for name in ("to_k", "to_q", "to_v", "to_out.0")),
    *(f"attn.{name}" for name in ("add_k_proj", "add_q_proj", "add_v_proj", "to_add_out")),
    *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
)
"""What their script adapts unless told otherwise: of the single blocks, q, k and v alone."""


def prior(value: bool, flags: argparse.Namespace, world: World) -> Values:
    becomes = _ROWS["with_prior_preservation"].becomes
    assert not isinstance(becomes, str)
    found = becomes(value, flags, world)
    return {**found, "dreambooth.class_steps": _DRAWING_STEPS} if found else found


def layers(value: str | None, flags: argparse.Namespace, world: World) -> Values:
    names = _LAYERS if value is None else [name.strip() for name in value.split(",")]
    return {"adapter.targets": tuple(f"*.{name}" for name in names)}


def guidance(value: float, flags: argparse.Namespace, world: World) -> Values:
    """Told to bases that are told one; their script looks at the base, too."""
    return {"train.objective.guidance": value} if world.guided(flags) else {}


FLAGS: tuple[Flag, ...] = (
    *changed(
        SD3,
        without=(
            *("lora_blocks", "lora_layers", "precondition_outputs"),
            *("max_sequence_length", "weighting_scheme", "train_text_encoder"),
        ),
        defaults={"output_dir": "flux-dreambooth-lora"},
        becomes={"with_prior_preservation": prior, "validation_prompt": preview_prompt(_DRAWING_STEPS)},
    ),
    replace(_ROWS["train_text_encoder"], help="Adapt CLIP too; T5 is left alone."),
    replace(
        _ROWS["max_sequence_length"],
        help=f"Accepted. T5 reads {_WINDOW} tokens, as it does when the pipeline draws.",
        default=_WINDOW,
        note=given_otherwise("max_sequence_length", (_WINDOW,), f"T5 reads {_WINDOW} tokens"),
    ),
    replace(
        _ROWS["weighting_scheme"],
        default="none",
        choices=("sigma_sqrt", "logit_normal", "mode", "cosmap", "none"),
    ),
    Flag("lora_alpha", "The LoRA is multiplied by this over its rank.", "adapter.alpha", int, 4),
    Flag("lora_layers", "Layers by the end of their names, with commas: attn.to_q,attn.to_k.", layers),
    Flag(
        "guidance_scale",
        "What a guidance-distilled base (dev) is told while it trains; others are told nothing.",
        guidance,
        float,
        3.5,
    ),
    Flag(
        "enable_npu_flash_attention",
        "Accepted. Attention is torch's own memory-efficient one anyway.",
        nothing,
        None,
        False,
        note=lambda value, flags: (
            "--enable_npu_flash_attention: torch's scaled_dot_product_attention is used, not the NPU's own."
            if value
            else ""
        ),
    ),
)
COMMAND = Command("Teach Flux.1 a subject: DreamBooth with a LoRA.", FLAGS, method="dreambooth")

parser, translate, main = COMMAND.parser, COMMAND.translate, COMMAND.run

__all__ = ["COMMAND", "FLAGS", "Refused", "World", "main", "parser", "resume", "translate"]

if __name__ == "__main__":
    sys.exit(main())
