"""`scumble train`: settings from a file, flags and overrides; then a run, or with --plan its description."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from scumble.runs.config import RunConfig

FLAGS: dict[str, str] = {
    "base": "base",
    "rest": "rest",
    "images": "data.images",
    "output": "output",
    "caption": "data.caption",
    "resolution": "data.resolution",
    "held_out": "data.held_out",
    "cache": "data.cache",
    "rank": "adapter.rank",
    "alpha": "adapter.alpha",
    "targets": "adapter.targets",
    "steps": "train.steps",
    "batch": "train.batch",
    "accumulate": "train.accumulate",
    "rate": "train.optimizer.learning_rate",
    "optimizer": "train.optimizer.name",
    "schedule": "train.schedule.name",
    "precision": "train.precision",
    "quantization": "train.quantization",
    "offload": "train.offload",
    "seed": "train.seed",
    "checkpoint_every": "train.checkpoint_every",
    "prompt": "preview.prompts",
    "preview_every": "train.preview_every",
    "tracker": "trackers",
    "device": "device",
    "push": "hub.push",
    "hub_id": "hub.id",
}
"""Flag -> the setting that it sets. Every other setting is reached by a dotted override."""

WHAT, HOW, WATCH, RUN = "What is trained", "How", "What is seen of it", "The run"


def train(
    settings: list[str] = typer.Argument(
        None,
        metavar="[CONFIG] [SECTION.NAME=VALUE]...",
        help="A settings file (scumble config new), and settings that win over it, e.g. train.steps=200.",
        show_default=False,
    ),
    base: str | None = typer.Option(
        None, help='"picturebook", a Hub id, a folder or a .safetensors checkpoint.', rich_help_panel=WHAT
    ),
    rest: str | None = typer.Option(
        None,
        help="Another base, from which a .safetensors checkpoint takes what it does not hold.",
        rich_help_panel=WHAT,
    ),
    images: str | None = typer.Option(
        None, help="Folder of pictures, or id of a dataset.", rich_help_panel=WHAT
    ),
    caption: str | None = typer.Option(None, help="One prompt for all pictures.", rich_help_panel=WHAT),
    output: Path | None = typer.Option(None, help="Folder of the run.", rich_help_panel=WHAT),
    rank: int | None = typer.Option(None, help="Size of the LoRA.", rich_help_panel=HOW),
    alpha: float | None = typer.Option(None, help="Its scale times its rank.", rich_help_panel=HOW),
    targets: list[str] = typer.Option(
        [], help="Layers: attention, attention+mlp, conv, ..., or a pattern.", rich_help_panel=HOW
    ),
    steps: int | None = typer.Option(None, help="Optimizer steps.", rich_help_panel=HOW),
    epochs: float | None = typer.Option(
        None, min=0, help="Times that all pictures are shown, instead of --steps.", rich_help_panel=HOW
    ),
    batch: int | None = typer.Option(None, help="Pictures in a forward pass.", rich_help_panel=HOW),
    accumulate: int | None = typer.Option(None, help="Forward passes per step.", rich_help_panel=HOW),
    rate: float | None = typer.Option(None, help="Learning rate.", rich_help_panel=HOW),
    optimizer: str | None = typer.Option(None, help="adamw, adamw8bit, prodigy.", rich_help_panel=HOW),
    schedule: str | None = typer.Option(None, help="constant, cosine, linear, ...", rich_help_panel=HOW),
    resolution: int | None = typer.Option(
        None, help="Side in pixels. Unset: the base's.", rich_help_panel=HOW
    ),
    precision: str | None = typer.Option(None, help="no, bf16 or fp16.", rich_help_panel=HOW),
    quantization: str | None = typer.Option(
        None, help="Of the frozen base: none, int8, nf4 or fp8.", rich_help_panel=HOW
    ),
    offload: str | None = typer.Option(
        None, help="blocks: the base's blocks wait in host memory, on a GPU.", rich_help_panel=HOW
    ),
    seed: int | None = typer.Option(None, help="Of all randomness.", rich_help_panel=HOW),
    cache: Path | None = typer.Option(
        None, help="Folder that keeps encoded pictures between runs.", rich_help_panel=HOW
    ),
    device: str | None = typer.Option(None, help="cpu, cuda, cuda:1, mps.", rich_help_panel=HOW),
    prompt: list[str] = typer.Option(
        [],
        help="Draw this at the end, base beside adapter; may be given several times.",
        rich_help_panel=WATCH,
    ),
    preview_every: int | None = typer.Option(
        None, help="Draw it every this many steps too.", rich_help_panel=WATCH
    ),
    held_out: float | None = typer.Option(
        None, help="Part or number of pictures kept to measure on.", rich_help_panel=WATCH
    ),
    tracker: list[str] = typer.Option([], help="tensorboard, wandb.", rich_help_panel=WATCH),
    checkpoint_every: int | None = typer.Option(None, help="Steps between checkpoints.", rich_help_panel=RUN),
    push: bool = typer.Option(False, "--push", help="Upload the result to the Hub.", rich_help_panel=RUN),
    hub_id: str | None = typer.Option(None, help="Repository for --push.", rich_help_panel=RUN),
    plan: bool = typer.Option(
        False, "--plan", help="Say what would be trained, and stop.", rich_help_panel=RUN
    ),
    resume: str | None = typer.Option(
        None, help='Continue from "latest" or a checkpoint\'s folder.', rich_help_panel=RUN
    ),
    overwrite: bool = typer.Option(
        False, "--overwrite", help="Remove an earlier run from the output folder.", rich_help_panel=RUN
    ),
    accept_changes: bool = typer.Option(
        False, "--accept-config-change", help="Continue though settings changed.", rich_help_panel=RUN
    ),
) -> None:
    """Train an adapter on your pictures."""
    config = configure(list(settings or ()), dict(locals()), resume)
    if epochs is not None:
        from scumble.runs.build import steps_of_epochs

        config = config.model_copy(
            update={"train": config.train.model_copy(update={"steps": steps_of_epochs(config, epochs)})}
        )
    if plan:
        show_plan(config)
        return
    from scumble.runs.train import train as run

    result = run(config, resume=resume, overwrite=overwrite, accept_changes=accept_changes)
    if result.adapter is not None:
        typer.secho(f"Adapter: {result.adapter}", fg="green")
    if result.reason != "complete":
        typer.echo(
            f"Interrupted at step {result.step}. "
            f"Continue with: scumble train --output {result.folder} --resume latest"
        )
    raise typer.Exit(result.exit_code)


def configure(arguments: list[str], flags: dict[str, Any], resume: str | None) -> RunConfig:
    """The settings that the command line means: file, then flags, then dotted overrides.

    A resumed run that names no file takes the settings that lie in its folder.

    Raises:
        ConfigError: settings are wrong, or more than one file is named.
    """
    from scumble.errors import ConfigError
    from scumble.runs.folder import SETTINGS
    from scumble.runs.load import Given, load

    files = [text for text in arguments if "=" not in text or Path(text).is_file()]
    if len(files) > 1:
        raise ConfigError(f"{len(files)} settings files are named: {', '.join(files)}. Only one can be read.")
    file = Path(files[0]) if files else None
    given = [
        Given(tuple(setting.split(".")), flags[flag], "--" + flag.replace("_", "-"))
        for flag, setting in FLAGS.items()
        if flags[flag] is not None and flags[flag] != [] and flags[flag] is not False
    ]
    if file is None and resume is not None:
        folders = [flags["output"]] if flags["output"] else [Path(resume), Path(resume).parent]
        file = next((folder / SETTINGS for folder in folders if (folder / SETTINGS).is_file()), None)
    return load(file, [text for text in arguments if text not in files], given)


def show_plan(config: RunConfig, steps: int | None = None) -> None:
    """Print what would be trained, how much memory it takes and how long it goes. Reads every picture, does the first
    steps (`steps` of them), and writes nothing that stays.

    Raises:
        Exit: with 1, where the run would not fit its memory.
    """
    from rich.console import Console

    from scumble.cli.plan import tables
    from scumble.runs.outlook import plan as look_ahead
    from scumble.runs.train import progress, say_data
    from scumble.runs.warmup import STEPS

    with progress("checking", quiet=False) as told:
        outlook = look_ahead(config, steps=STEPS if steps is None else steps, progress=told)
    if outlook.report is not None:
        say_data(outlook.report, lambda text: typer.echo(text, err=True))
    console = Console(soft_wrap=True, highlight=False)
    for part in tables(outlook):
        console.print(part)
    if not outlook.fits:
        raise typer.Exit(1)
