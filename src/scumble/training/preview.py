"""Preview: pictures of a run from its saved file, drawn through the public path, with the base's beside them.

The live model is what draws, so nothing is loaded twice; the adapters under training rest meanwhile, and a
copy read from the file acts in their place. What the pictures show is therefore what anybody gets who loads
that file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy
from PIL import Image
from torch import nn

from scumble.adapters import Adapted
from scumble.adapters.tokens import resting_tokens
from scumble.errors import NoEffect
from scumble.inference.drawing import Drawing
from scumble.inference.request import AdapterUse, Request
from scumble.inference.session import Session
from scumble.models.family import BaseModel
from scumble.training.events import Panel


class Previewer:
    """Draws a run's prompts from an adapter's file: `previewer(file, step) -> panels`.

    Law: a call leaves the model as it was, bit for bit: parameters and gradients, modes, strengths, torch's
    global generators. The base's pictures are drawn once.
    """

    def __init__(self, base: BaseModel, requests: Sequence[Request], folder: str | Path) -> None:
        """
        Args:
            base: the live base, with the adapters under training in it or not.
            requests: what to draw; one panel for each picture. Their `adapters` are left aside.
            folder: where pictures go: `base-01.png` and `000500-01.png`, numbered by panel.
        """
        self._base, self._folder = base, Path(folder)
        self._requests = [request.model_copy(update={"adapters": ()}) for request in requests]
        self._drawn: list[tuple[Drawing, Path]] = []
        self.notes: tuple[str, ...] = ()
        """Said of the pictures of the last call: prompts cut short, black pictures and their cause."""

    def __call__(self, adapter: Path, step: int) -> list[Panel]:
        """Draw every request with the adapter in the file, strength 1.

        A file that changes nothing gives panels whose difference is 0.

        Raises:
            FormatError, AdapterError: the file can't be used with this base.
        """
        notes: list[str] = []
        # one at a time: drawing must not need more memory than training did
        with resting(self._base.roots), Session(self._base, batch_size=1) as session:
            if not self._drawn:
                drawings = [drawing for request in self._requests for drawing in session.generate(request)]
                self._drawn = [
                    (drawing, drawing.save(self._folder / f"base-{number:02}.png"))
                    for number, drawing in enumerate(drawings, 1)
                ]
                notes += [f"base: {note}" for drawing in drawings for note in drawing.notes]
            use = AdapterUse(path=adapter)
            try:
                drawings = [
                    drawing
                    for request in self._requests
                    for drawing in session.generate(request.model_copy(update={"adapters": (use,)}))
                ]
            except NoEffect as error:
                notes.append(str(error))
                drawings = [drawing for drawing, _ in self._drawn]
        self._base.release()
        panels = []
        for number, ((base, base_path), drawing) in enumerate(zip(self._drawn, drawings, strict=True), 1):
            path = drawing.save(self._folder / f"{step:06}-{number:02}.png")
            moved = difference(base.image, drawing.image)
            panels.append(Panel(drawing.request.prompt, drawing.seed, base_path, path, moved))
            notes += [note for note in drawing.notes if f"base: {note}" not in notes]
        self.notes = tuple(dict.fromkeys(notes))
        return panels


def previewer(base: BaseModel, requests: Sequence[Request], folder: str | Path) -> Previewer:
    """What draws a run's previews; see `Previewer`."""
    return Previewer(base, requests, folder)


def difference(first: Image.Image, second: Image.Image) -> float:
    """Mean absolute difference of two pictures of one size, in 8-bit steps (0..255)."""
    one, other = (numpy.asarray(image.convert("RGB"), dtype=numpy.int16) for image in (first, second))
    return float(numpy.abs(one - other).mean())


@contextmanager
def resting(roots: Mapping[str, nn.Module]) -> Iterator[None]:
    """Every adapter that is in the model now acts no more, for the length of a `with` block: strength 0, learned
    tokens taken out, bit-identical.

    Adapters that come in meanwhile are not touched.
    """
    dials = {
        dial
        for root in roots.values()
        for module in root.modules()
        if isinstance(module, Adapted)
        for dial in module.dials.values()
    }
    kept = {dial: dial.value for dial in dials}
    for dial in kept:
        dial.value = 0.0
    try:
        with resting_tokens(roots):
            yield
    finally:
        for dial, strength in kept.items():
            dial.value = strength
