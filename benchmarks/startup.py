"""How long a person waits before scumble does anything: `--help`, `import scumble`, `scumble inspect`.

    python benchmarks/startup.py

Each command as a whole process, interleaved with `python -c pass`, median of the repeats; writes
`benchmarks/results/startup.json`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

from machine import machine

HERE = Path(__file__).parent
COMMANDS = {
    "python -c pass": ["-c", "pass"],
    "import scumble": ["-c", "import scumble"],
    "scumble --help": ["-m", "scumble", "--help"],
    "import torch": ["-c", "import torch"],
    "import diffusers' pipeline": ["-c", "from diffusers import StableDiffusionPipeline"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=Path, default=HERE / "results" / "startup.json")
    arguments = parser.parse_args()
    seconds: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(arguments.repeats):
        for name, command in COMMANDS.items():
            began = time.perf_counter()
            subprocess.run([sys.executable, *command], check=True, capture_output=True)
            seconds[name].append(time.perf_counter() - began)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    for name, median in medians.items():
        print(f"{name:28s} {median:.3f} s   {median / medians['import torch']:.2f} x import torch")
    arguments.json.parent.mkdir(exist_ok=True)
    arguments.json.write_text(json.dumps({"seconds": medians, "machine": machine()}, indent=1))


if __name__ == "__main__":
    main()
