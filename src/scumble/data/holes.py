"""Holes: what is cut out of a picture that an inpainting base learns to fill, drawn anew at each visit."""

from __future__ import annotations

from typing import TYPE_CHECKING

from PIL import Image, ImageDraw

from scumble.data.images import Size
from scumble.rng import Streams

if TYPE_CHECKING:
    from torch import Tensor

WHOLE = 0.25
"""How often the whole picture is the hole, so that drawing from the prompt alone stays in practice."""
SHAPES = 4
"""Rectangles and ellipses in a hole, at most."""
SMALLEST, LARGEST = 0.125, 0.625
"""Sides of one, as parts of the picture's."""


def random(size: Size, streams: Streams, position: int) -> Tensor:
    """(1, H, W) fp32, 1 in the hole and 0 beside it: everything, or some shapes, by the sample's position alone.

    `size`: (H, W) in pixels. A hole is never empty.
    """
    import numpy as np
    import torch

    height, width = size
    rng = streams.python("data.hole", position)
    if rng.random() < WHOLE:
        return torch.ones(1, height, width)
    hole = Image.new("L", (width, height))
    pen = ImageDraw.Draw(hole)
    for _ in range(rng.randint(1, SHAPES)):
        across, down = (max(1, round(rng.uniform(SMALLEST, LARGEST) * side)) for side in (width, height))
        left, top = rng.randint(0, width - across), rng.randint(0, height - down)
        draw = pen.rectangle if rng.random() < 0.5 else pen.ellipse
        draw((left, top, left + across - 1, top + down - 1), fill=1)
    return torch.from_numpy(np.array(hole, dtype=np.float32))[None]
