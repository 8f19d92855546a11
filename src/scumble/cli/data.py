"""`scumble data`: look at a dataset before training on it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from scumble.cli.options import Rest

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from scumble.data.check import DataReport, TokenCounter
    from scumble.models.configs import BaseFacts

app = typer.Typer(help="Check a dataset before training on it.", no_args_is_help=True, add_completion=False)

WARNINGS_SHOWN = 5
"""Of one kind, unless all are asked for."""


@app.callback()
def data() -> None:
    """Check a dataset before training on it."""


@app.command("check")
def check(
    images: str = typer.Argument(
        help="A folder of pictures, a saved Hugging Face dataset, or the id of one on the Hub."
    ),
    base: str | None = typer.Option(
        None,
        help="The base to train: sets the resolution, and counts the captions' tokens. Loads no weights.",
    ),
    rest: Rest = None,
    resolution: int | None = typer.Option(None, min=8, help="Side in pixels. Unset: the base's, or 512."),
    caption: str | None = typer.Option(None, help="One prompt for all pictures."),
    image_column: str = typer.Option("image", help="Column that holds the picture or names its file."),
    caption_column: str = typer.Option("text", help="Column that holds the caption."),
    dataset_config: str | None = typer.Option(
        None, help="Configuration of a Hugging Face dataset that has several."
    ),
    split: str = typer.Option("train", help="Which split of the dataset."),
    buckets: bool = typer.Option(False, "--buckets", help="Shapes near to each picture's own, not a square."),
    random_crop: bool = typer.Option(False, "--random-crop", help="Cut at random places, not the middle."),
    random_flip: bool = typer.Option(False, "--random-flip", help="Mirror at half of the visits."),
    no_upscale: bool = typer.Option(
        False, "--no-upscale", help="Refuse pictures smaller than the resolution."
    ),
    seed: int = typer.Option(0, min=0, help="Seed of random crops, as in training."),
    sheet: Annotated[Path | None, typer.Option(help="Draw exactly what will be trained on one PNG.")] = None,
    everything: bool = typer.Option(
        False, "--all", help="List every warning, and what happens to each picture."
    ),
) -> None:
    """Open every picture and caption, and report all problems at once. Exit code 1 when training would stop
    on one."""
    from rich.console import Console
    from rich.progress import Progress

    from scumble.data import check as checks
    from scumble.data.settings import DataSettings

    settings = DataSettings(
        images=images,
        caption=caption,
        image_column=image_column,
        caption_column=caption_column,
        dataset_config=dataset_config,
        split=split,
        resolution=resolution,
        center_crop=not random_crop,
        random_flip=random_flip,
        buckets=buckets,
        allow_upscale=not no_upscale,
    )
    facts, counter = (None, None) if base is None else (_facts(base, rest), _token_counter(base, rest))
    console = Console()
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("opening", total=None)
        report = checks.check(
            settings,
            resolution=512 if facts is None else facts.resolution or 512,
            size_multiple=8 if facts is None else facts.size_multiple or 8,
            count_tokens=counter,
            seed=seed,
            sheet=sheet,
            progress=lambda done, total, what: bar.update(
                task, completed=done, total=total, description=what
            ),
        )
    _show(console, report, everything)
    if report.errors:
        raise typer.Exit(1)


def _facts(base: str, rest: str | None) -> BaseFacts:
    from scumble.errors import ModelError
    from scumble.models.loading import describe_base

    facts = describe_base(base, rest=rest)
    if facts.problems:
        raise ModelError("\n".join(facts.problems))
    return facts


def _token_counter(base: str, rest: str | None) -> TokenCounter | None:
    """Counts tokens by the base's tokenizers; None where it has none of its own (a single checkpoint)."""
    from scumble.models.loading import load_tokenizers
    from scumble.models.text import Words

    words = [Words(tokenizer, tokenizer.model_max_length) for tokenizer in load_tokenizers(base, rest=rest)]
    if not words:
        return None

    def count(captions: Sequence[str]) -> tuple[list[int], int]:
        each = [tokenizer.counts(captions) for tokenizer in words]
        return [max(counts) for counts in zip(*each, strict=True)], min(
            tokenizer.limit for tokenizer in words
        )

    return count


def _show(console: Console, report: DataReport, everything: bool) -> None:
    from rich.table import Table
    from rich.text import Text

    from scumble.data.check import summary

    console.print(Text(report.source, style="bold"))
    shapes = Table("shape", "pictures", "scale (smallest, median, largest)", "most area lost", title=None)
    for bucket in report.buckets:
        scales = "  ".join(f"{scale:.2f}x" for scale in bucket.scales)
        shapes.add_row(
            f"{bucket.size[1]}x{bucket.size[0]}", str(bucket.pictures), scales, f"{bucket.lost_area:.1%}"
        )
    if report.buckets:
        console.print(shapes)
    if everything and report.pictures:
        console.print(_pictures_table(report))
    for picture in report.pictures[:3]:
        tokens = "" if picture.tokens is None else f" ({picture.tokens} of {report.token_limit} tokens)"
        console.print(Text(f"{picture.key}: {picture.captions[0] or '(no words)'}{tokens}", style="dim"))
    shown: dict[tuple[str, bool], int] = {}
    table = Table("problem", "where", "what", show_lines=False)
    for problem in sorted(report.problems, key=lambda problem: not problem.error):
        kind = (problem.kind, problem.error)
        shown[kind] = shown.get(kind, 0) + 1
        if problem.error or everything or shown[kind] <= WARNINGS_SHOWN:
            style = "red" if problem.error else "yellow"
            table.add_row(Text(problem.kind, style=style), Text(problem.key), Text(problem.text))
    if report.problems:
        console.print(table)
    for (name, error), count in shown.items():
        if not error and not everything and count > WARNINGS_SHOWN:
            console.print(
                Text(f"{count - WARNINGS_SHOWN} more of {name!r}: --all lists them.", style="yellow")
            )
    if report.token_limit is None:
        console.print(Text("Caption lengths were not counted: name the base with --base.", style="dim"))
    if report.sheet is not None:
        console.print(Text(f"Contact sheet: {report.sheet}"))
    console.print(Text(summary(report), style="red" if report.errors else "green"))


def _pictures_table(report: DataReport) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table("picture", "size", "trained as", "scale", "lost: top, right, bottom, left", "tokens")
    for picture in report.pictures:
        geometry = picture.geometry
        table.add_row(
            Text(picture.key),
            f"{geometry.original[1]}x{geometry.original[0]}",
            f"{geometry.target[1]}x{geometry.target[0]}",
            f"{geometry.scale:.2f}x",
            ", ".join(map(str, geometry.lost)),
            "" if picture.tokens is None else str(picture.tokens),
        )
    return table
