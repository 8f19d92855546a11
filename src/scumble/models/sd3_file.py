"""SD 3's single files: the transformer in Stability AI's names, alone or with VAE, CLIPs and T5.

What shapes don't tell is as published for 3 medium, 3.5 medium and 3.5 large, which agree in it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from scumble.models.file_layout import FileLayout, FilePart, clip_part, t5_part, vae_part
from scumble.models.shapes import Shapes, counted

if TYPE_CHECKING:
    from scumble.models.marks import Mark

SIDE = 128
"""Default side in latents, 1024 pixels."""

HEAD = 64
"""Numbers a head, where no norm of queries tells it."""


def transformer_config(s: Shapes) -> dict[str, Any]:
    """diffusers' config of the transformer.

    Raises:
        KeyError: a tensor of SD 3's transformer is not there.
    """
    blocks = counted(s, r"joint_blocks\.(\d+)\.")
    width, channels, patch, _ = s["x_embedder.proj.weight"]
    projection, joint = s["context_embedder.weight"]
    norm = s.get("joint_blocks.0.x_block.attn.ln_q.weight")
    head = norm[0] if norm else HEAD
    places = math.isqrt(s["pos_embed"][1])
    return {
        "_class_name": "SD3Transformer2DModel",
        # no larger than the table of places reaches
        "sample_size": min(SIDE, places * patch),
        "patch_size": patch,
        "in_channels": channels,
        "num_layers": blocks,
        "attention_head_dim": head,
        "num_attention_heads": width // head,
        "joint_attention_dim": joint,
        "caption_projection_dim": projection,
        "pooled_projection_dim": s["y_embedder.mlp.0.weight"][1],
        "out_channels": s["final_layer.linear.weight"][0] // patch**2,
        "pos_embed_max_size": places,
        "dual_attention_layers": [
            block for block in range(blocks) if f"joint_blocks.{block}.x_block.attn2.qkv.weight" in s
        ],
        "qk_norm": "rms_norm" if norm else None,
    }


def _transformer(marks: dict[str, Mark], config: Mapping[str, Any]) -> dict[str, Mark]:
    from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers

    converted: dict[str, Mark] = convert_sd3_transformer_checkpoint_to_diffusers(marks)
    return converted


def _scheduler(transformer: Mapping[str, Any]) -> dict[str, Any]:
    return {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0}


SD3_FILE = FileLayout(
    title="Stable Diffusion 3",
    pipeline="StableDiffusion3Pipeline",
    parts=(
        FilePart(
            "transformer",
            "transformer",
            "SD3Transformer2DModel",
            ("model.diffusion_model.", ""),
            "joint_blocks.0.",
            transformer_config,
            _transformer,
        ),
        vae_part(scaling_factor=1.5305, shift_factor=0.0609, sample_size=1024),
        clip_part("text_encoder", "text encoder CLIP-L", "text_encoders.clip_l.transformer.", fixed=True),
        clip_part(
            "text_encoder_2", "text encoder CLIP-G", "text_encoders.clip_g.transformer.", projected=True
        ),
        t5_part("text_encoder_3", optional=True),
    ),
    words={
        "tokenizer": ("text_encoder", {"_class_name": "CLIPTokenizer", "pad_token": None}),
        # OpenCLIP fills a prompt up with token 0, which is "!"
        "tokenizer_2": ("text_encoder_2", {"_class_name": "CLIPTokenizer", "pad_token": "!"}),
        "tokenizer_3": ("text_encoder_3", {"_class_name": "T5TokenizerFast", "pad_token": None}),
    },
    scheduler=_scheduler,
)
