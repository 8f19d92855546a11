"""Does anything stay behind? A thousand rounds of load, forward, unload over twenty files of every family and dialect.

    python benchmarks/leak.py                  # a minute or two; writes benchmarks/results/leak.json
    python benchmarks/leak.py --rounds 60

On a toy pipeline of SD 1, with adapters on UNet and text encoder and one that brings a word. After the first rounds,
in which caches fill, nothing may grow: the process's memory, what Python has allocated, its objects, torch's tensors.
The last output of the bare base must be the first one, bit for bit, and so must each file's.
"""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
import tracemalloc
from pathlib import Path
from typing import Any

import torch
from machine import machine
from torch import Tensor

from scumble import load_adapter, unload_adapters
from scumble.adapters import FAMILIES, Adapter
from scumble.adapters.state import AdapterState, TokenState
from scumble.formats import CODECS, write
from scumble.inference.attach import roots_of
from scumble.models.tiny import tiny_pipeline

HERE = Path(__file__).parent
TARGETS = (["attention"], ["attention", "conv"], ["attention+mlp", "text_encoder.attention"])
WORD = "<fox>"


def make_files(pipe: Any, folder: Path, count: int) -> list[Path]:
    """The families in turn, each time on other layers and in another of the dialects that hold them."""
    files: list[Path] = []
    families, codecs = list(FAMILIES), {name: CODECS.get(name)() for name in CODECS}
    for number in range(count - 1):
        family, turn = families[number % len(families)], number // len(families)
        state = trained(pipe, family, TARGETS[turn % len(TARGETS)], seed=number)
        able = [name for name, codec in codecs.items() if codec.obstacle(state) is None]
        dialect = able[turn % len(able)]
        files.append(write(state, folder / f"{number}-{family}-{dialect}.safetensors", dialect))
    width = pipe.text_encoder.config.hidden_size
    rows = torch.randn(2, width, generator=torch.Generator().manual_seed(1))
    words = AdapterState({}, {WORD: TokenState({"text_encoder": rows})})
    return [*files, write(words, folder / "words.safetensors", "embedding")]


def trained(pipe: Any, family: str, targets: list[str], seed: int) -> AdapterState:
    """A random adapter of that family; the pipeline is left as it was."""
    settings = FAMILIES.get(family).settings(rank=4)
    generator = torch.Generator().manual_seed(seed)
    with Adapter.inject(roots_of(pipe), targets, settings) as adapter, torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        return adapter.state()


@torch.no_grad()
def output(pipe: Any) -> Tensor:
    """The UNet's answer to fixed noise and a prompt with the learned word."""
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    ids = pipe.tokenizer([f"a {WORD}"], padding="max_length", max_length=77, return_tensors="pt").input_ids
    return pipe.unet(latents, 300, pipe.text_encoder(ids)[0]).sample  # type: ignore[no-any-return]


def counts() -> dict[str, int]:
    """What the process holds now: KiB of memory, bytes of Python's, objects, tensors."""
    gc.collect()
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    resident = next((int(line.split()[1]) for line in lines if line.startswith("VmRSS")), 0)
    objects = gc.get_objects()
    tensors = sum(issubclass(type(thing), Tensor) for thing in objects)
    return {
        "resident KiB": resident,
        "traced bytes": tracemalloc.get_traced_memory()[0],
        "objects": len(objects),
        "tensors": tensors,
    }


def run(rounds: int, files: int = 20, marks: int = 10) -> dict[str, Any]:
    """Load, forward and unload that often; what was held at `marks` moments after the warm-up.

    The warm-up is two rounds of every file, counted in `rounds`.
    """
    pipe = tiny_pipeline("sd1")
    first = output(pipe)
    with tempfile.TemporaryDirectory(prefix="scumble-leak-") as folder:
        paths = make_files(pipe, Path(folder), files)
        names = [path.relative_to(folder).parts[0] for path in paths]
        begin = 2 * len(paths)
        if rounds < 3 * len(paths):
            raise SystemExit(f"--rounds {rounds} is less than three of every file: {3 * len(paths)}.")
        moments = {begin + (rounds - 1 - begin) * mark // marks for mark in range(marks + 1)}
        outputs: dict[Path, Tensor] = {}
        held, equal = [], True
        tracemalloc.start()
        for number in range(rounds):
            path = paths[number % len(paths)]
            load_adapter(pipe, path, quiet=True)
            drawn = output(pipe)
            assert unload_adapters(pipe) == 1
            if path in outputs:
                equal = equal and torch.equal(drawn, outputs[path])
            elif torch.equal(drawn, first):
                raise AssertionError(f"{path.name} does nothing, so that this would show nothing")
            else:
                outputs[path] = drawn
            if number in moments:
                held.append({"round": number, **counts()})
        tracemalloc.stop()
    kinds = [key for key in held[0] if key != "round"]
    return {
        "rounds": rounds,
        "files": names,
        "base output equal, bit for bit": bool(torch.equal(output(pipe), first)),
        "each file's output equal, bit for bit": equal,
        "growth": {key: held[-1][key] - held[0][key] for key in kinds},
        "held": held,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=1000)
    parser.add_argument("--files", type=int, default=20)
    parser.add_argument("--json", type=Path, default=HERE / "results" / "leak.json")
    options = parser.parse_args()
    report = {**run(options.rounds, options.files), "machine": machine()}
    for moment in report["held"]:
        print(moment, flush=True)
    print({key: value for key, value in report.items() if key not in ("held", "machine")})
    options.json.parent.mkdir(exist_ok=True, parents=True)
    options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
