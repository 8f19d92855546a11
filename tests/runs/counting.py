"""scumble.train as one of several processes, which writes down what it encoded and drew before training.

python counting.py FOLDER '{"base": ..., "data": {...}}' [apart]

apart: no disk in common, as on two machines: each process has an output folder and a cache of its own.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import scumble
from scumble.data.loader import Loader
from scumble.inference.drawing import Drawing
from scumble.models.latent_base import LatentBase
from scumble.models.unet import UNetBase
from scumble.training.preview import Previewer


def counted() -> dict[str, list[str]]:
    """What this process encodes, says and draws from now on, before it trains."""
    counts: dict[str, list[str]] = {"pictures": [], "captions": [], "drawn": []}
    preparing, begun = [False], [False]  # before the first prepare, the base is asked what it predicts
    prepare, images, prompts = Loader.prepare, LatentBase.encode_images, UNetBase.encode_prompts
    save = Drawing.save

    @contextlib.contextmanager
    def now() -> Iterator[None]:
        preparing[0] = begun[0] = True
        yield
        preparing[0] = False

    def prepare_counted(self: Loader, **options: Any) -> None:
        with now():
            prepare(self, **options)

    def images_counted(self: LatentBase, pixels: Tensor, *rest: Any) -> Tensor:
        if begun[0]:
            counts["pictures"] += [hashlib.sha256(row.numpy().tobytes()).hexdigest() for row in pixels]
        return images(self, pixels, *rest)

    def prompts_counted(self: UNetBase, said: list[str], *rest: Any) -> Any:
        counts["captions"] += said if preparing[0] else []
        return prompts(self, said, *rest)

    def save_counted(self: Drawing, path: Path) -> Path:
        counts["drawn"].append(Path(path).name)
        return save(self, path)

    Loader.prepare, LatentBase.encode_images = prepare_counted, images_counted  # type: ignore[method-assign]
    UNetBase.encode_prompts, Drawing.save = prompts_counted, save_counted  # type: ignore[method-assign]
    # previews are drawn after training began
    Previewer.__call__ = lambda self, path, step: []  # type: ignore[assignment,method-assign]
    return counts


def main(folder: Path, settings: dict[str, Any], apart: bool, resume: str | None) -> None:
    torch.set_num_threads(1)
    rank, counts = os.environ.get("RANK", "0"), counted()
    own = f"-{rank}" if apart else ""
    settings["output"] = str(folder / f"run{own}")
    if apart or "cache" in settings["data"]:
        settings["data"]["cache"] = str(folder / f"cache{own}")
    result = scumble.train(**settings, resume=resume)
    (folder / f"counts-{rank}.json").write_text(json.dumps(counts))
    if rank == "0":
        assert result.adapter is not None


if __name__ == "__main__":
    main(
        Path(sys.argv[1]),
        json.loads(sys.argv[2]),
        "apart" in sys.argv,
        "latest" if "resume" in sys.argv else None,
    )
