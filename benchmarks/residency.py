"""What is in memory during a training step that need not be there: the VAE, the text encoders, the denoiser's blocks.

    python benchmarks/residency.py             # some minutes, 2 GB; writes benchmarks/results/residency.json

Two parts. `steps`: the peak of the process's memory in training steps on cached latents and captions, on the CPU in
bf16, with everything there (`staying`) and with what has done its work away (`resting`); each in a process of its own,
in turns. The UNet has half of SD 1.5's widths, the text encoder is SD 1.5's, the VAE has half of its widths. `blocks`:
counted from the shapes alone, in bf16, what `offload = "blocks"` leaves on the device at full size; no GPU is needed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from bases import write_sd1
from machine import machine
from torch import nn

HERE = Path(__file__).parent
BF16 = 2


def child(folder: Path, resting: bool, steps: int) -> None:
    """One process: prints what it measured as JSON."""
    torch.set_num_threads(1)
    from scumble.adapters import Adapter, LoraSettings
    from scumble.models.family import Frame
    from scumble.models.heap import give_back
    from scumble.models.loading import load_base

    base = load_base(folder, dtype=torch.bfloat16, device="cpu")
    adapter = Adapter.inject(base.roots, "attention", LoraSettings(rank=4))
    base.train_memory(checkpointing=True)
    with torch.no_grad():
        text = base.encode_prompts(["a picture"])
        latents = base.encode_images(torch.zeros(1, 3, 256, 256), None)
    away = base.rest(pictures=True, text=True) if resting else ()
    give_back()
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted anew
    begun = memory("VmRSS")
    seconds = []
    for _ in range(steps):
        since = time.process_time()
        t = base.prediction.from_uniform(torch.tensor([0.5]))
        base.denoise(latents, t, text, Frame.plain(1, 256, 256)).square().mean().backward()
        seconds.append(time.process_time() - since)
        for parameter in adapter.parameters():
            parameter.grad = None
    peak, woken = memory("VmHWM"), time.process_time()
    with torch.no_grad():
        base.encode_prompts(["a picture"])
        base.decode_latents(latents)
    told = {
        "away": list(away),
        "MiB before the first step": begun,
        "peak MiB in steps": peak,
        "step, processor s": min(seconds),
        "a prompt and a picture afterwards, processor s": time.process_time() - woken,
    }
    print(json.dumps(told))


def memory(what: str) -> float:
    """MiB of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(what):
            return int(line.split()[1]) / 1024
    raise SystemExit(f"/proc/self/status has no {what}")


def measured(turns: int, steps: int) -> dict[str, Any]:
    """Both ways, in turns."""
    found: dict[str, list[dict[str, Any]]] = {"staying": [], "resting": []}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "base"
        write_sd1(
            folder,
            dtype=torch.bfloat16,
            widths=(160, 320, 640, 640),
            vae=(64, 128, 256, 256),
            sample_size=32,
        )
        sizes = {
            part: sum(file.stat().st_size for file in (folder / part).glob("*.safetensors")) / 2**20
            for part in ("unet", "vae", "text_encoder")
        }
        for _ in range(turns):
            for way in found:
                done = subprocess.run(
                    [sys.executable, __file__, "--child", str(folder), "--way", way, "--steps", str(steps)],
                    capture_output=True,
                    text=True,
                    check=True,
                )
                found[way].append(json.loads(done.stdout.splitlines()[-1]))
                print(way, found[way][-1], flush=True)
    key = "peak MiB in steps"
    peaks = {way: statistics.median(one[key] for one in rows) for way, rows in found.items()}
    return {
        "MiB of the files": sizes,
        "runs": found,
        key: peaks,
        "saved MiB": peaks["staying"] - peaks["resting"],
    }


def blocks() -> dict[str, Any]:
    """Full-size denoisers in bf16, from their shapes: MiB that stay on the device, and of the two blocks that are there
    at a time at most."""
    from diffusers import FluxTransformer2DModel, UNet2DConditionModel

    from scumble.models.flux import FluxBase
    from scumble.models.sdxl import SDXLBase
    from scumble.models.unet import UNetBase

    sdxl = dict(
        block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(5, 10, 20),
        cross_attention_dim=2048,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )
    with torch.device("meta"):
        denoisers: dict[str, tuple[type, nn.Module]] = {
            "SD 1.5": (UNetBase, UNet2DConditionModel(cross_attention_dim=768)),
            "SDXL": (SDXLBase, UNet2DConditionModel(**sdxl)),
            "Flux.1": (FluxBase, FluxTransformer2DModel(guidance_embeds=True)),
        }
    found = {}
    for name, (base, denoiser) in denoisers.items():
        shell = base.__new__(base)
        shell.roots = {"denoiser": denoiser}
        sizes = [BF16 * sum(p.numel() for p in part.parameters()) / 2**20 for part in shell.movable]
        whole = BF16 * sum(p.numel() for p in denoiser.parameters()) / 2**20
        found[name] = {
            "denoiser MiB": round(whole),
            "blocks": len(sizes),
            "MiB in blocks": round(sum(sizes)),
            "MiB that stay": round(whole - sum(sizes)),
            "MiB of the two largest blocks": round(sum(sorted(sizes)[-2:])),
            "MiB sent in a step": round(2 * sum(sizes)),
        }
        print(name, found[name], flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--way", help=argparse.SUPPRESS)
    told = parser.parse_args()
    if told.child:
        child(told.child, told.way == "resting", told.steps)
        return
    result = {"machine": machine(), "blocks": blocks(), "steps": measured(told.turns, told.steps)}
    path = HERE / "results/residency.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"written: {path}")


if __name__ == "__main__":
    main()
