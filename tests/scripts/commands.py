"""Commands: the scripts as modules and as processes, and what their tests have in common."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
WEIGHTS = "pytorch_lora_weights.safetensors"


def load(name: str) -> Any:
    """A script as a module."""
    spec = importlib.util.spec_from_file_location(f"scripts_{name}", ROOT / f"scripts/{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def values(script: Any, arguments: Sequence[str], **world: Any) -> dict[str, Any]:
    """Dotted setting -> value, as the flags say."""
    flags = script.parser().parse_args(arguments)
    return {".".join(given.path): given.value for given in script.translate(flags, script.World(**world))}


def run_config(script: Any, arguments: Sequence[str], **world: Any) -> Any:
    """What a command line means as a run; 20 pictures unless said otherwise."""
    from scumble.runs.config import RunConfig
    from scumble.runs.load import assemble

    flags = script.parser().parse_args(arguments)
    world = {"count": lambda data: 20, **world}
    return assemble(RunConfig, script.translate(flags, script.World(**world)))


def at(settings: Any, path: str) -> Any:
    """The setting of a dotted name."""
    for part in path.split("."):
        settings = getattr(settings, part)
    return settings


def about(value: Any) -> Any:
    """A float up to rounding, anything else as it is."""
    return pytest.approx(value) if isinstance(value, float) else value


def defaults(script: Any) -> dict[str, Any]:
    """Flag -> its default; `...` for a required one."""
    return {
        flag.name: ... if flag.required else (False if flag.type is None else flag.default)
        for flag in script.FLAGS
    }


def named_in(rows: Sequence[tuple[str, str, Any]]) -> set[str]:
    """The flags of a table of (flags, setting, value)."""
    return {part.split("=")[0].removeprefix("--") for flags, _, _ in rows for part in flags.split()}


def launch(
    script: str,
    world: Path,
    *flags: str,
    environment: Mapping[str, str] = {},
    first: tuple[str, ...] = (),
) -> subprocess.CompletedProcess[str]:
    """Run a script as a command, in `world` and on its base. `first`: what goes before it, such as a launcher."""
    command = [sys.executable, *first, str(ROOT / f"scripts/{script}.py")]
    command += [f"--pretrained_model_name_or_path={world / 'base'}", "--resolution=16"]
    command += ["--train_batch_size=2", "--seed=1337", *flags]
    surroundings = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(ROOT / "src"),
        **environment,
    }
    return subprocess.run(command, env=surroundings, capture_output=True, text=True, cwd=world, check=False)


def lose_the_end(out: Path, checkpoint: str, world: Path) -> bytes:
    """Take the last checkpoint and the adapter out of a run, as if it had been cut before them; the adapter's bytes."""
    weights = (out / WEIGHTS).read_bytes()
    for path in (out / checkpoint, out / WEIGHTS):
        path.rename(world / path.name)
    return weights
