"""Options that several commands have, each written once."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
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

Variant = Annotated[str | None, typer.Option(help="Of the weight files in a base's folder, e.g. fp16.")]

Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")]


def counting(what: str, console: Console) -> Progress:
    """A bar that counts things, gone when it ends: `merging ━━━━ 12/128 0:00:03`."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    return Progress(*columns, console=console, transient=True)
