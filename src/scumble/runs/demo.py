"""The demo: the whole path on the embedded base, offline, in minutes: teach a style, see it, load it in diffusers."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scumble.errors import DataError, TrainingError, UnknownName
from scumble.rng import Streams

if TYPE_CHECKING:
    from PIL import Image

    from scumble.inference.session import Session
    from scumble.picturebook.oracle import Judgement
    from scumble.picturebook.scenes import Scene

SETTINGS: dict[str, Any] = {
    "base": "picturebook",
    # dropout and the middle noise levels keep the content: without them 40 pictures are soon known by heart
    "adapter": {"rank": 32, "targets": "attention+conv", "dropout": 0.2},
    "data": {"held_out": 2},
    "train": {
        "steps": 900,
        "batch": 8,
        "held_out_every": 300,
        "preview_every": 300,
        "checkpoint_every": 300,
        "checkpoint_limit": 1,
        "optimizer": {"learning_rate": 3e-3},
        "schedule": {"name": "cosine", "warmup_steps": 20},
        "objective": {"timesteps": {"distribution": "logit-normal", "mean": 0.2, "spread": 0.8}},
    },
}
"""What teaches the embedded base a style from 40 pictures. Benchmarks use the very same."""

SAME_PICTURE = 50.0
"""dB: above it two pictures are one picture to the eye."""


@dataclass(frozen=True)
class Demo:
    """What the demo made."""

    adapter: Path
    grid: Path
    report: Path
    seconds: float
    """Training alone."""
    base: Judgement
    taught: Judgement
    psnr: float
    """Ours against unmodified diffusers with the same file and seed, in dB; infinite when equal."""


def held_out_scenes(count: int, seed: int = 60) -> list[Scene]:
    """Scenes of combinations that neither the base's nor a style's pictures ever show."""
    from scumble.picturebook.scenes import random_scene

    streams = Streams(seed)
    return [random_scene(streams.python("demo", n), held_out=True) for n in range(count)]


def teach(style: str, folder: Path, *, overwrite: bool = False, **changes: object) -> Any:
    """Write the style's 40 pictures to `folder`/pictures and train on them in `folder`/run; the RunResult.

    `changes` are settings as `train__steps=50`.

    Raises:
        UnknownName: no style is called so.
    """
    import torch

    from scumble.models.precision import fast_bf16_on_cpu
    from scumble.picturebook.dataset import STYLE_NAMES, write_dataset
    from scumble.runs.load import load
    from scumble.runs.train import train

    if style not in STYLE_NAMES:
        raise UnknownName("style", style, STYLE_NAMES)
    write_dataset(style, folder / "pictures")
    prompts = tuple(prompt(scene, style) for scene in held_out_scenes(3, seed=7))
    # half precision where the machine is made for it; elsewhere it would be slower than fp32
    precision = "bf16" if torch.cuda.is_available() or fast_bf16_on_cpu() else "no"
    settings = SETTINGS | {
        "train": SETTINGS["train"] | {"precision": precision},
        "data": SETTINGS["data"] | {"images": str(folder / "pictures")},
        "preview": {"prompts": prompts},
        "output": str(folder / "run"),
    }
    config = load(None, (), **settings)
    if changes:
        config = load(None, (), **{**config.model_dump(exclude_unset=True), **changes})
    return train(config, overwrite=overwrite)


def prompt(scene: Scene, style: str = "plain") -> str:
    """The canonical caption of a scene in a style."""
    from scumble.picturebook.captions import caption

    return caption(scene, style=style)


def draw_all(
    session: Session, scenes: list[Scene], style: str, told: Callable[[], None] = lambda: None
) -> list[Image.Image]:
    """One picture of each scene, seed by its place in the list, with the session's adapters."""
    from scumble.inference.request import Request

    asked = [Request(prompt=prompt(scene, style), seed=seed) for seed, scene in enumerate(scenes)]
    pictures: list[Image.Image] = []
    for first in range(0, len(asked), session.batch_size):
        for drawn in session.generate(asked[first : first + session.batch_size]):
            pictures.append(drawn.image)
            told()
    return pictures


