"""The layers of the well-known bases, as their libraries name them: linear and convolution layers, in braces.

`a.{0,1}.{x,y.{2,3}}` stands for a.0.x, a.0.y.2, a.0.y.3, a.1.x, ... Names are those of diffusers' UNets and of
CLIP's text model as files have always spelled it (with `text_model.`).
"""

from __future__ import annotations

SD_UNET: tuple[str, ...] = (
    "conv_in",
    "conv_out",
    "time_embedding.linear_{1,2}",
    "{down_blocks.{0,1,2}.attentions.{0,1},up_blocks.{1,2,3}.attentions.{0,1,2},mid_block.attentions.0}"
    ".{proj_in,transformer_blocks.0.{attn{1,2}.to_{q,k,v,out.0},ff.net.{0.proj,2}},proj_out}",
    "{down_blocks.{0,1,2,3}.resnets.{0,1},up_blocks.{0,1,2,3}.resnets.{0,1,2},mid_block.resnets.{0,1}}"
    ".{conv1,time_emb_proj,conv2}",
    "{down_blocks.{1,2}.resnets.0,up_blocks.{0,1,2,3}.resnets.{0,1,2}}.conv_shortcut",
    "{down_blocks.{0,1,2}.downsamplers,up_blocks.{0,1,2}.upsamplers}.0.conv",
)
"""SD 1 and SD 2 (282 layers)."""

SDXL_UNET: tuple[str, ...] = (
    "conv_in",
    "conv_out",
    "{time,add}_embedding.linear_{1,2}",
    "{{down_blocks.1.attentions.{0,1},up_blocks.1.attentions.{0,1,2}}"
    ".{proj_in,transformer_blocks.{0,1}.{attn{1,2}.to_{q,k,v,out.0},ff.net.{0.proj,2}},proj_out},"
    "{down_blocks.2.attentions.{0,1},up_blocks.0.attentions.{0,1,2},mid_block.attentions.0}"
    ".{proj_in,transformer_blocks.{0,1,2,3,4,5,6,7,8,9}.{attn{1,2}.to_{q,k,v,out.0},ff.net.{0.proj,2}},"
    "proj_out}}",
    "{down_blocks.{0,1,2}.resnets.{0,1},up_blocks.{0,1,2}.resnets.{0,1,2},mid_block.resnets.{0,1}}"
    ".{conv1,time_emb_proj,conv2}",
    "{down_blocks.{1,2}.resnets.0,up_blocks.{0,1,2}.resnets.{0,1,2}}.conv_shortcut",
    "{down_blocks.{0,1}.downsamplers,up_blocks.{0,1}.upsamplers}.0.conv",
)
"""SDXL (794 layers)."""

ANY_UNET: tuple[str, ...] = (
    "conv_in",
    "conv_out",
    "{time,add}_embedding.linear_{1,2}",
    "{down_blocks.{0,1,2,3}.attentions.{0,1},up_blocks.{0,1,2,3}.attentions.{0,1,2},mid_block.attentions.0}"
    ".{proj_in,transformer_blocks.{0,1,2,3,4,5,6,7,8,9}.{attn{1,2}.to_{q,k,v,out.0},ff.net.{0.proj,2}},"
    "proj_out}",
    "{down_blocks.{0,1,2,3}.resnets.{0,1},up_blocks.{0,1,2,3}.resnets.{0,1,2},mid_block.resnets.{0,1}}"
    ".{conv1,time_emb_proj,conv2,conv_shortcut}",
    "{down_blocks.{0,1,2,3}.downsamplers,up_blocks.{0,1,2,3}.upsamplers}.0.conv",
)
"""Every UNet of up to four levels with these blocks: both of the above, their toy sizes and their kin."""

UNET_NORMS: tuple[str, ...] = (
    "conv_norm_out",
    "{down_blocks.{0,1,2,3}.attentions.{0,1},up_blocks.{0,1,2,3}.attentions.{0,1,2},mid_block.attentions.0}"
    ".{norm,transformer_blocks.{0,1,2,3,4,5,6,7,8,9}.norm{1,2,3}}",
    "{down_blocks.{0,1,2,3}.resnets.{0,1},up_blocks.{0,1,2,3}.resnets.{0,1,2},mid_block.resnets.{0,1}}.norm{1,2}",
)
"""The normalisations of every such UNet."""

CLIP_NORMS: tuple[str, ...] = (
    "text_model.encoder.layers.{0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,"
    "29,30,31}.layer_norm{1,2}",
    "text_model.final_layer_norm",
)

CLIP_TEXT: tuple[str, ...] = (
    "text_model.encoder.layers.{0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,"
    "29,30,31}.{self_attn.{q,k,v,out}_proj,mlp.fc{1,2}}",
    "text_projection",
)
"""OpenCLIP bigG, the second text encoder of SDXL; the others have fewer layers and no projection."""

CLIP_DEPTHS: dict[str, int] = {"sd1": 12, "sd2": 23}
"""Base family -> layers of its text encoder."""

FLUX_TRANSFORMER: tuple[str, ...] = (
    "{x,context}_embedder",
    "{norm_out.linear,proj_out}",
    "time_text_embed.{timestep,guidance,text}_embedder.linear_{1,2}",
    "transformer_blocks.{0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18}"
    ".{norm1.linear,norm1_context.linear,attn.{to_{q,k,v,out.0},add_{q,k,v}_proj,to_add_out},"
    "{ff,ff_context}.net.{0.proj,2}}",
    "single_transformer_blocks.{0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31,"
    "32,33,34,35,36,37}.{norm.linear,proj_mlp,proj_out,attn.to_{q,k,v}}",
)
"""Flux.1 dev (504 layers); schnell has no guidance_embedder."""

_ANY_BLOCK = "{0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31,32,33,34,35,36,37}"

ANY_TRANSFORMER: tuple[str, ...] = (
    *FLUX_TRANSFORMER[:3],
    "pos_embed.proj",
    f"transformer_blocks.{_ANY_BLOCK}.{{norm1.linear,norm1_context.linear,{{ff,ff_context}}.net.{{0.proj,2}},"
    "attn.{to_{q,k,v,out.0},add_{q,k,v}_proj,to_add_out},attn2.to_{q,k,v,out.0}}",
    FLUX_TRANSFORMER[-1],
)
"""Every transformer of these blocks: Flux.1, SD 3 and 3.5."""

T5_TEXT: tuple[str, ...] = (
    "encoder.block.{0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23}"
    ".layer.{0.SelfAttention.{q,k,v,o},1.DenseReluDense.{wi_0,wi_1,wo}}",
)
"""T5 v1.1 XXL's encoder: the last text encoder of Flux.1 and SD 3."""
