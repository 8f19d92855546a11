"""`scumble config`: write a commented settings file, check one, describe them all as a JSON schema."""

from __future__ import annotations

import json
from pathlib import Path

import typer

app = typer.Typer(
    help="Write, check and describe settings files.", no_args_is_help=True, add_completion=False
)


@app.command("new")
def new(
    base: str = typer.Option("picturebook", help="The base to write into the file."),
    images: str = typer.Option("pictures/", help="The pictures to write into the file."),
    output: str = typer.Option("runs/first", help="The output folder to write into the file."),
    family: str | None = typer.Option(
        None, help="The adapter family whose settings to write: dora, lokr, ..."
    ),
) -> None:
    """Print a settings file with every setting, its default and what it does."""
    from scumble.adapters import FAMILIES
    from scumble.runs.config import RunConfig
    from scumble.runs.toml import template

    chosen = {"base": base, "data.images": images, "output": output}
    if family is not None:
        chosen["adapter.family"] = FAMILIES.get(family).family
    typer.echo(template(RunConfig, chosen), nl=False)


@app.command("check")
def check(
    file: Path = typer.Argument(help="A settings file."),
    overrides: list[str] = typer.Argument(None, help="section.name=value, as for train."),
) -> None:
    """Read a settings file, tell everything that is wrong with it, and print what it comes to."""
    from scumble.runs.load import load
    from scumble.runs.toml import dump

    config = load(file, overrides or ())
    typer.echo(dump(config), nl=False)
    typer.secho(f"{file} is fine.", fg="green", err=True)


@app.command("schema")
def schema() -> None:
    """Print the JSON schema of the settings, for editors."""
    from scumble.runs.config import RunConfig

    description = {"$schema": "https://json-schema.org/draft/2020-12/schema", **RunConfig.model_json_schema()}
    typer.echo(json.dumps(description, indent=2))
