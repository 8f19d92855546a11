"""From a stored picture to the pixels that are trained: upright RGB, resized, cropped, mirrored, with its
geometry.

Legend: sizes are (height, width) in pixels, corners (top, left), except where a PIL call wants (width,
height).
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageOps

from scumble.data.problems import Refused
from scumble.data.record import Record

if TYPE_CHECKING:
    from torch import Tensor

    from scumble.models.family import Frame

Size = tuple[int, int]

ORIENTATION = 0x0112
"""EXIF tag; 5 to 8 exchange height and width."""
_BROKEN = (OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error, zlib.error)
"""What PIL raises on a damaged file."""


def normalise(image: Image.Image, paper: str = "white") -> Image.Image:
    """Upright 8-bit RGB of a stored picture.

    EXIF orientation is applied; transparency is laid on `paper`; grey, palette and CMYK become RGB; 16-bit grey
    is scaled (v / 257), not clipped. Colour profiles are not applied. An 8-bit RGB picture keeps its pixels
    exactly.

    Raises:
        Refused: the picture is animated or has several pages, or holds 32-bit numbers without an agreed
            range.
        OSError and others of PIL: the file is damaged (`open_upright` turns them into Refused).
    """
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format != "MPO":  # an MPO file is a phone's JPEG with a preview behind it
        raise Refused("animated", f"has {frames} frames. Save the one you mean as PNG or JPEG.")
    image.load()
    upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith("I;16") or (upright.mode == "I" and image.format == "PNG"):
        grey = np.asarray(upright).astype(np.float64)
        return Image.fromarray(np.round(grey / 257).clip(0, 255).astype(np.uint8)).convert("RGB")
    if upright.mode in ("I", "F"):
        raise Refused(
            "32-bit",
            f"holds 32-bit numbers (mode {upright.mode}) without an agreed range. Save it with 8 or 16 bits.",
        )
    if upright.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in upright.info:
        rgba = upright.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, paper), rgba).convert("RGB")
    return upright.convert("RGB")


def open_upright(record: Record, paper: str = "white") -> Image.Image:
    """The record's picture as upright RGB, transparency laid on `paper`.

    Raises:
        Refused: it can't be read or used; the text names it.
    """
    try:
        with record.open() as stored:
            return normalise(stored, paper)
    except Exception as error:
        raise _refusal(record, error) from error


def see_through(record: Record) -> bool:
    """Whether a part of the record's picture is transparent. Decodes only a picture that has transparency at all.

    Raises:
        OSError and others of PIL: the file is damaged.
    """
    with record.open() as stored:
        if "A" not in stored.getbands() and "transparency" not in stored.info:
            return False
        opaque, _ = stored.convert("RGBA").getchannel("A").getextrema()
        return opaque != 255


def _refusal(record: Record, error: Exception) -> Exception:
    """The error to show for `error` while reading `record`; unforeseen ones come back as they are."""
    if isinstance(error, Refused):
        return Refused(error.kind, f"{record.key}: {error}")
    if isinstance(error, FileNotFoundError):
        return Refused("missing", f"{record.key}: there is no such file.")
    if isinstance(error, Image.DecompressionBombError):
        return Refused("too large", f"{record.key}: {error} Make it smaller first.")
    if isinstance(error, Image.UnidentifiedImageError):
        return Refused(
            "unreadable",
            f"{record.key}: is no picture in a format that can be read here. Save it as PNG or JPEG.",
        )
    if isinstance(error, _BROKEN):
        kind = "truncated" if "truncated" in str(error).lower() else "unreadable"
        return Refused(kind, f"{record.key}: the file is damaged ({error}). Replace it or take it out.")
    return error


@dataclass(frozen=True)
class Measured:
    """What is known of a picture without decoding it."""

    content: str
    """sha256 hex of the stored bytes; of the upright pixels where there are no bytes."""
    size: Size
    """(height, width) after EXIF orientation."""


def measure(record: Record) -> Measured:
    """Content hash and upright size of a record's picture.

    Raises:
        Refused: it can't be read; the text names it.
    """
    if record.read is None:
        upright = open_upright(record)
        digest = hashlib.sha256(f"{upright.size}".encode() + upright.tobytes())
        return Measured(digest.hexdigest(), (upright.height, upright.width))
    try:
        digest = hashlib.sha256(record.read())
        with record.open() as stored:
            turned = stored.getexif().get(ORIENTATION, 1) in (5, 6, 7, 8)
            width, height = stored.size
    except Exception as error:
        raise _refusal(record, error) from error
    return Measured(digest.hexdigest(), (width, height) if turned else (height, width))


@dataclass(frozen=True)
class Geometry:
    """How a picture is cut: resized to cover the target, cropped, perhaps mirrored."""

    original: Size
    """The picture after EXIF orientation."""
    resized: Size
    """After resizing; covers `target`."""
    corner: Size
    """(top, left) of the crop in the resized picture."""
    target: Size
    """What the denoiser sees."""
    flipped: bool = False
    """Mirrored left to right, after the crop."""

    @property
    def variant(self) -> str:
        """The geometry as a cache key."""
        (height, width), (top, left) = self.resized, self.corner
        mirrored = " mirrored" if self.flipped else ""
        return f"{self.target[0]}x{self.target[1]} at {top},{left} of {height}x{width}{mirrored}"

    @property
    def scale(self) -> float:
        """Pixels of the resized picture per pixel of the original; above 1 the picture is enlarged."""
        return max(self.target[0] / self.original[0], self.target[1] / self.original[1])

    @property
    def lost(self) -> tuple[int, int, int, int]:
        """Pixels of the original lost at the (top, right, bottom, left)."""
        down, across = self.original[0] / self.resized[0], self.original[1] / self.resized[1]
        top, left = self.corner
        bottom = self.resized[0] - self.target[0] - top
        right = self.resized[1] - self.target[1] - left
        return round(top * down), round(right * across), round(bottom * down), round(left * across)

    @property
    def lost_area(self) -> float:
        """Part of the picture's area that is cropped away, in [0, 1)."""
        return 1 - (self.target[0] * self.target[1]) / (self.resized[0] * self.resized[1])

    @property
    def told_corner(self) -> Size:
        """The corner that the denoiser is told: in the resized picture, mirrored when the picture is (as
        SDXL's training does, which mirrors before it crops)."""
        top, left = self.corner
        return (top, self.resized[1] - self.target[1] - left) if self.flipped else self.corner


