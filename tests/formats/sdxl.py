"""A toy SDXL pipeline, random but real: two text encoders, text-and-time embedding, the original block layout."""

from __future__ import annotations

from typing import Any

import torch

from scumble.models.tiny import tiny_tokenizer

WIDTH = 32


def _text_encoder(kind: Any, tokenizer: Any, activation: str) -> Any:
    from transformers import CLIPTextConfig

    return kind(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            projection_dim=WIDTH,
            num_hidden_layers=2,
            num_attention_heads=2,
            hidden_act=activation,
            max_position_embeddings=77,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def tiny_sdxl(seed: int = 0) -> Any:
    """A StableDiffusionXLPipeline of 16x16 pixels, the same for equal seeds."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    tokenizer = tiny_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(32, 64),
            layers_per_block=2,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2),
            attention_head_dim=(2, 4),
            cross_attention_dim=2 * WIDTH,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + WIDTH,
        )
        vae = AutoencoderKL(
            block_out_channels=(32, 64),
            layers_per_block=1,
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=4,
            sample_size=16,
        )
        pipeline = StableDiffusionXLPipeline(
            vae=vae,
            text_encoder=_text_encoder(CLIPTextModel, tokenizer, "quick_gelu"),
            text_encoder_2=_text_encoder(CLIPTextModelWithProjection, tokenizer, "gelu"),
            tokenizer=tokenizer,
            tokenizer_2=tiny_tokenizer("!"),
            unet=unet,
            scheduler=DDIMScheduler(),
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def outputs(pipeline: Any) -> dict[str, torch.Tensor]:
    """What the UNet and the text encoders give for fixed inputs: component -> output, in the pipeline's precision."""
    generator = torch.Generator().manual_seed(1)
    ids = pipeline.tokenizer(
        "a fox on a hill", padding="max_length", max_length=77, return_tensors="pt"
    ).input_ids
    found = {}
    with torch.no_grad():
        for name in ("text_encoder", "text_encoder_2"):
            encoder = getattr(pipeline, name, None)
            if encoder is not None:
                said = encoder(ids, output_hidden_states=True)
                found[name] = said.hidden_states[-1]
                if hasattr(said, "text_embeds"):
                    found[name + " pooled"] = said.text_embeds
        unet = pipeline.unet
        latents = torch.randn(1, 4, 8, 8, generator=generator).to(unet.dtype)
        text = torch.randn(1, 77, unet.config.cross_attention_dim, generator=generator).to(unet.dtype)
        added = None
        if unet.config.addition_embed_type:
            added = {
                "text_embeds": torch.randn(1, WIDTH, generator=generator).to(unet.dtype),
                "time_ids": torch.tensor([[16.0, 16, 0, 0, 16, 16]], dtype=unet.dtype),
            }
        found["unet"] = unet(latents, 300, text, added_cond_kwargs=added).sample
    return found
