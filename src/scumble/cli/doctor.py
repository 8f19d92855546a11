"""`scumble doctor`: what this machine can do, and the command that repairs each line that fails."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from scumble.cli.options import DtypesOf, Rest, parse_dtypes
from scumble.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from scumble.models.configs import Configs

Verdict = Literal["ok", "note", "failed"]

TESTED: dict[str, tuple[str, str]] = {
    "torch": ("2.4", "2.13.0"),
    "diffusers": ("0.35", "0.42.1"),
    "transformers": ("4.45", "5.23.0"),
    "accelerate": ("1.0", "1.15.0"),
    "datasets": ("3.0", "5.2.0"),
    "safetensors": ("0.4.3", "0.8.0"),
    "huggingface_hub": ("0.34", "2.4.0"),
    "pydantic": ("2.7", "2.14.3"),
    "typer": ("0.15", "0.29.2"),
    "rich": ("13.7", "15.0.0"),
    "pillow": ("10.1", "13.0.0"),
    "numpy": ("1.26", "2.4.6"),
    "psutil": ("5.9", "7.2.2"),
}
"""Package -> (the oldest release the code is written for, the release that every test passed with)."""

OPTIONAL: dict[str, tuple[str, str]] = {
    "tensorboard": ("tensorboard", 'trackers = ["tensorboard"]'),
    "wandb": ("wandb", 'trackers = ["wandb"]'),
    "prodigyopt": ("prodigy", "the optimizer prodigy"),
    "cryptography": ("sign", "scumble sign, and checking signatures"),
    "peft": ("dev", "loading our files with diffusers' own loader"),
}
"""Package -> (the extra that installs it, what it is for)."""


@dataclass(frozen=True)
class Line:
    """One finding."""

    verdict: Verdict
    what: str
    found: str
    fix: str = ""
    """A command, or a sentence, for a line that is not ok."""


def doctor(
    base: Annotated[
        str | None,
        typer.Option(
            help="Look at a base instead of the machine: what is there of it, what is missing, and what it will need. "
            "A Hub id, a folder, a .safetensors checkpoint, or picturebook. Loads no weights."
        ),
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub base.")] = None,
    variant: Annotated[
        str | None, typer.Option(help="Variant of the base's weight files, e.g. fp16.")
    ] = None,
    rest: Rest = None,
    dtypes: DtypesOf = None,
) -> None:
    """Check this machine, and name the fix for what is wrong."""
    if dtypes and base is None:
        raise ConfigError("--dtypes has no effect without --base: it is about a base's components.")
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False, soft_wrap=True)
    style = {"ok": "green", "note": "yellow", "failed": "bold red"}
    failed = 0
    kept = parse_dtypes(dtypes)
    for line in findings() if base is None else base_findings(base, revision, variant, rest, kept):
        failed += line.verdict == "failed"
        text = Text.assemble((f"{line.verdict:<7}", style[line.verdict]), f"{line.what:<22}{line.found}")
        console.print(text)
        if line.fix:
            console.print(Text(f"{'':<7}{'':<22}-> {line.fix}"))
    if failed:
        console.print(Text(f"{failed} line{'s' if failed > 1 else ''} failed.", style="bold red"))
        raise typer.Exit(1)
    good = "Everything that is needed works." if base is None else "It can be drawn with and trained on."
    console.print(Text(good, style="green"))


def findings() -> Iterator[Line]:
    """Every line of the report, top to bottom. A check that raises is itself a failed line."""
    checks: tuple[Callable[[], Iterator[Line]], ...] = (
        _python,
        _packages,
        _devices,
        _optional,
        _memory,
        _disk,
        _base,
        _hub,
    )
    for check in checks:
        try:
            yield from check()
        except Exception as error:
            yield Line(
                "failed",
                check.__name__.strip("_"),
                f"{type(error).__name__}: {error}",
                "reinstall: " + _install(),
            )


def base_findings(
    source: str,
    revision: str | None = None,
    variant: str | None = None,
    rest: str | None = None,
    dtypes: Mapping[str, str] | None = None,
) -> Iterator[Line]:
    """Every line on a base, told from its configs and the headers of its files. `dtypes`: as for `load_base`, beside
    bf16 for all others."""
    import torch

    from scumble.models.dtypes import short
    from scumble.models.loading import look_at
    from scumble.models.needs import RANK, needs_of

    look = look_at(source, revision=revision, variant=variant, rest=rest)
    configs, facts = look.configs, look.facts
    for problem in facts.problems:
        yield Line("failed", "base", problem, "repair it as said, then run this again")
    if facts.family:
        size = (
            f", {facts.resolution} pixels, sides in multiples of {facts.size_multiple}"
            if facts.resolution
            else ""
        )
        yield Line("ok", "base", f"{facts.name} is {facts.title} ({facts.family}){size}")
        said = facts.prediction or "only its weights can tell: found out when it is loaded"
        yield Line("ok", "prediction", said)
    found = None if facts.problems else needs_of(configs, facts, torch.bfloat16, look.tokenizers, dtypes)
    counted = {part.name: part.parameters for part in found.parts} if found else {}
    for part, config in configs.parts.items():
        folder = configs.elsewhere.get(part, look.folder)
        yield _part_line(part, str(config["_class_name"]), counted, configs, folder)
    for note in facts.notes:
        yield Line(
            "note", "assumed", note, "check that this is so; load_base takes another prediction or tokenizer"
        )
    if found is None:
        return
    free, where = _free_memory()
    late = [part.name for part in found.parts if part.late]
    own = {name: short(dtype) for name, dtype in found.dtypes.own.items()}
    without = f", {' and '.join(late)} only while prompts are read" * bool(late)
    for what, needed in {
        "to draw": found.drawing(),
        "to train, least": found.training(checkpointing=True),
        **{
            f"to train, in {code}": found.training(checkpointing=True, quantization=code)
            for code in ("int8", "nf4")
            if code in found.parts[0].held
        },
        "to train, fastest": found.training(checkpointing=False),
    }.items():
        if needed is None:
            why = "can't be told of a single checkpoint, which holds no vocabulary"
            yield Line("note", what, why, "name a base that has one with --rest to be told")
            continue
        how = {
            "to draw": "all parts in bf16" + "".join(f", {name} in {dtype}" for name, dtype in own.items()),
            "to train, least": f"a LoRA of rank {RANK} on attention, one picture at a time{without}, gradient "
            "checkpointing",
            "to train, in int8": "the same with quantization int8, which rounds little",
            "to train, in nf4": "the same with quantization nf4, which rounds more",
            "to train, fastest": "as the least, without gradient checkpointing",
        }[what]
        text = f"{_size(needed)} and more: {how}; {_size(free)} free {where}"
        fix = "" if needed <= free else "a machine with more memory, or a smaller base"
        yield Line("ok" if needed <= free else "note", what, text, fix)


def _part_line(
    part: str, kind: str, counted: Mapping[str, int], configs: Configs, folder: Path | None
) -> Line:
    """What is there of one component."""
    from scumble.models.configs import WEIGHTLESS, read_header

    if part.startswith((*WEIGHTLESS, "tokenizer")):
        lacks = [phrase for phrase in configs.missing if phrase.startswith(f"{part}/")]
        if not lacks:
            return Line("ok", part, kind)
        return Line("failed", part, f"{kind}, without {', '.join(lacks)}", "download the base again")
    number = counted.get(part) or configs.parameters.get(part, 0)
    size = f", {number / 1e6:,.1f} million parameters" if number else ""
    if configs.lacking.get(part):
        return Line("failed", part, f"{kind}, not in the file", "take it from another base, with --rest")
    if folder is None:
        return Line("ok", part, f"{kind}{size}, in the file ({configs.weights_dtype})")
    files = sorted((folder / part).glob("*.safetensors")) if (folder / part).is_dir() else []
    if not files:
        return Line(
            "note", part, f"{kind}{size}, no weights here", "a Hub base is downloaded when it is first used"
        )
    kinds = sorted({read_header(file).dtype for file in files})
    return Line("ok", part, f"{kind}{size}, {'/'.join(kinds)}, {_size(sum(f.stat().st_size for f in files))}")


def _free_memory() -> tuple[int, str]:
    """(bytes, where) of the device that a base would be loaded to."""
    import torch

    from scumble.models.heap import free_memory

    if torch.cuda.is_available():
        return torch.cuda.mem_get_info(0)[0], "on the GPU"
    return free_memory(), "in memory"


def _python() -> Iterator[Line]:
    version = platform.python_version()
    if sys.version_info < (3, 11):  # noqa: UP036 - the package may be run from a checkout
        yield Line(
            "failed",
            "python",
            version,
            "scumble needs Python 3.11 or newer: https://www.python.org/downloads/",
        )
    else:
        yield Line("ok", "python", f"{version} on {platform.system()} {platform.machine()}")
    if sys.prefix == sys.base_prefix:
        yield Line("note", "environment", f"{sys.prefix} is not a virtual one", "python -m venv .venv")


def _packages() -> Iterator[Line]:
    for name, (oldest, tested) in TESTED.items():
        yield package_line(name, _installed(name), oldest, tested)


def package_line(name: str, version: str | None, oldest: str, tested: str) -> Line:
    """The verdict on one required package: missing or too old fails, a newer major release than tested is
    noted."""
    from packaging.version import Version

    if version is None:
        return Line("failed", name, "not installed", f"pip install '{name}>={oldest}'")
    if Version(version) < Version(oldest):
        return Line(
            "failed", name, f"{version}, older than {oldest}", f"pip install --upgrade '{name}>={oldest}'"
        )
    if Version(version).major > Version(tested).major:
        return Line(
            "note",
            name,
            f"{version}, newer than the tested {tested}",
            f"if it fails: pip install '{name}=={tested}'",
        )
    return Line("ok", name, f"{version} (tested: {tested})")


def _devices() -> Iterator[Line]:
    import torch

    from scumble.errors import ModelError
    from scumble.models.precision import find_device

    for index in range(torch.cuda.device_count()):
        name = f"cuda:{index}"
        major, minor = torch.cuda.get_device_capability(index)
        free, total = torch.cuda.mem_get_info(index)
        yield Line(
            "ok",
            name,
            f"{torch.cuda.get_device_name(index)}, sm_{major}{minor}, {_size(free)} of {_size(total)} free",
        )
        try:
            yield _precisions(find_device(name))
        except ModelError as error:
            yield Line("failed", name, str(error), "https://pytorch.org/get-started/locally/")
    if not torch.cuda.is_available() and shutil.which("nvidia-smi"):
        yield Line(
            "failed",
            "cuda",
            f"there is an NVIDIA driver, and torch {torch.__version__} can't use it",
            "install a CUDA build of torch: https://pytorch.org/get-started/locally/",
        )
    if torch.backends.mps.is_available():
        yield _precisions(find_device("mps"))
    yield Line("ok", "cpu", f"{os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads")
    yield _precisions(find_device("cpu"))


def _precisions(device: torch.device) -> Line:
    """Which precisions train on a device: allowed by `check_precision`, and found to compute."""
    import torch

    from scumble.errors import PrecisionError
    from scumble.models.precision import PRECISIONS, check_precision

    works, broken = [], []
    for word, dtype in PRECISIONS.items():
        try:
            check_precision(dtype, device)
            one = torch.ones(2, 2, device=device, dtype=dtype)
            (one @ one).sum().item()
            works.append(word)
        except (PrecisionError, RuntimeError):
            broken.append(word)
    unavailable = f"; not {', '.join(broken)}" if broken else ""
    verdict: Verdict = "ok" if "no" in works else "failed"
    return Line(
        verdict, f"{device} precision", f"{', '.join(works)}{unavailable}", "" if works else "reinstall torch"
    )


def _optional() -> Iterator[Line]:
    for name, (extra, purpose) in OPTIONAL.items():
        version = _installed(name)
        if version:
            yield Line("ok", name, f"{version} (optional: {purpose})")
        else:
            yield Line(
                "note", name, f"not installed (optional: {purpose})", f"pip install 'scumble[{extra}]'"
            )


def _memory() -> Iterator[Line]:
    import psutil

    from scumble.models.heap import free_memory

    available = free_memory()
    free = f"{_size(available)} of {_size(psutil.virtual_memory().total)} free"
    if available < 2 * 2**30:
        yield Line(
            "note", "memory", free, "close other programs; the picturebook trains in 2 GiB, SD 1.5 in 8 GiB"
        )
    else:
        yield Line("ok", "memory", free)


def _disk() -> Iterator[Line]:
    from huggingface_hub.constants import HF_HUB_CACHE

    places = {"disk, here": Path.cwd(), "disk, Hub cache": Path(HF_HUB_CACHE)}
    for what, place in places.items():
        existing = next(parent for parent in (place, *place.parents) if parent.exists())
        free = shutil.disk_usage(existing).free
        if free < 5 * 2**30:
            yield Line(
                "note", what, f"{_size(free)} free at {existing}", "free some: a Hub base needs about 5 GiB"
            )
        else:
            yield Line("ok", what, f"{_size(free)} free at {existing}")


def _base() -> Iterator[Line]:
    import scumble.picturebook
    from scumble.errors import ModelError

    try:
        yield Line("ok", "picturebook", str(scumble.picturebook.path()))
    except ModelError as error:
        yield Line("failed", "picturebook", str(error), "pip install --force-reinstall scumble")


def _hub() -> Iterator[Line]:
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_OFFLINE:
        yield Line("note", "Hub", "offline (HF_HUB_OFFLINE)", "unset HF_HUB_OFFLINE to download or push")
    token = "a token is stored" if get_token() else "no token; needed only to push or for gated models"
    yield Line("ok" if get_token() else "note", "Hub token", token, "" if get_token() else "hf auth login")


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _install() -> str:
    return f"{sys.executable} -m pip install --upgrade scumble"


def _size(count: float) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 / 10 else f"{count / 2**20:.1f} MiB"
