"""PNG: pictures that carry the settings they were drawn with, and can be drawn again from them.

Two text chunks: `parameters`, one readable paragraph in the form that web interfaces show, and `scumble`,
JSON that `read_settings` turns back into a `Request`.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image, PngImagePlugin, UnidentifiedImageError
from pydantic import ValidationError

from scumble.errors import ConfigError, DataError
from scumble.inference.request import Request

READABLE, OURS = "parameters", "scumble"


def write_png(image: Image.Image, path: str | Path, request: Request, settings: Mapping[str, Any]) -> Path:
    """Write `image` with its settings, in one atomic step: a reader sees the old file or the whole new one.

    `request` is what to ask for to get this very picture; `settings` is what else was used (base, scheduler,
    versions), as plain JSON values.

    Raises:
        ConfigError: the file isn't called .png, or can't be written.
    """
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise ConfigError(
            f"{path} is not a .png file; settings are kept in PNG pictures only. Call it {path.stem}.png."
        )
    record = {"request": request.model_dump(mode="json"), "drawn": dict(settings)}
    info = PngImagePlugin.PngInfo()
    info.add_text(READABLE, readable(request, settings))
    info.add_text(OURS, json.dumps(record))
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as stream:
            image.save(stream, "PNG", pnginfo=info)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise ConfigError(
            f"Can't write {path}: {error.strerror or error}. Nothing was changed there."
        ) from error
    return path


def readable(request: Request, settings: Mapping[str, Any]) -> str:
    """The prompt, the negative prompt, and a line `Steps: 25, Sampler: ..., CFG scale: 7.5, Seed: 3, Size:
    64x64, ...`."""
    facts = {
        "Steps": request.steps,
        "Sampler": settings.get("scheduler", request.scheduler),
        "CFG scale": None if request.guidance is None else f"{request.guidance:g}",
        "Seed": request.seed,
        "Size": f"{request.width}x{request.height}" if request.width and request.height else None,
        "Model": settings.get("base"),
        "Adapters": "; ".join(f"{use.path.as_posix()} at {use.strength:g}" for use in request.adapters)
        or None,
        "Version": settings.get("version"),
    }
    lines = [request.prompt, f"Negative prompt: {request.negative}" if request.negative else ""]
    lines.append(", ".join(f"{name}: {value}" for name, value in facts.items() if value is not None))
    return "\n".join(line for line in lines if line)


def read_settings(path: str | Path) -> Request:
    """The request that draws this very picture again (with the same base and adapter files).

    Raises:
        DataError: it is no readable PNG, or holds no settings of ours.
    """
    record = read_record(path)
    try:
        return Request.model_validate(record["request"])
    except (KeyError, ValidationError) as error:
        raise DataError(f"The settings in {path} are not those of this version: {error}") from error


def read_record(path: str | Path) -> dict[str, Any]:
    """All that a picture says of itself: `request`, and `drawn` (base, family, scheduler, adapters' hashes,
    version).

    Raises:
        DataError: it is no readable PNG, or holds no settings of ours.
    """
    try:
        with Image.open(path) as image:
            # PNG chunks may follow the pixels, so all of them are there only after loading.
            image.load()
            text = image.info.get(OURS)
    except FileNotFoundError as error:
        raise DataError(f"There is no picture {str(path)!r}.") from error
    except (OSError, SyntaxError, UnidentifiedImageError) as error:
        raise DataError(f"{path} can't be read as a picture: {error}") from error
    if not isinstance(text, str):
        raise DataError(
            f"{path} holds no settings of scumble: it was drawn by something else, or saved again by a "
            "program that drops them."
        )
    try:
        record = json.loads(text)
    except ValueError as error:
        raise DataError(f"The settings in {path} are damaged: {error}") from error
    if not isinstance(record, dict):
        raise DataError(f"The settings in {path} are damaged: no table.")
    return record
