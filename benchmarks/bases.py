"""Bases with Stable Diffusion 1's architecture, of any widths, with small random weights: what time and memory need."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

SD15 = (320, 640, 1280, 1280)
"""Widths of the UNet of Stable Diffusion 1.5."""


def write_sd1(
    folder: Path,
    *,
    dtype: torch.dtype = torch.float32,
    widths: Sequence[int] = SD15,
    vae: Sequence[int] = (128, 256, 512, 512),
    text: int = 768,
    heads: int = 12,
    sample_size: int = 64,
) -> Path:
    """Write such a base in diffusers' layout; what is not said is Stable Diffusion 1.5's. Returns `folder`.

    Args:
        dtype: of the files.
        widths, vae: of the levels of UNet and VAE.
        text, heads: width and attention heads of the text encoder.
        sample_size: latents along one side of the base's own pictures.
    """
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    from scumble.models.tiny import tiny_tokenizer

    levels = len(vae)
    torch.manual_seed(0)
    with torch.device("meta"):
        parts: dict[str, Any] = {
            "unet": UNet2DConditionModel(
                sample_size=sample_size, block_out_channels=tuple(widths), cross_attention_dim=text
            ),
            "vae": AutoencoderKL(
                block_out_channels=tuple(vae),
                down_block_types=("DownEncoderBlock2D",) * levels,
                up_block_types=("UpDecoderBlock2D",) * levels,
                layers_per_block=2,
                latent_channels=4,
                sample_size=8 * sample_size,
            ),
            "text_encoder": CLIPTextModel(
                CLIPTextConfig(
                    hidden_size=text,
                    intermediate_size=4 * text,
                    num_hidden_layers=12,
                    num_attention_heads=heads,
                    projection_dim=text,
                )
            ),
        }
    for part in parts.values():
        part.to_empty(device="cpu").to(dtype)
        for name, parameter in part.named_parameters():
            with torch.no_grad():
                if parameter.ndim == 1:
                    parameter.fill_(float(name.endswith("weight")))
                else:
                    parameter.normal_(std=0.02)
    pipeline = StableDiffusionPipeline(
        **parts,
        tokenizer=tiny_tokenizer(),  # its words are few, the text encoder's table is of full size
        scheduler=DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            steps_offset=1,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)
    return folder
