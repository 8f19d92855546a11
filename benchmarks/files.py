"""How long do `scumble inspect` and `scumble convert` take for a file of 150 MB, and how much of that is starting?

    python benchmarks/files.py                   # a minute; writes benchmarks/results/files.json

Makes a LoRA of SD 1.5's shapes (every attention and feed-forward layer of the UNet, fp16) of 150 MB. Each figure is the
median of several processes, with the memory they needed: "whole" is the command with its imports, "work" the same
command once more. On a machine that is busy with other things, the processor's seconds are those to look at. No model
is loaded: `imported` says which of the heavy libraries were.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from machine import machine

from scumble.adapters.state import AdapterState, LayerState, Metadata
from scumble.formats import write

HERE = Path(__file__).parent
HEAVY = ("torch", "diffusers", "transformers", "accelerate")
BLOCKS = [
    *((320, f"down_blocks.0.attentions.{n}") for n in range(2)),
    *((640, f"down_blocks.1.attentions.{n}") for n in range(2)),
    *((1280, f"down_blocks.2.attentions.{n}") for n in range(2)),
    (1280, "mid_block.attentions.0"),
    *((1280, f"up_blocks.1.attentions.{n}") for n in range(3)),
    *((640, f"up_blocks.2.attentions.{n}") for n in range(3)),
    *((320, f"up_blocks.3.attentions.{n}") for n in range(3)),
]
"""Width and name of every transformer in SD 1.5's UNet."""

CHILD = """
import json, resource, sys, time
def timed():
    wall, processor = time.perf_counter(), time.process_time()
    command.main(args=sys.argv[2:], standalone_mode=False)
    return time.perf_counter() - wall, time.process_time() - processor
wall = time.perf_counter()
from scumble.cli.main import load_command
command = load_command(sys.argv[1])
timed()
told = {"whole, s": time.perf_counter() - wall, "whole, processor s": time.process_time()}
told["work, s"], told["work, processor s"] = timed()  # once more, with everything imported
told["peak MiB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
told["imported"] = [name for name in HEAVY if name in sys.modules]
print(json.dumps(told), file=sys.stderr)
""".replace("HEAVY", repr(HEAVY))


def shapes() -> dict[str, tuple[int, int]]:
    """Layer path -> (out, in)."""
    found = {}
    for width, block in BLOCKS:
        inside = f"unet.{block}.transformer_blocks.0"
        for name in ("to_q", "to_k", "to_v", "to_out.0"):
            found[f"{inside}.attn1.{name}"] = (width, width)
            found[f"{inside}.attn2.{name}"] = (width, 768 if name in ("to_k", "to_v") else width)
        found[f"{inside}.ff.net.0.proj"] = (8 * width, width)
        found[f"{inside}.ff.net.2"] = (width, 4 * width)
    return found


def make(path: Path, megabytes: int) -> int:
    """Write a LoRA of about that size; its rank."""
    per_rank = sum(out + inside for out, inside in shapes().values()) * 2
    rank = round(megabytes * 1e6 / per_rank)
    rng = torch.Generator().manual_seed(0)
    layers = {
        layer: LayerState(
            "lora",
            rank,
            float(rank),
            {
                "down": torch.randn(rank, inside, generator=rng).half(),
                "up": torch.randn(out, rank, generator=rng).half(),
            },
        )
        for layer, (out, inside) in shapes().items()
    }
    write(AdapterState(layers, metadata=Metadata(base_family="sd1")), path)
    return rank


def measure(arguments: list[str], times: int) -> dict[str, object]:
    """Median seconds of the whole command (imports included) and of its work alone, memory, imports."""
    told = []
    for _ in range(times):
        done = subprocess.run(
            [sys.executable, "-c", CHILD, *arguments], check=True, capture_output=True, text=True
        )
        told.append(json.loads(done.stderr.splitlines()[-1]))
    numbers = [key for key in told[0] if key != "imported"]
    median = {key: round(statistics.median(one[key] for one in told), 3) for key in numbers}
    return {**median, "imported": told[0]["imported"]}


def bare(code: str, times: int) -> dict[str, float]:
    """Median seconds inside `python -c code`, without Python's own start."""
    timing = "import time; w, p = time.perf_counter(), time.process_time()\n"
    timing += f"{code}\nprint(time.perf_counter() - w, time.process_time() - p)"
    runs = [
        [float(word) for word in subprocess.check_output([sys.executable, "-c", timing], text=True).split()]
        for _ in range(times)
    ]
    wall, processor = (statistics.median(column) for column in zip(*runs, strict=True))
    return {"s": round(wall, 3), "processor s": round(processor, 3)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--megabytes", type=int, default=150)
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--json", type=Path, default=HERE / "results" / "files.json")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="scumble-files-") as folder:
        file, other = Path(folder) / "a.safetensors", Path(folder) / "b.safetensors"
        rank = make(file, arguments.megabytes)
        report: dict[str, object] = {
            "file": {"bytes": file.stat().st_size, "rank": rank, "layers": len(shapes()), "dtype": "fp16"},
            "import torch": bare("import torch", arguments.times),
            "inspect": measure(["inspect", str(file)], arguments.times),
        }
        for dialect in ("kohya", "diffusers"):
            convert = ["convert", str(file), "--to", dialect, "--out", str(other)]
            report[f"convert to {dialect}"] = measure([*convert, "--overwrite"], arguments.times)
    report["machine"] = machine()
    arguments.json.parent.mkdir(exist_ok=True)
    arguments.json.write_text(json.dumps(report, indent=1))
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
