"""Whether SDXL fits: one training step and one drawing step at its full shape, in bf16, on a CPU.

    python benchmarks/sdxl_step.py
    python benchmarks/sdxl_step.py --tiny        # the same in toy sizes, in seconds

The base has the published shapes and random weights (neither time nor memory depend on them), made without ever holding
them in fp32. A LoRA of rank 4 on the UNet's attention takes one whole step, text encoders included; then the session
draws one step with guidance. Latents are 32x32: 256 pixels. Needs about 12 GB. Writes benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, UNet2DConditionModel
from machine import machine
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from scumble.adapters import Adapter, LoraSettings
from scumble.data.record import Batch
from scumble.inference.request import Request
from scumble.inference.session import Session
from scumble.models.family import BaseModel, Components, Frame
from scumble.models.sdxl import SDXL
from scumble.models.tiny import tiny_tokenizer
from scumble.rng import Streams
from scumble.training.objective import DenoisingObjective

RESULTS = Path(__file__).parent / "results"
BLOCKS = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
}
PUBLISHED: Mapping[str, dict[str, Any]] = {
    "unet": {
        **BLOCKS,
        "sample_size": 128,
        "block_out_channels": (320, 640, 1280),
        "attention_head_dim": (5, 10, 20),
        "transformer_layers_per_block": (1, 2, 10),
        "cross_attention_dim": 768 + 1280,
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 6 * 256 + 1280,
    },
    "vae": {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "sample_size": 1024},
    "text_encoder": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "projection_dim": 768,
        "hidden_act": "quick_gelu",
        "vocab_size": 49408,
    },
    "text_encoder_2": {
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "num_attention_heads": 20,
        "projection_dim": 1280,
        "hidden_act": "gelu",
        "vocab_size": 49408,
        "eos_token_id": 2,
    },
}
"""The configs of stabilityai/stable-diffusion-xl-base-1.0, as far as they say anything of shapes."""
TEXT = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 520}
TINY: Mapping[str, dict[str, Any]] = {
    "unet": {
        **BLOCKS,
        "sample_size": 8,
        "block_out_channels": (32, 32, 64),
        "attention_head_dim": (1, 2, 4),
        "transformer_layers_per_block": (1, 1, 2),
        "cross_attention_dim": 32 + 48,
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + 24,
    },
    "vae": {"block_out_channels": (32, 32, 64, 64), "layers_per_block": 1, "sample_size": 64},
    "text_encoder": {"hidden_size": 32, "projection_dim": 32, "hidden_act": "quick_gelu", **TEXT},
    "text_encoder_2": {
        "hidden_size": 48,
        "projection_dim": 24,
        "hidden_act": "gelu",
        "eos_token_id": 2,
        **TEXT,
    },
}


def shaped(kind: Any, config: Mapping[str, Any]) -> nn.Module:
    """A module of this class and config without numbers, on the meta device."""
    with torch.device("meta"):
        if issubclass(kind, CLIPTextModel | CLIPTextModelWithProjection):
            module: nn.Module = kind(CLIPTextConfig(**config))
        else:
            module = kind(**config)
    return module


def shapes(configs: Mapping[str, dict[str, Any]]) -> dict[str, nn.Module]:
    """SDXL's parts by these configs, on the meta device."""
    levels = len(configs["vae"]["block_out_channels"])
    vae = {
        **configs["vae"],
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "latent_channels": 4,
        "scaling_factor": 0.13025,
    }
    return {
        "unet": shaped(UNet2DConditionModel, configs["unet"]),
        "vae": shaped(AutoencoderKL, vae),
        "text_encoder": shaped(CLIPTextModel, configs["text_encoder"]),
        "text_encoder_2": shaped(CLIPTextModelWithProjection, configs["text_encoder_2"]),
    }


