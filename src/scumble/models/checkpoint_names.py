"""Checkpoint names: which tensor of a single checkpoint holds the weight of which layer.

diffusers' own converters, by which such a file is loaded, are handed marks instead of tensors and asked where
each one went: what they say here is what they do there, so that a table of our own can't disagree with them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

from scumble.errors import ModelError
from scumble.models.single_file import UNET, text_configs, unet_config


@dataclass(frozen=True)
class Mark:
    """A tensor's place: its name in the file, and which of its rows. Stands in for the tensor in a converter."""

    name: str
    shape: tuple[int, ...]
    begin: int
    end: int
    turned: bool = False
    """The file holds it transposed: `shape` is that of the weight."""

    def __getitem__(self, index: Any) -> Mark:
        rows = index[0] if isinstance(index, tuple) else index
        begin, end, _ = rows.indices(self.end - self.begin)
        return Mark(self.name, (end - begin, *self.shape[1:]), self.begin + begin, self.begin + end)

    @property
    def T(self) -> Mark:
        return replace(self, shape=self.shape[::-1], turned=not self.turned)

    def clone(self) -> Mark:
        return self

    def detach(self) -> Mark:
        return self

    def contiguous(self) -> Mark:
        return self


def layer_marks(shapes: Mapping[str, tuple[int, ...]], name: str) -> dict[str, Mark]:
    """`"unet.down_blocks.0...to_q.weight"` -> where it is in a checkpoint whose tensors have these `shapes`.

    Every tensor of the UNet and the text encoders that diffusers reads is there, biases and norms too.

    Raises:
        ModelError: the file is not laid out as an SD 1, SD 2 or SDXL checkpoint.
    """
    from diffusers.loaders.single_file_utils import (
        convert_ldm_clip_checkpoint,
        convert_ldm_unet_checkpoint,
        convert_open_clip_checkpoint,
    )

    marks = {key: Mark(key, shape, 0, shape[0] if shape else 0) for key, shape in shapes.items()}
    try:
        unet = convert_ldm_unet_checkpoint(
            {key: mark for key, mark in marks.items() if key.startswith(UNET)}, unet_config(shapes)
        )
    except (KeyError, IndexError) as error:
        raise ModelError(
            f"{name} is not laid out as Stable Diffusion's checkpoints are: {error} is not where it belongs. If "
            "diffusers can load it, save it as a folder with save_pretrained and name that folder."
        ) from error
    converted = {"unet": unet}
    for root, (prefix, config) in text_configs(shapes).items():
        mine = {key: mark for key, mark in marks.items() if key.startswith(prefix)}
        if f"{prefix}embeddings.token_embedding.weight" in shapes:
            converted[root] = convert_ldm_clip_checkpoint(mine)
        elif config is not None:
            model = SimpleNamespace(config=SimpleNamespace(hidden_size=config["hidden_size"]))
            converted[root] = convert_open_clip_checkpoint(model, mine, prefix)
    return {f"{root}.{key}": mark for root, found in converted.items() for key, mark in found.items()}
