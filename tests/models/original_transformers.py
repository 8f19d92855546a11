"""Turns diffusers' transformers into the names of Stability AI (SD 3) and Black Forest Labs (Flux.1): the way back of
diffusers' single-file loader, for small checkpoints."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from scumble.models.family import Components
from scumble.models.flux import tiny_flux
from scumble.models.sd3 import T5, tiny_sd3
from scumble.models.tiny import tiny_clip
from tests.models.original import vae_keys

State = Mapping[str, Tensor]

CLIP_L, CLIP_G, T5XXL = (f"text_encoders.{name}.transformer." for name in ("clip_l", "clip_g", "t5xxl"))

SD3_OUTER = {
    "pos_embed.pos_embed": "pos_embed",
    "pos_embed.proj": "x_embedder.proj",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
    "context_embedder": "context_embedder",
    "proj_out": "final_layer.linear",
}
SD3_BLOCK = {
    "attn.norm_q": "x_block.attn.ln_q",
    "attn.norm_k": "x_block.attn.ln_k",
    "attn.norm_added_q": "context_block.attn.ln_q",
    "attn.norm_added_k": "context_block.attn.ln_k",
    "attn.to_out.0": "x_block.attn.proj",
    "attn.to_add_out": "context_block.attn.proj",
    "attn2.norm_q": "x_block.attn2.ln_q",
    "attn2.norm_k": "x_block.attn2.ln_k",
    "attn2.to_out.0": "x_block.attn2.proj",
    "norm1.linear": "x_block.adaLN_modulation.1",
    "norm1_context.linear": "context_block.adaLN_modulation.1",
    "ff.net.0.proj": "x_block.mlp.fc1",
    "ff.net.2": "x_block.mlp.fc2",
    "ff_context.net.0.proj": "context_block.mlp.fc1",
    "ff_context.net.2": "context_block.mlp.fc2",
}
SD3_JOINED = {
    "x_block.attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "context_block.attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "x_block.attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
}
FLUX_OUTER = {
    "time_text_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_text_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "time_text_embed.text_embedder.linear_1": "vector_in.in_layer",
    "time_text_embed.text_embedder.linear_2": "vector_in.out_layer",
    "time_text_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
    "time_text_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
    "context_embedder": "txt_in",
    "x_embedder": "img_in",
    "proj_out": "final_layer.linear",
}
FLUX_DOUBLE = {
    "norm1.linear": "img_mod.lin",
    "norm1_context.linear": "txt_mod.lin",
    "attn.norm_q": "img_attn.norm.query_norm",
    "attn.norm_k": "img_attn.norm.key_norm",
    "attn.norm_added_q": "txt_attn.norm.query_norm",
    "attn.norm_added_k": "txt_attn.norm.key_norm",
    "attn.to_out.0": "img_attn.proj",
    "attn.to_add_out": "txt_attn.proj",
    "ff.net.0.proj": "img_mlp.0",
    "ff.net.2": "img_mlp.2",
    "ff_context.net.0.proj": "txt_mlp.0",
    "ff_context.net.2": "txt_mlp.2",
}
FLUX_DOUBLE_JOINED = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
}
FLUX_SINGLE = {
    "norm.linear": "modulation.lin",
    "attn.norm_q": "norm.query_norm",
    "attn.norm_k": "norm.key_norm",
    "proj_out": "linear2",
}
FLUX_SINGLE_JOINED = {"linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")}


def _swapped(tensor: Tensor) -> Tensor:
    """The two halves of the rows the other way round: scale and shift."""
    return torch.cat(tensor.chunk(2)[::-1])


def _renamed(state: State, names: Mapping[str, str]) -> dict[str, Tensor]:
    out = {}
    for theirs, ours in names.items():
        for key, tensor in state.items():
            if key == theirs or key.startswith(f"{theirs}."):
                out[ours + key[len(theirs) :]] = tensor
    return out


def _joined(state: State, names: Mapping[str, Iterable[str]]) -> dict[str, Tensor]:
    return {
        f"{one}.{end}": torch.cat([state[f"{part}.{end}"] for part in parts])
        for one, parts in names.items()
        for end in ("weight", "bias")
        if all(f"{part}.{end}" in state for part in parts)
    }


def _blocks(state: State, pattern: str) -> dict[int, dict[str, Tensor]]:
    found: dict[int, dict[str, Tensor]] = {}
    for key, tensor in state.items():
        if match := re.match(rf"{pattern}\.(\d+)\.(.*)", key):
            found.setdefault(int(match[1]), {})[match[2]] = tensor
    return found


def sd3_keys(transformer: nn.Module) -> dict[str, Tensor]:
    state = dict(transformer.state_dict())
    out = _renamed(state, SD3_OUTER)
    blocks = _blocks(state, "transformer_blocks")
    for index, block in blocks.items():
        made = _renamed(block, SD3_BLOCK) | _joined(block, SD3_JOINED)
        if index == max(blocks):
            for end in ("weight", "bias"):
                name = f"context_block.adaLN_modulation.1.{end}"
                made[name] = _swapped(made[name])
        out |= {f"joint_blocks.{index}.{key}": tensor for key, tensor in made.items()}
    for end in ("weight", "bias"):
        out[f"final_layer.adaLN_modulation.1.{end}"] = _swapped(state[f"norm_out.linear.{end}"])
    return out


def flux_keys(transformer: nn.Module) -> dict[str, Tensor]:
    state = dict(transformer.state_dict())
    out = _renamed(state, FLUX_OUTER)
    kinds = (
        ("transformer_blocks", "double_blocks", FLUX_DOUBLE, FLUX_DOUBLE_JOINED),
        ("single_transformer_blocks", "single_blocks", FLUX_SINGLE, FLUX_SINGLE_JOINED),
    )
    for theirs, ours, names, joined in kinds:
        for index, block in _blocks(state, theirs).items():
            made = _renamed(block, names) | _joined(block, joined)
            out |= {
                f"{ours}.{index}.{re.sub('_norm.weight$', '_norm.scale', key)}": tensor
                for key, tensor in made.items()
            }
    for end in ("weight", "bias"):
        out[f"final_layer.adaLN_modulation.1.{end}"] = _swapped(state[f"norm_out.linear.{end}"])
    return out


def _prefixed(tensors: State, prefix: str) -> dict[str, Tensor]:
    return {prefix + key: tensor for key, tensor in tensors.items()}


def clip_keys(encoder: nn.Module, prefix: str) -> dict[str, Tensor]:
    """A CLIP text encoder in transformers' classic names."""
    state = encoder.state_dict()
    return {
        prefix + (key if key.startswith(("text_model.", "text_projection")) else f"text_model.{key}"): tensor
        for key, tensor in state.items()
        if not key.endswith("position_ids")
    }