def covering(original: Size, target: Size) -> Size:
    """The size of a picture resized with its proportions kept until it just covers `target`."""
    if original == target:
        return original
    scale = max(target[0] / original[0], target[1] / original[1])
    return max(target[0], round(original[0] * scale)), max(target[1], round(original[1] * scale))


def center(original: Size, target: Size) -> Geometry:
    """The middle of a picture."""
    resized = covering(original, target)
    corner = ((resized[0] - target[0]) // 2, (resized[1] - target[1]) // 2)
    return Geometry(original, resized, corner, target)


def crops(original: Size, target: Size, draws: Sequence[int]) -> tuple[Geometry, ...]:
    """One crop for each number of `draws`, the number choosing the place; all places when there are not more
    of them than draws, so that a picture that needs no crop has one variant."""
    resized = covering(original, target)
    rows, columns = resized[0] - target[0] + 1, resized[1] - target[1] + 1
    places = (
        range(rows * columns) if rows * columns <= len(draws) else [draw % (rows * columns) for draw in draws]
    )
    return tuple(Geometry(original, resized, divmod(place, columns), target) for place in places)


_FILTERS = {filter.name.lower(): filter for filter in Image.Resampling}
_FILTERS["nearest_exact"] = (
    Image.Resampling.NEAREST
)  # Pillow's takes the pixel under the centre, as "exact" means


def mirrored(geometry: Geometry) -> Geometry:
    """The same cut, mirrored left to right."""
    return replace(geometry, flipped=True)


def cut(image: Image.Image, geometry: Geometry, interpolation: str = "lanczos") -> Image.Image:
    """The pixels of `geometry` from an upright RGB picture: resize, crop, mirror. A picture of the target's
    size keeps its pixels exactly."""
    height, width = geometry.resized
    if image.size != (width, height):
        image = image.resize((width, height), _FILTERS[interpolation])
    top, left = geometry.corner
    if geometry.resized != geometry.target:
        image = image.crop((left, top, left + geometry.target[1], top + geometry.target[0]))
    return ImageOps.mirror(image) if geometry.flipped else image


def to_tensor(image: Image.Image) -> Tensor:
    """RGB picture -> (3, H, W) fp32 in [-1, 1]: v / 127.5 - 1."""
    import torch

    pixels = torch.from_numpy(np.array(image, dtype=np.uint8))
    return pixels.permute(2, 0, 1).to(torch.float32).div_(127.5).sub_(1.0).contiguous()


def frame(geometries: Sequence[Geometry]) -> Frame:
    """The geometry that the denoiser is told, a row each."""
    import torch

    from scumble.models.family import Frame

    def rows(sizes: Iterator[Size]) -> Tensor:
        return torch.tensor(list(sizes), dtype=torch.int64)

    return Frame(
        original=rows(g.original for g in geometries),
        corner=rows(g.told_corner for g in geometries),
        target=rows(g.target for g in geometries),
    )
