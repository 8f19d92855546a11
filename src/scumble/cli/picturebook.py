"""`scumble picturebook`: the embedded base's data sets, a sheet of its pictures, and its recipe."""

from __future__ import annotations

from pathlib import Path

import typer

app = typer.Typer(help="The embedded base and its pictures.", no_args_is_help=True, add_completion=False)


@app.command("dataset")
def dataset(
    name: str = typer.Argument(help="A style or a creature; `scumble picturebook list` names them."),
    folder: Path = typer.Argument(
        help="Where to write the pictures and metadata.jsonl: a new or empty folder."
    ),
    count: int | None = typer.Option(None, min=1, help="Pictures. Unset: 40 of a style, 5 of a creature."),
    resolution: int = typer.Option(64, min=8, help="Side in pixels. The embedded base draws 64."),
    seed: int = typer.Option(0, min=0, help="The same seed gives the same pictures."),
) -> None:
    """Write a style's or a creature's pictures with captions, as an ordinary image folder."""
    from scumble.picturebook.dataset import write_dataset

    paths = write_dataset(name, folder, count=count, resolution=resolution, seed=seed)
    typer.echo(f"{len(paths)} pictures of {name} in {folder}")


@app.command("list")
def names() -> None:
    """Name the styles and creatures, and what the base can draw."""
    from scumble.picturebook import dataset, scenes

    typer.echo("styles:      " + ", ".join(dataset.STYLE_NAMES))
    typer.echo("creatures:   " + ", ".join(dataset.CREATURE_NAMES))
    typer.echo("subjects:    " + ", ".join(scenes.SUBJECTS))
    typer.echo("colours:     " + ", ".join(scenes.COLORS))
    typer.echo("backgrounds: " + ", ".join(scenes.BACKGROUNDS))


@app.command("path")
def path() -> None:
    """Print the folder of the embedded base, which diffusers loads as it is."""
    import scumble.picturebook

    typer.echo(scumble.picturebook.path())


@app.command("pretrain")
def pretrain(
    work: Path = typer.Argument(
        help="Folder for pictures, checkpoints and the result. What is finished stays."
    ),
    stage: str | None = typer.Option(None, help="Run this stage only."),
) -> None:
    """Train the embedded base again from nothing: about two hours on two free CPU cores."""
    from scumble.picturebook.pretrain import pretrain as run

    run(work, stage=stage, log=typer.echo)


@app.command("sheet")
def sheet(
    file: Path = typer.Argument(help="Where to write the PNG."),
    adapter: list[Path] = typer.Option([], help="An adapter to draw with; may be given several times."),
    count: int = typer.Option(24, min=1, help="Pictures on the sheet."),
    columns: int = typer.Option(6, min=1, help="Pictures in a row."),
    steps: int = typer.Option(25, min=1, help="Denoising steps a picture."),
    seed: int = typer.Option(0, min=0, help="Seed of the first picture."),
) -> None:
    """Draw held-out prompts with the embedded base, on one contact sheet."""
    import random

    from PIL import Image

    from scumble.inference.request import AdapterUse, Request
    from scumble.inference.session import Session
    from scumble.models.loading import load_base
    from scumble.picturebook.captions import caption
    from scumble.picturebook.draw import contact_sheet
    from scumble.picturebook.scenes import random_scene

    rng = random.Random(seed)
    session = Session(load_base("picturebook", dtype=None, device=None))
    uses = tuple(AdapterUse(path=path) for path in adapter)
    pictures: list[Image.Image] = []
    while len(pictures) < count:
        prompt = caption(random_scene(rng, held_out=True), rng)
        request = Request(prompt=prompt, steps=steps, seed=seed + len(pictures), adapters=uses)
        pictures.append(session.generate(request)[0].image)
    file.parent.mkdir(parents=True, exist_ok=True)
    contact_sheet(pictures, columns).save(file)
    typer.echo(f"{len(pictures)} pictures in {file}")
