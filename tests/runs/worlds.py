"""A world to run in: a tiny base on disk, and a folder of small pictures beside it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


def write_world(
    folder: Path,
    count: int = 6,
    *,
    caption: str | None = "colour number {}",
    pictures: str = "pictures",
    size: tuple[int, int] = (16, 16),
    wider: int = 0,
    family: str = "sd1",
) -> Path:
    """`folder` with `base/`, and `count` pictures in another folder; each is `wider` than the one before it.

    `caption`: what metadata.jsonl says of the n-th picture; None writes none.
    """
    from PIL import Image

    from scumble.models.tiny import save

    save(family, folder / "base")
    (folder / pictures).mkdir()
    lines = []
    for number in range(count):
        picture = Image.new("RGB", (size[0] + wider * number, size[1]), (40 * number, 200 - 30 * number, 90))
        picture.paste((255, 255, 0), (0, 0, 4 + number, 8))
        picture.save(folder / pictures / f"{number}.png")
        if caption is not None:
            lines.append(json.dumps({"file_name": f"{number}.png", "text": caption.format(number)}))
    if lines:
        (folder / pictures / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def short_run(world: Path, output: Path, *, steps: int, **more: Any) -> dict[str, Any]:
    """The settings of a run of so many steps in a world."""
    return {
        "base": str(world / "base"),
        "data": {"images": str(world / "pictures")},
        "output": output,
        "train": {"steps": steps, "batch": 2, "optimizer": {"learning_rate": 0.01}},
        "quiet": True,
        **more,
    }


def small_run(world: Path, name: str) -> dict[str, Any]:
    """The settings of a run with previews, of 16 pixels on a CPU, in a folder of this name; all but what trains."""
    return {
        "base": world / "base",
        "data": {"images": world / "pictures", "resolution": 16},
        "output": world / name,
        "quiet": True,
        "device": "cpu",
        "preview": {"prompts": ["colour number 1"], "steps": 2},
    }


def drawn_by_diffusers(base: Path, adapter: Path | None = None) -> Tensor:
    """A picture of `base` by an unmodified pipeline, perhaps with the adapter in a folder: (1, H, W, 3)."""
    import torch
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(base)
    if adapter is not None:
        pipeline.load_lora_weights(str(adapter))
    noise = torch.Generator().manual_seed(0)
    return torch.as_tensor(
        pipeline("x", num_inference_steps=2, generator=noise, output_type="np", width=16, height=16).images
    )


def cut_and_resumed(told: Callable[[str], dict[str, Any]]) -> None:
    """A run of four steps that lost its last checkpoint and its adapter, and goes on, gives the adapter of a whole one.

    `told`: the settings of a run in a folder of this name, with a checkpoint every two steps.
    """
    import shutil

    from safetensors.torch import load_file

    import scumble

    whole, half = scumble.train(**told("whole")), scumble.train(**told("half"))
    assert whole.adapter and half.adapter
    half.adapter.unlink()
    shutil.rmtree(half.folder / "checkpoint-000004")
    resumed = scumble.train(half.folder / "run.toml", resume="latest", quiet=True)
    assert resumed.adapter
    first, second = load_file(whole.adapter), load_file(resumed.adapter)
    assert first.keys() == second.keys() and all((first[name] == second[name]).all() for name in first)
