"""Masks: where the loss counts, a grey picture beside each picture, cut and shrunk as its picture is.

White counts, black and transparent do not, grey counts in part. A mask is a `Record` of its own, so that it is opened,
measured and refused like a picture.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image, ImageOps

from scumble.data.images import Geometry, Measured, cut, measure, open_upright
from scumble.data.problems import Problem, Refused
from scumble.data.record import Record
from scumble.data.settings import DataSettings
from scumble.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor

ALPHA = "alpha"
"""The value of `DataSettings.masks` that takes each picture's own transparency."""
_USUAL = ("masks", "mask")
"""What folders of masks are called."""


def folder(settings: DataSettings) -> Path | None:
    """The folder of masks, or None where there is none: one in `images` goes before another of that name.

    Raises:
        DataError: there is no such folder.
    """
    if settings.masks is None or settings.masks == ALPHA:
        return None
    for path in (Path(settings.images).expanduser() / settings.masks, Path(settings.masks).expanduser()):
        if path.is_dir():
            return path
    raise DataError(
        f"There is no folder of masks {settings.masks!r}, neither in {settings.images} nor in {Path.cwd()}. "
        f'Name one, or set masks = "{ALPHA}" where the pictures carry their masks as transparency.'
    )


def attach(
    records: Sequence[Record], settings: DataSettings
) -> tuple[tuple[Record, ...], tuple[Problem, ...]]:
    """The records with their masks, and a problem for each that has none. Opens no picture.

    A mask in a folder has its picture's name, perhaps with another ending: `masks/a/3.png` for `a/3.jpg`.

    Raises:
        DataError: there is no such folder.
    """
    place = folder(settings)
    if place is None:
        return tuple(replace(record, mask=_alpha(record)) for record in records), ()
    files = {
        path.relative_to(place).with_suffix("").as_posix(): path
        for path in sorted(place.rglob("*"))
        if path.is_file() and not path.name.startswith(".")
    }
    found: list[Record] = []
    problems: list[Problem] = []
    for record in records:
        name = Path(record.key).with_suffix("").as_posix()
        if record.path is None or name not in files:
            expected = place / f"{name}.png"
            problems.append(Problem("no mask", record.key, f"has no mask: there is no {expected}."))
        else:
            found.append(replace(record, mask=_file(files.pop(name), record)))
    if files:
        first, *others = sorted(files.values())
        several = f"and {len(others)} more masks belong" if others else "belongs"
        text = f"{several} to no picture that is trained on."
        problems.append(Problem("unused mask", str(first), text, error=False))
    return tuple(found), tuple(problems)


def unasked(root: Path, pictures: Sequence[Path], settings: DataSettings) -> Iterable[Problem]:
    """A warning where the pictures below `root` look like masks of others, and the settings name no masks."""
    if settings.masks is not None:
        return
    stems = {path.relative_to(root).with_suffix("") for path in pictures}
    for name in sorted({stem.parts[0] for stem in stems}):
        if name.lower() not in _USUAL:
            continue
        inside = [stem.relative_to(name) for stem in stems if stem.parts[0] == name and len(stem.parts) > 1]
        named = sum(stem in stems for stem in inside)
        if named:
            text = (
                f"{named} of its {len(inside)} pictures are named as pictures beside it are, and they are taken for "
                f'pictures, not for masks. If they say where the loss counts, set masks = "{name}"; else rename the '
                "folder."
            )
            yield Problem("masks not set", f"{name}/", text, error=False)


def _file(path: Path, record: Record) -> Record:
    return Record(f"the mask of {record.key}", lambda: Image.open(path), ("",), path, read=path.read_bytes)


def _alpha(record: Record) -> Record:
    def opened(stored: Callable[[], Image.Image] = record.open) -> Image.Image:
        with stored() as picture:
            picture.load()
            upright = ImageOps.exif_transpose(picture)
        if "A" not in upright.getbands() and "transparency" not in upright.info:
            raise Refused(
                "no mask",
                'has no transparency, and masks = "alpha" takes the mask from there. Save it with an alpha '
                "channel (PNG or WebP), or put the mask into a folder.",
            )
        return upright.convert("RGBA").getchannel("A")

    return Record(f"the mask of {record.key}", opened, ("",))


def measured(record: Record, picture: Measured, only: Geometry | None = None) -> str:
    """The content hash of the record's mask; "" where it has none. Decodes the mask.

    `only`: the cut of the picture, where it is shown in no other.

    Raises:
        Refused: it can't be read, has another size than its picture, or is black everywhere or in all of `only`; the
            text names it.
    """
    if record.mask is None:
        return ""
    mask = measure(record.mask)
    if mask.size != picture.size:
        (high, wide), (height, width) = mask.size, picture.size
        raise Refused(
            "mask size",
            f"{record.mask.key}: it is {wide}x{high} pixels and the picture {width}x{height} (width x height). "
            "Make both of one size.",
        )
    grey = opened(record.mask)
    if grey.getbbox() is None:
        raise Refused("empty mask", f"{record.mask.key}: it is black everywhere: nothing would be learned.")
    if only is not None and _cut(grey, only).getbbox() is None:
        height, width = only.target
        raise Refused(
            "empty mask",
            f"{record.mask.key}: it is black in all of the {width}x{height} that the crop leaves of the picture: "
            "nothing would be learned. Crop both yourself, around what is white.",
        )
    return mask.content


def opened(mask: Record) -> Image.Image:
    """A mask's upright grey picture, mode L; transparency is black, as editors save white painted on nothing.

    Raises:
        Refused: it can't be read; the text names it.
    """
    return open_upright(mask, "black").convert("L")


def _cut(mask: Image.Image, geometry: Geometry) -> Image.Image:
    """A grey picture cut as its picture is.

    A picture is resized with a filter that may ring; its mask by the mean of what each pixel covers.
    """
    return cut(mask, geometry, "bilinear")


def weights(mask: Image.Image, geometry: Geometry, factor: int) -> Tensor:
    """(1, h, w) fp32 in [0, 1] from a grey picture: cut as its picture is, then the mean of each factor x factor
    pixels that make one latent. Exactly 0 where all of these are black.
    """
    import numpy as np
    import torch

    pixels = np.asarray(_cut(mask, geometry), dtype=np.float32) / 255
    return torch.nn.functional.avg_pool2d(torch.from_numpy(pixels)[None], factor)


__all__ = ["ALPHA", "attach", "folder", "measured", "opened", "weights"]
