"""Flux.1's single files: the transformer in Black Forest Labs' names, alone or with VAE, CLIP and T5.

What shapes don't tell is as published for dev and schnell.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from scumble.models.file_layout import FileLayout, FilePart, clip_part, t5_part, vae_part
from scumble.models.shapes import Shapes, counted

if TYPE_CHECKING:
    from scumble.models.marks import Mark


def transformer_config(s: Shapes) -> dict[str, Any]:
    """diffusers' config of the transformer.

    Raises:
        KeyError: a tensor of Flux.1's transformer is not there.
    """
    width, taken = s["img_in.weight"]
    (head,) = s["double_blocks.0.img_attn.norm.query_norm.scale"]
    given = s["final_layer.linear.weight"][0]
    # rotary places: row and column have 7/16 of a head each, in whole pairs
    side = 7 * head // 32 * 2
    return {
        "_class_name": "FluxTransformer2DModel",
        "patch_size": 1,
        "in_channels": taken,
        "out_channels": None if given == taken else given,
        "num_layers": counted(s, r"double_blocks\.(\d+)\."),
        "num_single_layers": counted(s, r"single_blocks\.(\d+)\."),
        "attention_head_dim": head,
        "num_attention_heads": width // head,
        "joint_attention_dim": s["txt_in.weight"][1],
        "pooled_projection_dim": s["vector_in.in_layer.weight"][1],
        "guidance_embeds": "guidance_in.in_layer.weight" in s,
        "axes_dims_rope": [head - 2 * side, side, side],
    }


def _transformer(marks: dict[str, Mark], config: Mapping[str, Any]) -> dict[str, Mark]:
    from diffusers.loaders.single_file_utils import convert_flux_transformer_checkpoint_to_diffusers

    converted: dict[str, Mark] = convert_flux_transformer_checkpoint_to_diffusers(marks)
    return converted


def _scheduler(transformer: Mapping[str, Any]) -> dict[str, Any]:
    """Dev's, which is told a guidance, moves its noise levels with the picture's size; schnell's does not."""
    guided = bool(transformer["guidance_embeds"])
    return {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "num_train_timesteps": 1000,
        "shift": 3.0 if guided else 1.0,
        "use_dynamic_shifting": guided,
        "base_shift": 0.5,
        "max_shift": 1.15,
        "base_image_seq_len": 256,
        "max_image_seq_len": 4096,
    }


FLUX_FILE = FileLayout(
    title="Flux.1",
    pipeline="FluxPipeline",
    parts=(
        FilePart(
            "transformer",
            "transformer",
            "FluxTransformer2DModel",
            ("model.diffusion_model.", ""),
            "double_blocks.0.",
            transformer_config,
            _transformer,
        ),
        vae_part(scaling_factor=0.3611, shift_factor=0.1159, sample_size=1024),
        clip_part("text_encoder", "text encoder CLIP", "text_encoders.clip_l.transformer."),
        t5_part("text_encoder_2"),
    ),
    words={
        "tokenizer": ("text_encoder", {"_class_name": "CLIPTokenizer", "pad_token": None}),
        "tokenizer_2": ("text_encoder_2", {"_class_name": "T5TokenizerFast", "pad_token": None}),
    },
    scheduler=_scheduler,
)
