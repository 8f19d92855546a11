"""Stable Diffusion 2: a UNet whose transformers project by linear layers, told text by OpenCLIP ViT-H/14.

The 768-pixel bases predict velocity, the 512-pixel ones (`-base`) epsilon: the scheduler config says which.
"""

from __future__ import annotations

from typing import ClassVar

from scumble.models.tiny import TinySizes
from scumble.models.unet import UNetFamily


class SD2(UNetFamily):
    """Stable Diffusion 2.x: velocity or epsilon prediction; at full size 768 or 512 pixels, cross-attention
    of 1024."""

    name: ClassVar[str] = "sd2"
    title: ClassVar[str] = "Stable Diffusion 2"
    linear: ClassVar[bool] = True
    # heads of 64 channels at full size: their number grows with the level; padding is "!", which is token 0
    tiny_sizes: ClassVar[TinySizes] = TinySizes(
        width=48, heads=(2, 4), linear=True, prediction="v_prediction", activation="gelu", padding="!"
    )
