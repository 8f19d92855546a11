"""Canvas: the picture that a request paints into, and where."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageOps

from scumble.errors import ConfigError, DataError
from scumble.inference.request import Request


@dataclass(frozen=True)
class Canvas:
    """An upright picture, and a mask of its size."""

    image: Image.Image
    """RGB."""
    mask: Image.Image
    """L: white is painted, black is kept."""
    sha256: dict[str, str]
    """File -> hash of its bytes."""


def canvas_of(request: Request) -> Canvas | None:
    """What `request` paints into; None where it draws a whole picture.

    Raises:
        ConfigError: there is an image without a mask, or the other way round.
        DataError: one can't be read, they are of two sizes, or the mask is black everywhere.
    """
    if request.image is None and request.mask is None:
        return None
    if request.image is None or request.mask is None:
        have, lack = ("image", "mask") if request.mask is None else ("mask", "image")
        text = {
            "mask": "a grey picture of the same size, white where something new should be painted",
            "image": "the picture to paint into",
        }
        raise ConfigError(
            f"{have} = {getattr(request, have)} is given without {lack}: {text[lack]}. Give both, or none."
        )
    image, mask = _opened(request.image, "RGB"), _opened(request.mask, "L")
    if image.size != mask.size:
        raise DataError(
            f"{request.mask} is {mask.width}x{mask.height} pixels and {request.image} {image.width}x{image.height}. "
            "Make both of one size."
        )
    if mask.point(lambda level: 255 * (level >= 128)).getbbox() is None:
        raise DataError(f"{request.mask} is nowhere white: nothing would be painted.")
    digests = {
        str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in (request.image, request.mask)
    }
    return Canvas(image, mask, digests)


def _opened(path: Path, mode: str) -> Image.Image:
    try:
        with Image.open(path) as stored:
            return ImageOps.exif_transpose(stored).convert(mode)
    except FileNotFoundError as error:
        raise DataError(f"There is no picture {str(path)!r}.") from error
    except (OSError, SyntaxError, ValueError) as error:
        raise DataError(f"{path} can't be read as a picture: {error}") from error
