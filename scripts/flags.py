"""Flags: what the commands people already have share: a table of flags, each with what it becomes in our settings.

A command is its table. `Command` turns one into a parser, settings, notes, and a run.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from scumble.runs.load import Given

Values = Mapping[str, object]
"""Dotted name of a setting -> value."""


@dataclass(frozen=True)
class World:
    """What a translation may ask about besides the flags."""

    processes: int = 1
    environment: Mapping[str, str] = field(default_factory=dict)
    count: Callable[[Values], int] = lambda values: 1
    """How many pictures the data settings give; asked only where epochs have to become steps."""
    installed: Callable[[str], bool] = lambda name: True
    """Whether a package is installed; asked only for `--report_to all`."""
    guided: Callable[[argparse.Namespace], bool] = lambda flags: True
    """Whether the base's denoiser is told a guidance; asked only where there is a flag for it."""


class Refused(Exception):
    """A flag's value that can't be honoured: the text is for the person who typed it."""


Becomes = Callable[[Any, argparse.Namespace, World], Values]
"""(value, all flags, world) -> settings."""

Epochs = Callable[[float, argparse.Namespace, World], int]
"""(epochs, all flags, world) -> optimizer steps."""


@dataclass(frozen=True)
class Flag:
    """One flag: how it is typed, and what it becomes."""

    name: str
    help: str
    becomes: str | Becomes
    """The setting of the same value, or a function that gives settings."""
    type: Callable[[str], Any] | None = str
    """None: a switch, false unless given."""
    default: Any = None
    choices: Sequence[str] | None = None
    required: bool = False
    note: Callable[[Any, argparse.Namespace], str] = lambda value, flags: ""
    """A sentence to print when the flag's effect differs from what one might expect."""
    several: bool = False
    """Takes one or more values."""

    def settings(self, flags: argparse.Namespace, world: World) -> Values:
        """What this flag contributes. None says nothing and leaves the setting at its default."""
        value = getattr(flags, self.name)
        if not isinstance(self.becomes, str):
            return self.becomes(value, flags, world)
        return {} if value is None else {self.becomes: value}


