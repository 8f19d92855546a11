"""The embedded world: a small Stable Diffusion of our own, and the pictures that it knows.

`path()` is a folder that any diffusers loads: `StableDiffusionPipeline.from_pretrained(scumble.picturebook.path())`.
Nothing here is imported until it is touched, so that asking for the path costs nothing.
"""

from __future__ import annotations

from pathlib import Path

from scumble.errors import ModelError


def path() -> Path:
    """The folder of the embedded base, in the layout of StableDiffusionPipeline.

    Raises:
        ModelError: the weights are not in this installation.
    """
    folder = Path(__file__).parent / "assets" / "base"
    if not (folder / "model_index.json").is_file():
        raise ModelError(
            f"The embedded base is missing from {folder}: this installation was built without its weights. "
            "Install the wheel again, or train the base yourself: scumble picturebook pretrain WORK."
        )
    return folder
