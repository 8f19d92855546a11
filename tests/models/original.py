"""Turns diffusers weights into CompVis' names: the way back of diffusers' single-file loader, for small
checkpoints."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
OUTER = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}


def unet_keys(unet: UNet2DConditionModel) -> dict[str, Tensor]:
    layers = unet.config.layers_per_block + 1
    out = {}
    for key, tensor in unet.state_dict().items():
        name = key
        for ours, theirs in OUTER.items():
            name = re.sub(rf"^{re.escape(ours)}\.", f"{theirs}.", name)
        if match := re.match(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.*)", key):
            side, block, kind, index, rest = match[1], int(match[2]), match[3], int(match[4]), match[5]
            first = 1 + block * layers if side == "down" else block * layers
            blocks = "input_blocks" if side == "down" else "output_blocks"
            if kind == "resnets":
                name = f"{blocks}.{first + index}.0.{resnet(rest)}"
            elif kind == "attentions":
                name = f"{blocks}.{first + index}.1.{rest}"
            elif kind == "downsamplers":
                name = f"{blocks}.{first + layers - 1}.0.op.{rest.removeprefix('conv.')}"
            else:
                place = 2 if hasattr(unet.up_blocks[block], "attentions") else 1
                name = f"{blocks}.{first + layers - 1}.{place}.{rest}"
        elif match := re.match(r"mid_block\.(resnets|attentions)\.(\d+)\.(.*)", key):
            place = 1 if match[1] == "attentions" else 2 * int(match[2])
            name = f"middle_block.{place}.{match[3] if place == 1 else resnet(match[3])}"
        out[f"model.diffusion_model.{name}"] = tensor
    return out


def resnet(rest: str) -> str:
    part, _, end = rest.partition(".")
    return f"{RESNET[part]}.{end}"


def vae_keys(vae: AutoencoderKL) -> dict[str, Tensor]:
    levels = len(vae.config.block_out_channels)
    attention = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
    out = {}
    for key, tensor in vae.state_dict().items():
        name = key.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
        name = re.sub(r"down_blocks\.(\d+)\.resnets\.(\d+)", r"down.\1.block.\2", name)
        name = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", name)
        up = lambda m: f"up.{levels - 1 - int(m[1])}"  # noqa: E731
        name = re.sub(r"up_blocks\.(\d+)", up, name)
        name = re.sub(r"(up\.\d+)\.resnets\.", r"\1.block.", name).replace("upsamplers.0", "upsample")
        name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
        if "mid_block.attentions.0." in name:
            name = name.replace("mid_block.attentions.0.", "mid.attn_1.")
            for ours, theirs in attention.items():
                name = name.replace(f"attn_1.{ours}.", f"attn_1.{theirs}.")
            tensor = tensor[:, :, None, None] if tensor.ndim == 2 else tensor
        out[f"first_stage_model.{name}"] = tensor
    return out


def clip_keys(
    text_encoder: CLIPTextModel, prefix: str = "cond_stage_model.transformer.text_model."
) -> dict[str, Tensor]:
    names = {k.removeprefix("text_model."): v for k, v in text_encoder.state_dict().items()}
    return {f"{prefix}{name}": tensor for name, tensor in names.items()}


def open_clip_keys(
    text_encoder: CLIPTextModel | CLIPTextModelWithProjection, prefix: str = "cond_stage_model.model."
) -> dict[str, Tensor]:
    s = {k.removeprefix("text_model."): v for k, v in text_encoder.state_dict().items()}
    out = {
        "positional_embedding": s["embeddings.position_embedding.weight"],
        "token_embedding.weight": s["embeddings.token_embedding.weight"],
        "ln_final.weight": s["final_layer_norm.weight"],
        "ln_final.bias": s["final_layer_norm.bias"],
    }
    parts = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
    for layer in range(text_encoder.config.num_hidden_layers):
        ours, theirs = f"encoder.layers.{layer}", f"transformer.resblocks.{layer}"
        for end in ("weight", "bias"):
            for a, b in parts.items():
                out[f"{theirs}.{b}.{end}"] = s[f"{ours}.{a}.{end}"]
            out[f"{theirs}.attn.out_proj.{end}"] = s[f"{ours}.self_attn.out_proj.{end}"]
            qkv = [s[f"{ours}.self_attn.{p}_proj.{end}"] for p in "qkv"]
            out[f"{theirs}.attn.in_proj_{end}"] = torch.cat(qkv)
    if "text_projection.weight" in s:
        out["text_projection"] = s["text_projection.weight"].T
    return {f"{prefix}{name}": tensor for name, tensor in out.items()}


def parts(
    linear: bool, rows: int = 520, seed: int = 0, channels: int = 4
) -> tuple[UNet2DConditionModel, AutoencoderKL, CLIPTextModel]:
    """Small parts with the head counts that a single file can't say: 8 heads (SD 1), heads of 64 channels (SD
    2)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = UNet2DConditionModel(
            sample_size=64,
            in_channels=channels,
            block_out_channels=(64, 128) if linear else (32, 64),
            layers_per_block=2,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=64,
            attention_head_dim=[1, 2] if linear else 8,
            use_linear_projection=linear,
            upcast_attention=linear,
        )
        vae = AutoencoderKL(
            block_out_channels=(32, 32, 64),
            layers_per_block=1,
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            latent_channels=4,
        )
        text = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=rows,
                hidden_size=64,
                intermediate_size=96,
                num_hidden_layers=2,
                num_attention_heads=1,
                hidden_act="gelu" if linear else "quick_gelu",
                bos_token_id=rows - 2,
                eos_token_id=rows - 1,
                pad_token_id=rows - 1,
            )
        )
    return unet.eval(), vae.eval(), text.eval()