def sd3_parts(seed: int = 0, *, t5: bool = True) -> Components:
    """A tiny SD 3 with what a single file can't say as published: heads of 64, CLIP-L's pooled embedding as it is."""
    parts = tiny_sd3(seed, t5=t5)
    first, second = (parts.tokenizers[name] for name in ("tokenizer", "tokenizer_2"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        clip_l = CLIPTextModelWithProjection(tiny_clip(first, 24, "quick_gelu", num_attention_heads=1))
        clip_g = CLIPTextModelWithProjection(
            tiny_clip(second, 32, "gelu", projection_dim=40, num_attention_heads=1)
        )
    with torch.no_grad():
        clip_l.text_projection.weight.copy_(torch.eye(24))
    return replace(parts, modules={**parts.modules, "text_encoder": clip_l, "text_encoder_2": clip_g})


def flux_parts(seed: int = 0, *, guided: bool = True) -> Components:
    """A tiny Flux.1 with what a single file can't say as published: heads of 64, dev's noise levels."""
    parts = tiny_flux(seed, guided=guided)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        clip = CLIPTextModel(
            tiny_clip(parts.tokenizers["tokenizer"], 24, "quick_gelu", num_attention_heads=1)
        )
    scheduler = FlowMatchEulerDiscreteScheduler(
        shift=3.0 if guided else 1.0,
        use_dynamic_shifting=guided,
        base_shift=0.5,
        max_shift=1.15,
        base_image_seq_len=256,
        max_image_seq_len=4096,
    )
    return replace(parts, modules={**parts.modules, "text_encoder": clip}, scheduler=scheduler)


def sd3_tensors(parts: Components) -> dict[str, Tensor]:
    """The tensors of a whole single file, as sd3_medium_incl_clips_t5xxlfp16 names them."""
    modules: Mapping[str, Any] = parts.modules
    out = _prefixed(sd3_keys(modules["transformer"]), "model.diffusion_model.") | vae_keys(modules["vae"])
    clip_l = {k: v for k, v in clip_keys(modules["text_encoder"], CLIP_L).items() if "projection" not in k}
    out |= clip_l | clip_keys(modules["text_encoder_2"], CLIP_G)
    return out | (_prefixed(modules[T5].state_dict(), T5XXL) if T5 in modules else {})


def flux_tensors(parts: Components) -> dict[str, Tensor]:
    """The tensors of a whole single file, as ComfyUI writes it."""
    modules: Mapping[str, Any] = parts.modules
    out = _prefixed(flux_keys(modules["transformer"]), "model.diffusion_model.")
    vae = {key.replace("first_stage_model.", "vae."): t for key, t in vae_keys(modules["vae"]).items()}
    clip = clip_keys(modules["text_encoder"], CLIP_L)
    extra = {
        f"{CLIP_L}text_projection.weight": torch.eye(24),
        "text_encoders.clip_l.logit_scale": torch.ones(()),
    }
    return out | vae | clip | extra | _prefixed(modules["text_encoder_2"].state_dict(), T5XXL)


def write(path: Path, tensors: State, change: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> Path:
    save_file(
        {key: change(tensor).clone().contiguous() for key, tensor in tensors.items()}, path, {"format": "pt"}
    )
    return path
