"""Record -> Sample -> Batch: a picture and its words, on the way from a file to the denoiser.

Legend: B pictures in a batch, (C, h, w) latent shape, pixels as (height, width).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from scumble.models.family import Conditioning, Frame


@dataclass(frozen=True)
class Record:
    """One picture of a dataset, not opened yet, with what is said of it."""

    key: str
    """A name that a person recognises: the path relative to the dataset, or `row 17`."""
    open: Callable[[], Image.Image] = field(compare=False, repr=False)
    """Opens the picture as stored; `data.images.normalise` turns it into upright RGB."""
    captions: tuple[str, ...]
    """One or several; one is chosen at each visit. Never empty (an uncaptioned picture has ("",))."""
    path: Path | None = None
    """The file, where there is one."""
    extra: Mapping[str, Any] = field(default_factory=dict, compare=False)
    """Other columns of the row (mask, weight, ...), for methods that use them."""
    read: Callable[[], bytes] | None = field(default=None, compare=False, repr=False)
    """The stored bytes, where there are some: caches know a picture by their hash, else by its pixels."""
    repeats: int = 1
    """How often the picture counts in one epoch."""
    mask: Record | None = field(default=None, compare=False, repr=False)
    """A grey picture of the same size that says where the loss counts: white does, black does not."""


@dataclass(frozen=True)
class Sample:
    """One visit to a record: what is shown to the denoiser this time, and with which words."""

    record: int
    """Index into the dataset."""
    position: int
    """How many samples of the run came before it, over all processes: the name of its random numbers."""
    key: str
    caption: str
    """After template, tag shuffle and dropout ("" when dropped for guidance)."""
    variant: str
    """The geometry as a cache key: size, crop corner, flip."""


@dataclass(frozen=True)
class Batch:
    """What one forward pass of training sees: B pictures of one size, encoded."""

    latents: Tensor
    """(B, C, h, w), scaled to about unit variance, fp32"""
    conditioning: Conditioning | None
    """Text embeddings, or None where the text encoder trains: then the objective encodes `captions`."""
    captions: tuple[str, ...]
    frame: Frame
    weight: Tensor
    """(B,) weight of each sample in the loss; prior preservation is a weight"""
    keys: tuple[str, ...]
    """Which pictures, for error messages"""
    positions: tuple[int, ...]
    """Which random numbers (see `Sample.position`)"""
    mask: Tensor | None = None
    """(B, 1, h, w) in [0, 1]: where the loss counts"""
    shown: Tensor | None = None
    """(B, K, h, w) what a base that fills holes is shown of the pictures (`Conditioning.shown`)"""

    def __len__(self) -> int:
        return len(self.keys)


class Batches(Protocol):
    """An endless, seekable order of batches: a function of (seed, number), the same with any number of
    workers.

    Law: `list(islice(b.start(k), n)) == list(islice(b.start(0), k + n))[k:]`, and the flattened positions of
    1 process x batch 8, 2 x 4, and 1 x 4 with two accumulations agree (for pictures of one size).
    """

    batch_size: int
    """Pictures in a micro-batch of one process."""
    samples: int
    """Pictures in the dataset, a repeated one as often as it is repeated: visits in one epoch."""

    @property
    def fingerprint(self) -> str:
        """sha256 over pictures, captions and the settings that decide what is shown: a resume compares it."""

    def start(self, number: int, *, process: int = 0, processes: int = 1) -> Iterator[Batch]:
        """Micro-batches of this process from its `number`-th on.

        Micro-batch n of the run goes to process n % processes: the m-th of a process is m * processes +
        process.
        """