def write(
    path: Path,
    linear: bool,
    metadata: dict[str, str] | None = None,
    drop: str = "",
    channels: int = 4,
    **more: Tensor,
) -> Path:
    """A single-file checkpoint of small parts; tensors whose names begin with `drop` are left out."""
    unet, vae, text = parts(linear, channels=channels)
    words = open_clip_keys(text) if linear else clip_keys(text)
    tensors = unet_keys(unet) | vae_keys(vae) | words | {"alphas_cumprod": torch.ones(1000)} | more
    kept = {k: v.clone().contiguous() for k, v in tensors.items() if not (drop and k.startswith(drop))}
    save_file(kept, path, metadata)
    return path


def parts_xl(rows: int = 520, seed: int = 0, channels: int = 4) -> dict[str, Any]:
    """Small parts of an SDXL base, by diffusers' names."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = UNet2DConditionModel(
            sample_size=128,
            in_channels=channels,
            block_out_channels=(64, 128),
            layers_per_block=2,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=64 + 128,
            attention_head_dim=[1, 2],
            transformer_layers_per_block=[1, 2],
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=6 * 256 + 32,
        )
        vae = parts(False)[1]
        sizes = {
            "vocab_size": rows,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "bos_token_id": rows - 2,
            "eos_token_id": rows - 1,
            "pad_token_id": rows - 1,
        }
        first = CLIPTextModel(CLIPTextConfig(hidden_size=64, num_attention_heads=1, **sizes))
        second = CLIPTextModelWithProjection(
            CLIPTextConfig(
                hidden_size=128, num_attention_heads=2, hidden_act="gelu", projection_dim=32, **sizes
            )
        )
    found = {"unet": unet, "vae": vae, "text_encoder": first, "text_encoder_2": second}
    return {name: module.eval() for name, module in found.items()}


def write_xl(path: Path, metadata: dict[str, str] | None = None, drop: str = "", channels: int = 4) -> Path:
    """A single-file checkpoint of `parts_xl`; tensors whose names begin with `drop` are left out."""
    made = parts_xl(channels=channels)
    tensors = unet_keys(made["unet"]) | vae_keys(made["vae"])
    tensors |= clip_keys(made["text_encoder"], "conditioner.embedders.0.transformer.text_model.")
    tensors |= open_clip_keys(made["text_encoder_2"], "conditioner.embedders.1.model.")
    kept = {k: v.clone().contiguous() for k, v in tensors.items() if not (drop and k.startswith(drop))}
    save_file(kept, path, metadata)
    return path
