"""Drawn pictures: what the bare base draws before training, kept by content and found again.

A picture's name holds the hash of all that decides it, base, prompt, seed, steps, guidance and size, and its number. A
run that was stopped goes on with the missing ones; another prompt or another base has other names.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from itertools import groupby
from pathlib import Path

from scumble.data import cache as caches
from scumble.data.sources import pictures_in
from scumble.data.together import ALONE, Shelf, Together, complete
from scumble.errors import DataError, ModelError
from scumble.inference.request import Request
from scumble.inference.session import Session
from scumble.models.family import BaseModel

Announce = Callable[[str], AbstractContextManager[Callable[[int, int, str], None]]]
"""Entered, with a word for what is done, around what takes long; gives what is told (done, total, of what)."""

MARK = "drawn-"
"""How the names of drawn pictures begin; others are somebody's own."""


class Artist:
    """Draws with one base into folders; see `methods.method.DrawPictures`.

    Law: a picture depends on the base and its request, not on which others were there already.
    """

    def __init__(self, base: BaseModel, cache: Path, announce: Announce, together: Together = ALONE) -> None:
        """`base` has no adapter yet. `cache`: where pictures go that nobody named a folder for. `together`: processes
        that need the same pictures: each is drawn by one of them, once."""
        self._base, self._cache, self._announce, self._together = base, cache, announce, together

    def __call__(
        self,
        prompt: str,
        count: int,
        *,
        folder: Path | None = None,
        seed: int = 0,
        steps: int = 25,
        guidance: float | None = None,
        side: int | None = None,
        batch: int = 4,
    ) -> Path:
        """See `DrawPictures`. A folder may hold pictures of other origin: they count.

        Raises:
            DataError: the folder holds pictures that were drawn for another base, prompt or setting.
            ModelError: the base can't draw that size, or draws black.
        """
        side = side or self._base.resolution
        guidance = self._base.usual_guidance if guidance is None else guidance
        request = Request(prompt=prompt, seed=seed, steps=steps, guidance=guidance, width=side, height=side)
        name = self._key(request)[:16]
        place = self._cache / f"class-{name}" if folder is None else folder
        there = pictures_in(place) if place.is_dir() else []
        own = [path for path in there if path.name.startswith(MARK)]
        _refuse_strangers([path for path in own if not path.name.startswith(f"{MARK}{name}-")], prompt)
        # all look before anyone draws
        wanted = range(count - max(self._together.gather(len(there) - len(own))))
        numbers = {f"{MARK}{name}-{number:05d}.png": number for number in wanted}

        def put(file: str, data: bytes) -> None:
            place.mkdir(parents=True, exist_ok=True)
            partial = place / f".{file}.{os.getpid()}"
            partial.write_bytes(data)
            partial.replace(place / file)  # a neighbour may be doing the same

        shelf = Shelf(
            has=lambda file: (place / file).exists(),
            get=lambda file: (place / file).read_bytes(),
            put=put,
            size=len,
        )
        with self._announce("drawing") as told:
            complete(
                list(numbers),
                shelf,
                lambda files: self._draw(request, name, place, [numbers[f] for f in files], batch, told),
                self._together,
            )
        return place

    def _draw(
        self,
        request: Request,
        name: str,
        place: Path,
        missing: Sequence[int],
        batch: int,
        told: Callable[[int, int, str], None],
    ) -> None:
        if not missing:
            return
        told(0, len(missing), f"class pictures: {request.prompt}")
        done = 0
        with Session(self._base, batch_size=batch) as session:
            for numbers in _together(missing, batch):
                some = request.model_copy(update={"count": len(numbers), "seed": request.seed + numbers[0]})
                for number, drawing in zip(numbers, session.generate(some), strict=True):
                    if drawing.image.getbbox() is None:
                        raise ModelError(
                            f"The base draws black for {request.prompt!r}, seed {drawing.seed}. "
                            f"{' '.join(drawing.notes)}"
                        )
                    drawing.save(place / f"{MARK}{name}-{number:05d}.png")
                    done += 1
                    told(done, len(missing), f"class pictures: {request.prompt}")

    def _key(self, request: Request) -> str:
        return caches.key(
            "drawn",
            self._base.fingerprint(),
            caches.image_encoder_fingerprint(self._base),
            caches.text_encoder_fingerprint(self._base),
            request.model_dump(mode="json", exclude={"count", "image", "mask"}),
        )


def _together(missing: Sequence[int], batch: int) -> Iterator[list[int]]:
    """Missing numbers in groups of neighbours, at most `batch` each: a request draws consecutive seeds."""
    for _, run in groupby(enumerate(missing), key=lambda item: item[1] - item[0]):
        numbers = [number for _, number in run]
        yield from (numbers[first : first + batch] for first in range(0, len(numbers), batch))


def _refuse_strangers(strangers: Sequence[Path], prompt: str) -> None:
    if strangers:
        raise DataError(
            f"{strangers[0].parent} holds {len(strangers)} class pictures that were drawn for another base, prompt or "
            f"setting, not for {prompt!r} as it is asked for now, e.g. {strangers[0].name}. Remove them, or name "
            "another folder."
        )
