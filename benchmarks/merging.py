"""How much memory does merging into an SDXL base take? `scumble merge` on a checkpoint of SDXL's shapes, watched.

    python benchmarks/merging.py               # some minutes, 11 GB of disk; writes benchmarks/results/merging.json
    python benchmarks/merging.py --base toy    # the same on a toy, in seconds
    python benchmarks/merging.py --layout file --base shallow --json benchmarks/results/merging_file.json

The UNet (2.57 billion numbers, fp16, 5.1 GB; "shallow" has SDXL's widths and fewer transformer layers, 0.9 billion) is
written with random numbers in a folder of diffusers' layout, or in a single file under the original code's names, one
tensor at a time; a rank-16 LoRA of every attention and feed-forward layer is
merged into it by the command in a process of its own, whose peak memory the system tells. The result is compared with
W + s up down, computed in fp64, on some layers, and every other tensor must be there bit for bit.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from machine import machine

from scumble.adapters.state import AdapterState, LayerState, Metadata
from scumble.formats import write
from scumble.formats.flat_names import original_name
from scumble.formats.stream import write_streamed
from scumble.tensor_files.lazy_tensors import LazyTensors

HERE = Path(__file__).parent
LIMIT = 8 * 2**30
SDXL: dict[str, Any] = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
SHALLOW = SDXL | {"transformer_layers_per_block": (1, 1, 2)}
TOY = SDXL | {
    "sample_size": 8,
    "block_out_channels": (64, 128, 128),
    "transformer_layers_per_block": (1, 1, 2),
    "attention_head_dim": (1, 2, 2),
}
BASES = {"sdxl": SDXL, "shallow": SHALLOW, "toy": TOY}
WEIGHTS = Path("unet") / "diffusion_pytorch_model.safetensors"
CHILD = """
import json, resource, sys, time
start = time.perf_counter(), time.process_time()
from scumble.cli.main import load_command
load_command("merge").main(args=sys.argv[1:], standalone_mode=False)
told = {"s": time.perf_counter() - start[0], "processor s": time.process_time() - start[1]}
told["peak bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps(told), file=sys.stderr)
"""


def in_file(name: str) -> str:
    """What a single checkpoint calls a tensor of the UNet."""
    module, _, kind = name.rpartition(".")
    return f"model.diffusion_model.{original_name(module)}.{kind}"


def write_base(base: Path, sizes: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """A base with random fp16 weights, a folder or a single file; the shapes of its UNet's tensors under diffusers'
    names."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(**sizes)
    single = base.suffix == ".safetensors"
    if not single:
        unet.save_config(base / "unet")
        (base / "model_index.json").write_text(
            json.dumps(
                {
                    "_class_name": "StableDiffusionXLPipeline",
                    "_diffusers_version": "0.30.0",
                    "unet": ["diffusers", "UNet2DConditionModel"],
                }
            )
        )
    shapes = {name: tuple(tensor.shape) for name, tensor in unet.state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    # a few millions of random numbers, again and again from another place: time does not depend on them
    pool = (0.02 * torch.randn(2**22 + 4099, generator=generator)).half()

    entries = {in_file(name) if single else name: (torch.float16, shape) for name, shape in shapes.items()}

    def values(name: str) -> torch.Tensor:
        shape = entries[name][1]
        count = torch.Size(shape).numel()
        start = int(torch.randint(4099, (1,), generator=generator))
        repeats = -(-count // 2**22)
        return pool[start : start + 2**22].repeat(repeats)[:count].view(shape)

    write_streamed(base if single else base / WEIGHTS, entries, values, {"format": "pt"})
    return shapes


def write_lora(path: Path, shapes: Mapping[str, tuple[int, ...]], rank: int) -> AdapterState:
    """A LoRA of every attention and feed-forward layer."""
    generator = torch.Generator().manual_seed(1)
    layers = {}
    for name, shape in shapes.items():
        path_of = f"unet.{name.removesuffix('.weight')}"
        if name.endswith(".weight") and (".attn" in name or ".ff." in name) and len(shape) == 2:
            down = torch.randn(rank, shape[1], generator=generator) * 0.1
            up = torch.randn(shape[0], rank, generator=generator) * 0.1
            tensors = {"down": down.half(), "up": up.half()}
            layers[path_of] = LayerState("lora", rank, float(rank), tensors)
    state = AdapterState(layers, metadata=Metadata(base_family="sdxl"))
    write(state, path)
    return state


def check(base: Path, merged: Path, state: AdapterState, strength: float) -> dict[str, object]:
    """Some layers against fp64, everything else bit for bit.

    Raises:
        AssertionError: the merge is wrong.
    """
    before, after = LazyTensors(base), LazyTensors(merged)
    assert list(before) == list(after)
    named = in_file if base.name != WEIGHTS.name else str
    changed = {named(f"{path.removeprefix('unet.')}.weight"): layer for path, layer in state.layers.items()}
    worst, equal = 0.0, 0
    for name in before:
        if name not in changed:
            assert torch.equal(before[name], after[name]), name
            equal += 1
    for name in list(changed)[:: max(1, len(changed) // 12)]:
        layer = changed[name]
        up, down = layer.tensors["up"].double(), layer.tensors["down"].double()
        exact = before[name].double() + strength * layer.scale * (up @ down)
        rounding = torch.finfo(torch.float16).eps * exact.abs() + 1e-7
        worst = max(worst, float(((after[name].double() - exact).abs() / rounding).max()))
    assert worst <= 1.0, f"off by {worst:.2f} fp16 roundings"
    return {
        "layers changed": len(changed),
        "tensors equal": equal,
        "worst error in fp16 roundings": round(worst, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", choices=BASES, default="sdxl")
    parser.add_argument("--layout", choices=("folder", "file"), default="folder")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument(
        "--folder", type=Path, help="where the files go, removed afterwards; default the system's"
    )
    parser.add_argument("--json", type=Path, default=HERE / "results" / "merging.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="scumble-merging-", dir=options.folder) as name:
        ending = ".safetensors" if options.layout == "file" else ""
        base, out = Path(name) / f"base{ending}", Path(name) / f"merged{ending}"
        lora = Path(name) / "lora.safetensors"
        start = time.perf_counter()
        shapes = write_base(base, BASES[options.base])
        print(f"wrote the base in {time.perf_counter() - start:.0f} s", flush=True)
        state = write_lora(lora, shapes, options.rank)
        arguments = [f"{lora}:0.8", "--into", str(base), "--out", str(out)]
        done = subprocess.run([sys.executable, "-c", CHILD, *arguments], capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stderr)
        told = json.loads(done.stderr.splitlines()[-1])
        before, after = (base, out) if ending else (base / WEIGHTS, out / WEIGHTS)
        report = {
            "base": options.base,
            "layout": options.layout,
            "rank": options.rank,
            "base bytes": before.stat().st_size,
            "lora bytes": lora.stat().st_size,
            **{key: round(value, 1) for key, value in told.items()},
            "peak GiB": round(told["peak bytes"] / 2**30, 2),
            "within 8 GiB": told["peak bytes"] < LIMIT,
            **check(before, after, state, 0.8),
            "machine": machine(),
        }
    options.json.parent.mkdir(exist_ok=True, parents=True)
    options.json.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