def run_demo(
    style: str = "blueprint",
    output: Path = Path("runs/demo"),
    *,
    pictures: int = 12,
    overwrite: bool = False,
    say: Callable[[str], None] = print,
    **changes: object,
) -> Demo:
    """Teach `style`, draw `pictures` held-out prompts with base and adapter, load the file in diffusers, and judge.

    Raises:
        UnknownName: no style is called so.
        DataError: `output` holds an earlier demo and `overwrite` is False.
        TrainingError: unmodified diffusers draws another picture with the file than scumble does.
    """
    from scumble.inference.drawing import grid
    from scumble.inference.session import Session
    from scumble.picturebook import oracle

    if (output / "run").exists() and not overwrite:
        raise DataError(
            f"{output} holds an earlier demo. See its pictures in {output}/grid.png, or run it again with --overwrite."
        )
    say(f"1/4  Writing 40 captioned pictures in {style} style to {output}/pictures")
    say("2/4  Training a LoRA on them; the base has never seen this style")
    result = teach(style, output, overwrite=overwrite, **changes)
    if result.adapter is None or result.reason != "complete":
        raise TrainingError(
            f"The demo was stopped after step {result.step}. Start it again with --overwrite."
        )
    say(f"3/4  Drawing {pictures} scenes that no training picture shows, base beside LoRA")
    asked = held_out_scenes(pictures)
    with Session("picturebook") as session:
        bare = draw_all(session, asked, style)
    with Session("picturebook", [result.adapter]) as session:
        drawn = draw_all(session, asked, style)
    sheet = output / "grid.png"
    half = math.ceil(pictures / 2)
    names = [prompt(scene, style) for scene in asked]
    rows = [[bare[n], drawn[n], *((bare[n + half], drawn[n + half]) if n + half < pictures else (None, None))]
            for n in range(half)]  # fmt: skip
    labels = [" | ".join(names[n::half]) for n in range(half)]
    grid(rows, columns=["base", "LoRA", "base", "LoRA"], labels=labels).save(sheet)
    base, taught = oracle.judge(bare, asked, style), oracle.judge(drawn, asked, style)
    say("4/4  Loading the file into unmodified diffusers")
    psnr = against_diffusers(result.adapter, prompt(asked[0], style), drawn[0])
    if psnr < SAME_PICTURE:
        raise TrainingError(
            f"Unmodified diffusers draws another picture with {result.adapter} than scumble: PSNR {psnr:.1f} dB, "
            f"at least {SAME_PICTURE:.0f} dB is expected. Please report it with `scumble doctor`'s output."
        )
    return Demo(result.adapter, sheet, result.report, result.seconds, base, taught, psnr)


def against_diffusers(adapter: Path, words: str, ours: Image.Image, seed: int = 0) -> float:
    """PSNR in dB of `ours` against what unmodified diffusers draws from the file, with the same seed."""
    import diffusers
    import numpy as np
    import torch
    import transformers

    from scumble.picturebook import path

    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.set_verbosity_error()
        library.disable_progress_bar()
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(path())
    pipe.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    pipe.load_lora_weights(str(adapter.parent), weight_name=adapter.name)
    theirs = pipe(words, num_inference_steps=25, generator=torch.Generator().manual_seed(seed)).images[0]
    error = np.square(np.asarray(ours, float) - np.asarray(theirs, float)).mean()
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


def table(demo: Demo) -> list[tuple[str, str, str]]:
    """Rows (what, base, LoRA) of what the oracle saw."""
    words = {"style": "in the style", "subject": "right subject", "color": "right colour"}
    base, taught = asdict(demo.base), asdict(demo.taught)
    return [(label, f"{base[word]:.0%}", f"{taught[word]:.0%}") for word, label in words.items()]
