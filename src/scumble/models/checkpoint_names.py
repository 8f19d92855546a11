"""Checkpoint names: which tensor of a single checkpoint holds the weight of which layer.

diffusers' own converters, by which such a file is loaded, are asked where each tensor goes (see `marks`).
"""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace

from scumble.models.file_layout import layout_of
from scumble.models.marks import Mark, marks_of
from scumble.models.single_file import UNET, not_laid_out, text_configs, unet_config


def layer_marks(shapes: Mapping[str, tuple[int, ...]], name: str) -> dict[str, Mark]:
    """`"unet.down_blocks.0...to_q.weight"` -> where it is in a checkpoint whose tensors have these `shapes`.

    Every tensor of the denoiser and the text encoders that diffusers reads is there, biases and norms too.

    Raises:
        ModelError: the file is not laid out as a checkpoint of any family that this release reads.
    """
    layout = layout_of(shapes)
    if layout is not None:
        parts = layout.marks(shapes, name)
        return {f"{root}.{key}": mark for root in parts if root != "vae" for key, mark in parts[root].items()}
    from diffusers.loaders.single_file_utils import (
        convert_ldm_clip_checkpoint,
        convert_ldm_unet_checkpoint,
        convert_open_clip_checkpoint,
    )

    marks = marks_of(shapes)
    try:
        unet = convert_ldm_unet_checkpoint(
            {key: mark for key, mark in marks.items() if key.startswith(UNET)}, unet_config(shapes)
        )
    except (KeyError, IndexError) as error:
        raise not_laid_out(name, error) from error
    converted = {"unet": unet}
    for root, (prefix, config) in text_configs(shapes).items():
        mine = {key: mark for key, mark in marks.items() if key.startswith(prefix)}
        if f"{prefix}embeddings.token_embedding.weight" in shapes:
            converted[root] = convert_ldm_clip_checkpoint(mine)
        elif config is not None:
            model = SimpleNamespace(config=SimpleNamespace(hidden_size=config["hidden_size"]))
            converted[root] = convert_open_clip_checkpoint(model, mine, prefix)
    return {f"{root}.{key}": mark for root, found in converted.items() for key, mark in found.items()}
