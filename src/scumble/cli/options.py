"""Options that several commands have, each written once."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from scumble.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console
    from rich.progress import Progress

Out = Annotated[Path, typer.Option("--out", "-o", help="Where to write the result.")]

SaveAs = Annotated[
    str | None,
    typer.Option(
        "--save-as", help="Dialect of an adapter that is written. Unset: diffusers', where it holds it."
    ),
]

Base = Annotated[
    str | None,
    typer.Option(help="The adapters' base, for families whose change depends on its weights (DoRA, ...)."),
]

Rest = Annotated[
    str | None,
    typer.Option(
        help="Another base, a diffusers folder or a Hub id, from which a .safetensors checkpoint takes what it "
        "does not hold. Unset: the folder that it lies in, if that is such a base."
    ),
]

DtypesOf = Annotated[
    list[str] | None,
    typer.Option(
        "--dtypes",
        metavar="COMPONENT=DTYPE",
        help="A dtype for one of the base's components alone: vae=fp32, text_encoder=bf16, ... Repeatable.",
    ),
]

Variant = Annotated[str | None, typer.Option(help="Of the weight files in a base's folder, e.g. fp16.")]

Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")]


Quantization = Annotated[
    str,
    typer.Option(
        help="What the base's frozen weights are held in: none, int8, fp8 (a byte each) or nf4 (half a byte). Less "
        "memory; pictures differ a little.",
    ),
]

Offload = Annotated[
    str,
    typer.Option(
        help="blocks: the denoiser's blocks wait in host memory and go to the GPU one by one; less of its memory, more "
        "time. none: all of it is there.",
    ),
]


def parse_dtypes(texts: Sequence[str] | None) -> dict[str, str]:
    """`["vae=fp32", ...]` -> {"vae": "fp32", ...}

    Raises:
        ConfigError: one of them is not of this form, or a component is named twice.
    """
    found: dict[str, str] = {}
    for text in texts or ():
        component, equals, dtype = (part.strip() for part in text.partition("="))
        if not (component and equals and dtype):
            raise ConfigError(
                f"--dtypes {text!r} is not COMPONENT=DTYPE. Write one at a time, e.g. --dtypes vae=fp32"
            )
        if component in found:
            raise ConfigError(
                f"--dtypes names {component} twice: {found[component]} and {dtype}. Name it once."
            )
        found[component] = dtype
    return found


def counting(what: str, console: Console) -> Progress:
    """A bar that counts things, gone when it ends: `merging ━━━━ 12/128 0:00:03`."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    return Progress(*columns, console=console, transient=True)
