"""`scumble verify FILE`: whether an adapter's file is what was written, and who vouches for it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from scumble.formats.seal import Verdict


def verify(
    file: Path = typer.Argument(help="A .safetensors file, or a folder that holds one."),
    key: str | None = typer.Option(
        None, help='Who must have signed it: a public key\'s file, or the key itself ("ssh-ed25519 AAAA...").'
    ),
) -> None:
    """Check that an adapter file is what was written.

    The exit code is 1 when it is not, or was not signed by the key that was given.
    """
    from scumble.formats.seal import check, public_key

    wanted = public_key(key) if key is not None else None
    found = check(file)
    good = found.intact
    typer.echo(f"{found.path}")
    typer.echo(f"tensors   {_word(found.tensors)}  sha256 {found.tensors_sha256}")
    typer.echo(f"metadata  {_word(found.metadata)}")
    typer.echo(f"bytes     {_word(found.layout)}")
    typer.echo(f"signature {_signature(found)}")
    if found.note:
        typer.secho(f"note: {found.note}", fg="yellow")
    if wanted is not None:
        signed = found.signature is True and found.signer == wanted
        good = good and signed
        said = (
            "signed by the key that was given"
            if signed
            else f"NOT signed by the key that was given, {wanted}"
        )
        typer.secho(said, fg="green" if signed else "red")
    if not found.sealed:
        typer.secho(
            "It carries no hashes of its content, so nothing can be said: another tool wrote it, or an early "
            "scumble. Sign it, or convert it, and it will.",
            fg="yellow",
        )
        raise typer.Exit(1)
    if not good:
        typer.secho("This is not what was written." if not found.intact else "Not trusted.", fg="red")
        raise typer.Exit(1)
    typer.secho("This is what was written.", fg="green")


def _word(fits: bool | None) -> str:
    return {True: "as written", False: "CHANGED", None: "no seal"}[fits]


def _signature(found: Verdict) -> str:
    if not found.signer and found.signature is None:
        return "none"
    words = {True: "good, by", False: "WRONG, said to be by", None: "not checked, said to be by"}
    return f"{words[found.signature]} {found.signer or 'nobody'}"
