"""A whole training step at SD 1.5's shape: scumble's, with cached inputs, beside what diffusers' script does each step.

    python benchmarks/whole_step.py --dtype bf16 --pixels 256 --repeats 5

diffusers' train_text_to_image_lora.py encodes the picture with the VAE and the caption with the text encoder in every
step, then trains through peft; scumble encodes both once and keeps them. Both arms share one UNet's weights (random
ones: time does not depend on them) in one process and take turns; what is compared is the ratio in each repetition.
Needs about 5.5 GB in fp32. Writes benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDPMScheduler
from machine import machine
from training_step import DTYPES, RESULTS, as_in_a_base, build, measure, twin
from transformers import CLIPTextConfig, CLIPTextModel

from scumble.adapters import Adapter, LoraSettings


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--pixels", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    dtype, device = DTYPES[options.dtype], torch.device("cpu")
    torch.manual_seed(0)
    unet = build("sd15", dtype, device)
    vae = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=4,
    )
    vae = vae.to(dtype).requires_grad_(False)
    text_encoder = CLIPTextModel(
        CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
    )
    text_encoder = text_encoder.to(dtype).requires_grad_(False)
    schedule = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    pixels = torch.rand(1, 3, options.pixels, options.pixels, dtype=dtype) * 2 - 1
    words = torch.randint(0, 49000, (1, 77))

    def noised(latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        noise, t = torch.randn_like(latents), torch.randint(0, 1000, (1,))
        return schedule.add_noise(latents, noise, t), noise, t

    theirs = twin(unet)
    from peft import LoraConfig

    theirs.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    their_parameters = [p for p in theirs.parameters() if p.requires_grad]
    their_optimizer = torch.optim.AdamW(their_parameters, 1e-4)

    def script() -> None:
        latents = vae.encode(pixels).latent_dist.sample() * vae.config.scaling_factor
        noisy, noise, t = noised(latents)
        states = text_encoder(words, return_dict=False)[0]
        F.mse_loss(theirs(noisy, t, states).sample.float(), noise.float()).backward()
        torch.nn.utils.clip_grad_norm_(their_parameters, 1.0)
        their_optimizer.step()
        their_optimizer.zero_grad()

    ours = twin(unet)
    as_in_a_base(ours)
    adapter = Adapter.inject({"unet": ours}, "attention", LoraSettings(rank=4))
    our_parameters = list(adapter.parameters())
    our_optimizer = torch.optim.AdamW(our_parameters, 1e-4, fused=True)
    with torch.no_grad():
        cached = vae.encode(pixels).latent_dist.mean * vae.config.scaling_factor
        cached_states = text_encoder(words, return_dict=False)[0]

    def scumble() -> None:
        noisy, noise, t = noised(cached)
        F.mse_loss(ours(noisy, t, cached_states).sample.float(), noise.float()).backward()
        torch.nn.utils.clip_grad_norm_(our_parameters, 1.0)
        our_optimizer.step()
        our_optimizer.zero_grad()

    seconds = measure({"script": script, "scumble": scumble}, options.repeats, 2, device)
    ratios = [a / b for a, b in zip(seconds["script"], seconds["scumble"], strict=True)]
    middle = statistics.median(ratios)
    print(
        f"script/scumble median {middle:.2f}   from {min(ratios):.2f} to {max(ratios):.2f}   n={len(ratios)}"
    )
    result = {
        "benchmark": "whole_step",
        "what": {"dtype": options.dtype, "pixels": options.pixels, "rank": 4, "batch": 1},
        "script/scumble": {"median": middle, "least": min(ratios), "most": max(ratios)},
        "seconds": seconds,
        "machine": machine(),
    }
    path = options.output or RESULTS / f"whole_step-{options.dtype}-{options.pixels}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