@dataclass(frozen=True)
class Command:
    """A command line: its table, and what the table alone doesn't say."""

    description: str
    flags: tuple[Flag, ...]
    method: str = "text-to-image"
    result: Callable[[argparse.Namespace], str] = lambda flags: ""
    """What the trained adapter is called in the run's folder; empty for what its readers expect."""

    def parser(self) -> argparse.ArgumentParser:
        """The flags as argparse takes them."""
        parser = argparse.ArgumentParser(description=self.description, allow_abbrev=False)
        for flag in self.flags:
            if flag.type is None:
                parser.add_argument(f"--{flag.name}", action="store_true", help=flag.help)
                continue
            parser.add_argument(
                f"--{flag.name}",
                type=flag.type,
                default=flag.default,
                choices=flag.choices,
                required=flag.required,
                help=flag.help + ("" if flag.default is None else f" Default: {flag.default}."),
                **({"nargs": "+"} if flag.several else {}),  # type: ignore[arg-type]
            )
        return parser

    def translate(self, flags: argparse.Namespace, world: World) -> list[Given]:
        """Every flag's settings, each with the flag as its place.

        Raises:
            Refused: flags contradict each other, or ask for what there is not.
        """
        from scumble.runs.load import Given

        if getattr(flags, "report_to", "") in ("wandb", "all") and flags.hub_token is not None:
            raise Refused(
                "--hub_token with --report_to=wandb would put the token into the tracker's log of the command. "
                "Log in with `hf auth login` instead."
            )
        return [Given(("method",), self.method, "this command")] + [
            Given(tuple(name.split(".")), value, f"--{flag.name}")
            for flag in self.flags
            for name, value in flag.settings(flags, world).items()
        ]

    def data(self, flags: argparse.Namespace, world: World) -> Values:
        """The data settings that flags name directly."""
        found: dict[str, object] = {}
        for flag in self.flags:
            if isinstance(flag.becomes, str) and flag.becomes.startswith("data."):
                found |= flag.settings(flags, world)
        return found

    def notes(self, flags: argparse.Namespace) -> list[str]:
        """What a person should know of the flags' effects."""
        return [note for flag in self.flags if (note := flag.note(getattr(flags, flag.name), flags))]

    def run(self, arguments: Sequence[str] | None = None, *, alone: bool | None = None) -> int:
        """Train; returns the exit code. `alone`: the process is nobody else's, as where no arguments are given."""
        flags = self.parser().parse_args(arguments)
        alone = arguments is None if alone is None else alone
        # remarks on optional parts that are not used here
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        if getattr(flags, "cache_dir", None) is not None:  # read by the libraries when they are imported
            os.environ["HF_HUB_CACHE"] = os.environ["HF_DATASETS_CACHE"] = flags.cache_dir
        from importlib.util import find_spec

        from scumble.collector import start_up
        from scumble.errors import ScumbleError, to_be_printed

        def count(data: Values) -> int:
            from scumble.data.settings import DataSettings
            from scumble.data.sources import open_dataset

            settings = DataSettings(**{name.removeprefix("data."): value for name, value in data.items()})  # type: ignore[arg-type]
            return sum(record.repeats for record in open_dataset(settings, seed=flags.seed or 0).records)

        def guided(flags: argparse.Namespace) -> bool:
            from scumble.models.loading import describe_base

            base = flags.pretrained_model_name_or_path
            return describe_base(base, revision=flags.revision, variant=flags.variant).guided

        world = World(
            processes=int(os.environ.get("WORLD_SIZE", 1)),
            environment=os.environ,
            count=count,
            installed=lambda name: find_spec(name) is not None,
            guided=guided,
        )
        try:
            with start_up(alone):
                self._train(flags, world)
        except (ScumbleError, Refused) as error:
            if to_be_printed(error):
                print(f"error: {error}", file=sys.stderr)
            return getattr(error, "exit_code", 2)
        return 0

    def _train(self, flags: argparse.Namespace, world: World) -> None:
        from scumble.runs.config import RunConfig
        from scumble.runs.folder import Layout
        from scumble.runs.load import assemble
        from scumble.runs.train import result_name, train

        config = assemble(RunConfig, self.translate(flags, world))
        if int(os.environ.get("RANK", 0)) == 0:
            for note in self.notes(flags):
                print(f"note: {note}", file=sys.stderr)
        train(
            config,
            resume=resume(getattr(flags, "resume_from_checkpoint", None), Path(flags.output_dir)),
            layout=Layout(
                adapter=self.result(flags) or result_name(config),
                checkpoint="checkpoint-{step}",
                tensorboard=getattr(flags, "logging_dir", ""),
                strict=False,
            ),
            hub_token=getattr(flags, "hub_token", None),
        )


def resume(value: str | None, output: Path) -> str | Path | None:
    """`latest`, or a checkpoint in the output folder however its path is spelled; None when there is none
    yet."""
    if value is None:
        return None
    if value == "latest":
        if not any(output.glob("checkpoint-*")):
            if int(os.environ.get("RANK", 0)) == 0:
                print(f"note: {output} holds no checkpoint yet; a new run starts.", file=sys.stderr)
            return None
        return "latest"
    given = Path(value)
    return given if given.is_dir() else output / given.name


# -- what flags become ---------------------------------------------------------------------------------------


def nothing(value: Any, flags: argparse.Namespace, world: World) -> Values:
    """For flags that another row reads, or that are no settings."""
    return {}


def learning_rate(value: float, flags: argparse.Namespace, world: World) -> Values:
    """The rate, scaled where `--scale_lr` asks for it."""
    if flags.scale_lr:
        value *= flags.gradient_accumulation_steps * flags.train_batch_size * world.processes
    return {"train.optimizer.learning_rate": value}


def warmup(value: int, flags: argparse.Namespace, world: World) -> Values:
    """Steps of warm-up, of which `constant` has none."""
    return {"train.schedule.warmup_steps": 0 if flags.lr_scheduler == "constant" else value}


def in_steps(epochs: float, pictures: int, flags: argparse.Namespace, world: World) -> int:
    """Optimizer steps in which `pictures` are shown `epochs` times."""
    from scumble.runs.arithmetic import steps_for_epochs

    return steps_for_epochs(
        epochs, pictures, flags.train_batch_size, flags.gradient_accumulation_steps, world.processes
    )


def steps(count: Epochs) -> Becomes:
    """The steps, else those of `--num_train_epochs`."""
    return lambda value, flags, world: {
        "train.steps": value if value is not None else count(flags.num_train_epochs, flags, world)
    }


