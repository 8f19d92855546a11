"""Marks: stand-ins for a file's tensors, by which diffusers' converters say where each one goes.

diffusers' own converters, by which such a file is loaded, are handed marks instead of tensors: what they do with
them is what they do there, so that a table of our own can't disagree with them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from scumble.models.shapes import Shapes


@dataclass(frozen=True)
class Mark:
    """A tensor's place: its name in the file, and which of its rows. Stands in for the tensor in a converter.

    Slices, `torch.chunk`, `torch.split` and `torch.cat` of marks are marks again.
    """

    name: str
    shape: tuple[int, ...]
    """Of the weight. The file's may have more sides of length 1."""
    rows: tuple[tuple[int, int], ...]
    """[begin, end) of the tensor in the file, in the weight's order."""
    turned: bool = False
    """The file holds it transposed: `shape` is that of the weight."""

    @classmethod
    def whole(cls, name: str, shape: tuple[int, ...]) -> Mark:
        """A tensor as it is in the file."""
        return cls(name, shape, ((0, shape[0] if shape else 0),))

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def T(self) -> Mark:
        return replace(self, shape=self.shape[::-1], turned=not self.turned)

    def __getitem__(self, index: Any) -> Mark:
        first, *others = index if isinstance(index, tuple) else (index,)
        begin, end, _ = first.indices(self.shape[0])
        kept = [side for side, at in zip(self.shape[1:], others, strict=False) if at == slice(None)]
        return self._cut(begin, end, (*kept, *self.shape[1 + len(others) :]))

    def _cut(self, begin: int, end: int, others: tuple[int, ...]) -> Mark:
        if self.turned:
            raise TypeError(f"{self.name} is transposed: its rows are no rows of the file.")
        pieces, start = [], 0
        for first, last in self.rows:
            cut = max(first, first + begin - start), min(last, first + end - start)
            if cut[0] < cut[1]:
                pieces.append(cut)
            start += last - first
        return Mark(self.name, (end - begin, *others), tuple(pieces))

    def chunk(self, count: int, dim: int = 0) -> tuple[Mark, ...]:
        """See torch.chunk, for equal parts of the rows."""
        return self.split([1] * count, dim)

    def split(self, sizes: Sequence[int], dim: int = 0) -> tuple[Mark, ...]:
        """See torch.split. A converter that writes down the widths of the full model cuts a smaller one in the same
        proportions."""
        rows, total = self.shape[0], sum(sizes)
        if dim != 0 or any(rows * size % total for size in sizes):
            raise ValueError(
                f"{self.name} has {rows} rows, which don't divide as {', '.join(map(str, sizes))}"
            )
        parts, begin = [], 0
        for size in sizes:
            end = begin + rows * size // total
            parts.append(self._cut(begin, end, self.shape[1:]))
            begin = end
        return tuple(parts)

    @staticmethod
    def joined(parts: Sequence[Mark], dim: int = 0) -> Mark:
        """See torch.cat, for parts of one tensor."""
        first = parts[0]
        if dim != 0 or any(part.name != first.name or part.turned for part in parts):
            raise TypeError(f"{first.name} is joined with {parts[-1].name}: no rows of one tensor.")
        rows = tuple(piece for part in parts for piece in part.rows)
        return Mark(first.name, (sum(part.shape[0] for part in parts), *first.shape[1:]), rows)

    def clone(self) -> Mark:
        return self

    def detach(self) -> Mark:
        return self

    def contiguous(self) -> Mark:
        return self

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        known: dict[Any, Callable[..., Any]] = {
            torch.cat: cls.joined,
            torch.chunk: cls.chunk,
            torch.split: cls.split,
        }
        return known[function](*args, **(kwargs or {})) if function in known else NotImplemented


def marks_of(shapes: Shapes) -> dict[str, Mark]:
    """A mark for each tensor of a file."""
    return {name: Mark.whole(name, shape) for name, shape in shapes.items()}