@torch.no_grad()
def filled(module: nn.Module) -> nn.Module:
    """The module in bf16 on the CPU with small random weights."""
    module = module.to(torch.bfloat16).to_empty(device="cpu")
    for name, parameter in module.named_parameters():
        if parameter.ndim == 1:
            parameter.fill_(float(name.endswith("weight")))  # norms; biases are 0
        else:
            parameter.normal_(std=0.02)
    for part in module.modules():
        positions = part._buffers.get("position_ids")  # the only buffer of these classes
        if positions is not None:
            part.register_buffer("position_ids", torch.arange(positions.shape[-1])[None], persistent=False)
    return module


def build(configs: Mapping[str, dict[str, Any]], *, weights: bool = True) -> BaseModel:
    """A base by these configs: in bf16 on the CPU, or without numbers on the meta device."""
    torch.manual_seed(0)
    modules = shapes(configs)
    parts = Components(
        name="random SDXL",
        modules={name: filled(module) for name, module in modules.items()} if weights else modules,
        tokenizers={"tokenizer": tiny_tokenizer(), "tokenizer_2": tiny_tokenizer("!")},
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="leading"
        ),
    )
    device = torch.device("cpu" if weights else "meta")
    return SDXL.load(parts, dtype=torch.bfloat16, device=device)


def peak() -> float:
    """The most memory that this process has held, in GB of 10^9 bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def train_step(base: BaseModel, side: int) -> dict[str, float]:
    """One whole step: captions, noise, forward, backward, optimizer. Times in seconds."""
    adapter = Adapter.inject(base.roots, "attention", LoraSettings(rank=4))
    base.train_memory(checkpointing=True)
    optimizer = torch.optim.AdamW(adapter.parameters(), 1e-4)
    objective = DenoisingObjective(base, Streams(0))
    pixels = side * base.latent_factor
    batch = Batch(
        latents=torch.randn(1, base.latent_channels, side, side),
        conditioning=None,
        captions=("a picture",),
        frame=Frame.plain(1, pixels, pixels),
        weight=torch.ones(1),
        keys=("a picture",),
        positions=(0,),
    )
    begun = time.perf_counter()
    loss = objective(batch).sum()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(adapter.parameters(), 1.0)
    optimizer.step()
    seconds = time.perf_counter() - begun
    base.train_memory(checkpointing=False)
    found = {
        "layers": len(adapter),
        "parameters": adapter.parameter_count,
        "loss": loss.item(),
        "gradient norm": norm.item(),
    }
    adapter.eject()
    return {**found, "seconds": seconds}


def draw_step(base: BaseModel, side: int) -> dict[str, Any]:
    """One denoising step with guidance, and the VAE's decoder, as the session draws. Times in seconds."""
    pixels = side * base.latent_factor
    begun = time.perf_counter()
    with Session(base) as session:
        (drawing,) = session.generate(
            Request(prompt="a picture", negative="text", steps=1, guidance=5.0, width=pixels, height=pixels)
        )
    return {"seconds": time.perf_counter() - begun, "notes": list(drawing.notes)}


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tiny", action="store_true", help="toy sizes, to see that it works")
    parser.add_argument("--latents", type=int, default=32, help="side of the latents")
    parser.add_argument("--output", type=Path, help="the JSON file; default in benchmarks/results/")
    options = parser.parse_args(arguments)
    begun = time.perf_counter()
    base = build(TINY if options.tiny else PUBLISHED)
    built = time.perf_counter() - begun
    found: dict[str, Any] = {
        "command": "python benchmarks/sdxl_step.py" + (" --tiny" if options.tiny else ""),
        "dtype": "bf16",
        "latents": options.latents,
        "parameters": {name: sum(p.numel() for p in root.parameters()) for name, root in base.roots.items()},
        "build": {"seconds": built, "peak GB": peak()},
    }
    found["training step"] = {**train_step(base, options.latents), "peak GB": peak()}
    found["drawing step"] = {**draw_step(base, options.latents), "peak GB": peak()}
    found["machine"] = machine()
    output = options.output or RESULTS / f"sdxl_step{'-tiny' if options.tiny else ''}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps({name: found[name] for name in ("build", "training step", "drawing step")}, indent=1))
    return found


if __name__ == "__main__":
    main()
