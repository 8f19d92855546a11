"""`scumble sign FILE --key KEY`: vouch for an adapter's file with an ed25519 signature in its header."""

from __future__ import annotations

from pathlib import Path

import typer


def sign(
    file: Path = typer.Argument(help="A .safetensors file, or a folder that holds one."),
    key: Path = typer.Option(
        ..., help="An ed25519 private key without passphrase, e.g. of ssh-keygen -t ed25519."
    ),
) -> None:
    """Sign an adapter file."""
    from scumble.formats.seal import sign as put

    signer = put(file, key)
    typer.secho(f"Signed by {signer}", fg="green")
    typer.echo(f'Others check it with: scumble verify {file} --key "{signer}"', err=True)