def preview_every(count: Epochs) -> Becomes:
    """How many steps lie between previews, told in epochs; none without a prompt."""
    return lambda value, flags, world: (
        {} if flags.validation_prompt is None else {"train.preview_every": count(value, flags, world)}
    )


def only_with_prompt(setting: str) -> Becomes:
    """A setting of the previews, of which there are none without a prompt."""
    return lambda value, flags, world: {} if flags.validation_prompt is None else {setting: value}


def preview_prompt(drawing_steps: int) -> Becomes:
    """The prompt that is drawn, in so many denoising steps."""

    def becomes(value: str | None, flags: argparse.Namespace, world: World) -> Values:
        if value is None:
            return {}
        return {"preview.prompts": (value,), "preview.steps": drawing_steps, "preview.seed": flags.seed or 0}

    return becomes


def precision(value: str | None, flags: argparse.Namespace, world: World) -> Values:
    """The flag's, else what `accelerate launch` was told."""
    return {"train.precision": value or world.environment.get("ACCELERATE_MIXED_PRECISION") or "no"}


def trackers(value: str, flags: argparse.Namespace, world: World) -> Values:
    """The trackers that there are."""
    ours = ("tensorboard", "wandb")
    if value == "all":
        return {"trackers": tuple(name for name in ours if world.installed(name))}
    if value == "none":
        return {"trackers": ()}
    if value not in ours:
        raise Refused(f"--report_to={value} is not supported. Use tensorboard, wandb, all or none.")
    return {"trackers": (value,)}


def hub_id(value: str | None, flags: argparse.Namespace, world: World) -> Values:
    """Where an upload goes, if there is one."""
    return {"hub.id": value} if flags.push_to_hub and value is not None else {}


def own_tokenizer(value: str | None, flags: argparse.Namespace, world: World) -> Values:
    """The base's own tokenizer, which is the only one that suits it."""
    if value not in (None, flags.pretrained_model_name_or_path):
        raise Refused(
            f"--tokenizer_name={value} can't be honoured: the adapter would be trained on other tokens than the base "
            "reads when it draws. Leave it out."
        )
    return {}


def only(allowed: Any, why: str, name: str) -> Becomes:
    """A flag that can be honoured with one value only, beside being left out."""

    def becomes(value: Any, flags: argparse.Namespace, world: World) -> Values:
        if value not in (None, False, allowed):
            shown = "" if value is True else f"={value}"
            raise Refused(f"--{name}{shown} can't be honoured: {why}")
        return {}

    return becomes


def clip(value: float, flags: argparse.Namespace, world: World) -> Values:
    """The largest norm of the gradient; 0 is none."""
    return {"train.max_grad_norm": value if value > 0 else None}


def beta(index: int) -> Becomes:
    """Both betas are one setting; the first flag sets it."""
    both = lambda value, flags, world: {"train.optimizer.betas": (flags.adam_beta1, flags.adam_beta2)}  # noqa: E731
    return both if index == 1 else nothing


def changed(
    rows: Sequence[Flag],
    *,
    without: Sequence[str] = (),
    defaults: Mapping[str, Any] = {},
    becomes: Mapping[str, Becomes] = {},
) -> tuple[Flag, ...]:
    """The rows for a command that lacks some, and has other defaults or meanings for some."""
    return tuple(
        replace(
            row,
            default=defaults.get(row.name, row.default),
            becomes=becomes.get(row.name, row.becomes),
        )
        for row in rows
        if row.name not in without
    )


# -- rows that all commands have -----------------------------------------------------------------------------


def base_flags() -> tuple[Flag, ...]:
    """Which base."""
    return (
        Flag(
            "pretrained_model_name_or_path",
            'Base model: a Hub id, a folder, a .safetensors checkpoint, or "picturebook".',
            "base",
            required=True,
        ),
        Flag("revision", "Branch, tag or commit of a Hub base.", "revision"),
        Flag("variant", "Variant of the base's weight files, e.g. fp16.", "variant"),
    )


