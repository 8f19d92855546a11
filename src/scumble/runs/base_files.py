"""Base files: a base's weights where they lie on disk, by layer path, read one at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from scumble.adapters.state import LayerPath
from scumble.errors import ModelError
from scumble.formats.keymap import ROOTS
from scumble.models.configs import weight_files
from scumble.models.hub import PICTUREBOOK
from scumble.models.loading import describe_base
from scumble.tensor_files.lazy_tensors import LazyTensors

_WEIGHT = ".weight"


@dataclass(frozen=True)
class Spot:
    """Where one layer's weight lies: rows of a tensor of a file."""

    file: Path
    name: str
    rows: tuple[tuple[int, int], ...]
    """[begin, end), in the weight's order."""
    shape: tuple[int, ...]
    turned: bool = False
    """The file holds it transposed."""


class BaseFiles(Mapping[LayerPath, Tensor]):
    """The weights of all linear and convolution layers of a base's denoiser and text encoders.

    A Mapping from layer path to weight, for what asks for weights; no weight is kept in memory.
    """

    def __init__(
        self, source: str, path: Path, spots: Mapping[LayerPath, Spot], other: Mapping[str, Spot]
    ) -> None:
        self.source = source
        """As the person named it."""
        self.path = path
        """The folder, or the checkpoint."""
        self.spots = spots
        self.other = other
        """What an adapter can't change: biases, norms, embeddings, by the name in the model."""
        self._files: dict[Path, LazyTensors] = {}

    @property
    def shapes(self) -> dict[LayerPath, tuple[int, ...]]:
        """Layer path -> shape of its weight, normalisations too: what `formats.read` takes as layers."""
        norms = {
            name.removesuffix(_WEIGHT): spot.shape
            for name, spot in self.other.items()
            if name.endswith(_WEIGHT) and len(spot.shape) == 1
        }
        return {path: spot.shape for path, spot in self.spots.items()} | norms

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that the layers' weights lie in."""
        return tuple(dict.fromkeys(spot.file for spot in self.spots.values()))

    @property
    def is_folder(self) -> bool:
        """A folder in diffusers' layout; else a single checkpoint."""
        return self.path.is_dir()

    @cached_property
    def fingerprint(self) -> str:
        """The base's fingerprint, as `BaseModel.fingerprint` has it; empty for a single checkpoint, whose names
        differ. Reads the whole denoiser."""
        from scumble.models.family import fingerprint

        tensors = {
            name.partition(".")[2]: spot
            for name, spot in {
                **{f"{path}{_WEIGHT}": s for path, s in self.spots.items()},
                **self.other,
            }.items()
            if name.startswith(("unet.", "transformer."))
        }
        return fingerprint(_Spots(self, tensors)) if self.is_folder else ""

    def tensor(self, spot: Spot) -> Tensor:
        """What lies there."""
        if spot.file not in self._files:
            self._files[spot.file] = LazyTensors(spot.file)
        whole = self._files[spot.file][spot.name]
        return self.part(whole, spot)

    @staticmethod
    def part(whole: Tensor, spot: Spot) -> Tensor:
        """The rows of a tensor of the file that are the weight; a view where they are one piece."""
        if not whole.ndim:
            return whole
        pieces = [whole[begin:end] for begin, end in spot.rows]
        rows = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        return rows.T if spot.turned else rows

    @staticmethod
    def add(whole: Tensor, spot: Spot, change: Tensor) -> None:
        """Add a weight's change to its rows of a tensor of the file, in place."""
        rows = change.T if spot.turned else change
        done = 0
        for begin, end in spot.rows:
            piece = whole[begin:end]
            piece += rows[done : done + end - begin].reshape(piece.shape).to(piece.dtype)
            done += end - begin

    def __getitem__(self, path: LayerPath) -> Tensor:
        return self.tensor(self.spots[path])

    def __iter__(self) -> Iterator[LayerPath]:
        return iter(self.spots)

    def __len__(self) -> int:
        return len(self.spots)


class _Spots(Mapping[str, Tensor]):
    """Tensors by name, read when asked for."""

    def __init__(self, files: BaseFiles, spots: Mapping[str, Spot]) -> None:
        self._files, self._spots = files, spots

    def __getitem__(self, name: str) -> Tensor:
        return self._files.tensor(self._spots[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._spots)

    def __len__(self) -> int:
        return len(self._spots)


def open_base(source: str | Path, variant: str | None = None) -> BaseFiles:
    """A base's weights on this machine: "picturebook", a folder in diffusers' layout, or a .safetensors checkpoint.

    Reads headers only. `variant` is the middle word of the weight files in a folder, e.g. "fp16".

    Raises:
        ModelError: there is no such base here, or it is of a layout that is not known.
        FormatError: a weight file is damaged.
    """
    text = str(source)
    if text == PICTUREBOOK:
        from scumble import picturebook

        return _open_folder(text, Path(picturebook.path()), None)
    path = Path(text).expanduser()
    if path.is_dir():
        return _open_folder(text, path, variant)
    if path.is_file():
        return _open_file(text, path)
    describe_base(text)  # says what is wrong with a path, or that the Hub has no such base
    raise ModelError(
        f"{text} is on the Hub; its files are needed here. Download them: hf download {text} --local-dir FOLDER, and "
        "name the folder."
    )


def _open_folder(source: str, folder: Path, variant: str | None) -> BaseFiles:
    describe_base(folder, variant=variant)  # says what is wrong with a folder that is no base
    spots: dict[LayerPath, Spot] = {}
    other: dict[str, Spot] = {}
    for root in ROOTS:
        if not (folder / root).is_dir():
            continue
        files, lack = weight_files(folder / root, variant)
        if lack:
            raise ModelError(f"{source} is not whole. Missing: {', '.join(lack)}.")
        for file in files:
            tensors = LazyTensors(file)
            for name in tensors:
                shape = tensors.header.shapes[name]
                rows = ((0, shape[0] if shape else 0),)
                _sort(f"{root}.{name}", Spot(file, name, rows, shape), spots, other)
    return BaseFiles(source, folder, spots, other)


def _open_file(source: str, path: Path) -> BaseFiles:
    from scumble.models.checkpoint_names import layer_marks
    from scumble.models.single_file import read_checkpoint

    configs = read_checkpoint(path, source)
    if not configs.parts:
        raise ModelError(
            f"{source} is a single checkpoint for {configs.pipeline}, whose names are not known here. Save it as a "
            "folder with diffusers' save_pretrained, and name that folder."
        )
    tensors = LazyTensors(path)
    spots: dict[LayerPath, Spot] = {}
    other: dict[str, Spot] = {}
    for name, mark in layer_marks(tensors.header.shapes, source).items():
        spot = Spot(path, mark.name, mark.rows, mark.shape, mark.turned)
        _sort(name, spot, spots, other)
    return BaseFiles(source, path, spots, other)


def _sort(name: str, spot: Spot, spots: dict[LayerPath, Spot], other: dict[str, Spot]) -> None:
    """A layer's weight to `spots`, everything else to `other`."""
    module = name.removesuffix(_WEIGHT).rpartition(".")[2]
    if name.endswith(_WEIGHT) and len(spot.shape) in (2, 4) and not module.endswith("embedding"):
        spots[name.removesuffix(_WEIGHT)] = spot
    else:
        other[name] = spot
