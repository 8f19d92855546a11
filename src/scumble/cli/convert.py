"""`scumble convert FILE --to DIALECT`: the same adapter as another tool's file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from scumble.cli.options import Overwrite


def convert(
    file: Annotated[Path, typer.Argument(help="An adapter's file, folder or Hub id.")],
    to: Annotated[str, typer.Option("--to", help="The dialect to write: diffusers, ...")],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", help="Where to write it. Unset: beside the file, with the dialect's name."
        ),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="fp32, fp16 or bf16. Unset: as the file's, bit for bit.")
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(help="The adapter's base; resolves names that a dialect leaves ambiguous."),
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Write an adapter in another tool's format."""
    from rich.console import Console

    from scumble.formats.codec import CODECS, read, write
    from scumble.formats.seal import signed
    from scumble.inference.find_base import locate
    from scumble.runs.rework import dtype_called, refuse_existing

    said = Console(stderr=True, highlight=False, soft_wrap=True)
    codec = CODECS.get(to)  # a mistyped dialect is said before anything is read
    number, source = dtype_called(dtype), locate(file)
    layers = None
    if base is not None:
        from scumble.runs.base_files import open_base

        layers = open_base(base).shapes
    ending = ".safetensors" if getattr(codec, "file_name", None) is None else ""  # some dialects are folders
    target = out or source.with_name(f"{source.stem}-{to}{ending}")
    refuse_existing(target, overwrite, [source])
    found = read(source, layers, stored=True)
    written = write(found.state, target, to, number)
    said.print(f"{found.dialect} -> {to}: {found.report}", markup=False)
    if signed(found.files):
        said.print(
            f"The signature of {source.name} speaks of that file alone, and is not in the new one. Sign it with: "
            f"scumble sign {written}",
            markup=False,
        )
    typer.echo(written)