def run_flags(*, output: str, batch: int, rate: float, epochs: int, count: Epochs) -> tuple[Flag, ...]:
    """How it is trained and where the result goes, with the defaults that differ between commands."""
    return (
        Flag("output_dir", "Folder of the run.", "output", default=output),
        Flag("seed", "Seed of all randomness. Unset: 0.", lambda v, f, w: {"train.seed": v or 0}, int),
        Flag("resolution", "Side of the square that is trained, in pixels.", "data.resolution", int, 512),
        Flag(
            "center_crop",
            "Cut the middle out of a picture that is not square, instead of a random part.",
            "data.center_crop",
            None,
            False,
        ),
        Flag("train_batch_size", "Pictures in one forward pass of one process.", "train.batch", int, batch),
        Flag(
            "num_train_epochs",
            "How often all pictures are shown. Unused with --max_train_steps.",
            nothing,
            int,
            epochs,
        ),
        Flag("max_train_steps", "Optimizer steps.", steps(count), int),
        Flag("gradient_accumulation_steps", "Forward passes per optimizer step.", "train.accumulate", int, 1),
        Flag(
            "gradient_checkpointing",
            "Recompute activations in the backward pass: less memory, more time.",
            "train.gradient_checkpointing",
            None,
            False,
        ),
        Flag("learning_rate", "Learning rate after warm-up.", learning_rate, float, rate),
        Flag(
            "scale_lr", "Multiply the rate by processes, accumulation and batch size.", nothing, None, False
        ),
        Flag(
            "lr_scheduler",
            "constant, constant_with_warmup, linear, cosine, cosine_with_restarts or polynomial.",
            "train.schedule.name",
            default="constant",
        ),
        Flag("lr_warmup_steps", "Steps of linear warm-up; constant has none.", warmup, int, 500),
        Flag(
            "use_8bit_adam",
            "AdamW with 8-bit state.",
            lambda v, f, w: {"train.optimizer.name": "adamw8bit" if v else "adamw"},
            None,
            False,
        ),
        Flag("allow_tf32", "TF32 matrix products on Ampere and later GPUs.", "train.tf32", None, False),
        Flag("dataloader_num_workers", "Threads that read pictures.", "data.workers", int, 0),
        Flag("adam_beta1", "Decay of the running mean of the gradient.", beta(1), float, 0.9),
        Flag("adam_beta2", "Decay of the running mean of its square.", beta(2), float, 0.999),
        Flag("adam_weight_decay", "Decoupled weight decay.", "train.optimizer.weight_decay", float, 1e-2),
        Flag(
            "adam_epsilon",
            "Added to the denominator of the update.",
            "train.optimizer.epsilon",
            float,
            1e-8,
        ),
        Flag("max_grad_norm", "Gradients are scaled down to this norm; 0 leaves them.", clip, float, 1.0),
        Flag("push_to_hub", "Upload the result to the Hub.", "hub.push", None, False),
        Flag("hub_token", "Token for it; better: `hf auth login`.", nothing),
        Flag("hub_model_id", "Repository to upload to. Unset: the output folder's name.", hub_id),
        Flag("logging_dir", "Folder of TensorBoard's files, in the output folder.", nothing, default="logs"),
        Flag(
            "mixed_precision",
            "no, fp16 (GPU only) or bf16. Unset: what `accelerate launch` was told.",
            precision,
            choices=("no", "fp16", "bf16"),
        ),
        Flag("report_to", "tensorboard, wandb, all or none.", trackers, default="tensorboard"),
        Flag(
            "local_rank", "Read from the environment by Accelerate; the flag is accepted.", nothing, int, -1
        ),
        Flag("checkpointing_steps", "Steps between checkpoints.", "train.checkpoint_every", int, 500),
        Flag("checkpoints_total_limit", "Keep this many checkpoints.", "train.checkpoint_limit", int),
        Flag("resume_from_checkpoint", 'A checkpoint\'s folder, or "latest".', nothing),
        Flag(
            "enable_xformers_memory_efficient_attention",
            "Accepted. Attention is torch's own memory-efficient one anyway.",
            nothing,
            None,
            False,
            note=lambda value, flags: (
                "--enable_xformers_memory_efficient_attention: torch's scaled_dot_product_attention is used, "
                "which needs as little memory; xformers is not."
                if value
                else ""
            ),
        ),
    )


def lora_flags() -> tuple[Flag, ...]:
    """How large the adapter is, and how pictures are resized."""
    return (
        Flag("rank", "Rank of the LoRA; alpha is the same number.", "adapter.rank", int, 4),
        Flag(
            "image_interpolation_mode",
            "How pictures are resized.",
            "data.interpolation",
            default="lanczos",
            choices=("lanczos", "bicubic", "bilinear", "box", "hamming", "nearest", "nearest_exact"),
        ),
    )
