"""Stable Diffusion 1: a UNet whose transformers project by 1x1 convolutions, told text by CLIP ViT-L/14.

Sizes decide nothing: a small base of the same structure (the picturebook) is of this family too.
"""

from __future__ import annotations

from typing import ClassVar

from scumble.models.tiny import TinySizes
from scumble.models.unet import UNetFamily


class SD1(UNetFamily):
    """Stable Diffusion 1.x: epsilon prediction; at full size 512 pixels, cross-attention of 768."""

    name: ClassVar[str] = "sd1"
    title: ClassVar[str] = "Stable Diffusion 1"
    linear: ClassVar[bool] = False
    # what diffusers calls attention_head_dim is the number of heads: 8 at full size, on every level
    tiny_sizes: ClassVar[TinySizes] = TinySizes(width=32, heads=2, linear=False)
