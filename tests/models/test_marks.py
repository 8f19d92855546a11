"""Marks: what is done with a mark names the very numbers that the same does with the tensor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from scumble.models.file_weights import read_mark
from scumble.models.marks import Mark, marks_of

WHOLE = torch.arange(12 * 3.0).reshape(12, 3)


def _halves_turned(x: Any) -> Any:
    first, second = x.chunk(2, dim=0)
    return torch.cat([second, first], dim=0)


CUTS = {
    "whole": lambda x: x,
    "rows": lambda x: x[2:7],
    "rows and columns": lambda x: x[4:8, :].clone().detach().contiguous(),
    "the rest": lambda x: x[9:],
    "chunk": lambda x: torch.chunk(x, 3, dim=0)[1],
    "split": lambda x: torch.split(x, (2, 2, 8), dim=0)[2],
    "halves": _halves_turned,
    "a cut of halves": lambda x: _halves_turned(x)[4:9],
    "a chunk of halves": lambda x: torch.chunk(_halves_turned(x), 4, dim=0)[1],
    "turned": lambda x: x.T,
}


@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS.keys())
def test_a_mark_says_where_the_numbers_are(tmp_path: Path, cut: Any) -> None:
    save_file({"w": WHOLE}, tmp_path / "w.safetensors")
    mark, wanted = cut(Mark.whole("w", (12, 3))), cut(WHOLE)
    assert isinstance(mark, Mark) and isinstance(wanted, Tensor)
    assert mark.shape == tuple(wanted.shape) and mark.ndim == wanted.ndim
    with safe_open(tmp_path / "w.safetensors", framework="pt") as file:
        assert torch.equal(read_mark(file, mark), wanted)


def test_sides_of_length_one_are_dropped(tmp_path: Path) -> None:
    save_file({"w": WHOLE.view(12, 3, 1, 1)}, tmp_path / "w.safetensors")
    mark = marks_of({"w": (12, 3, 1, 1)})["w"][:, :, 0, 0]
    assert mark.shape == (12, 3)
    with safe_open(tmp_path / "w.safetensors", framework="pt") as file:
        assert torch.equal(read_mark(file, mark), WHOLE)


def test_a_smaller_model_is_cut_in_the_same_proportions() -> None:
    parts = torch.split(Mark.whole("w", (56,)), (3072, 3072, 3072, 12288), dim=0)  # type: ignore[arg-type]
    assert [part.rows for part in parts] == [((0, 8),), ((8, 16),), ((16, 24),), ((24, 56),)]  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="w has 50 rows, which don't divide as 3072, 3072, 3072, 12288"):
        torch.split(Mark.whole("w", (50,)), (3072, 3072, 3072, 12288), dim=0)  # type: ignore[arg-type]


def test_what_a_mark_cant_say_is_refused() -> None:
    one, other = Mark.whole("a", (4, 4)), Mark.whole("b", (4, 4))
    for wrong in (
        lambda: torch.cat([one, other]),  # type: ignore[list-item]
        lambda: torch.cat([one, one], dim=1),  # type: ignore[list-item]
        lambda: one.T[:2],
        lambda: torch.add(one, 1),  # type: ignore[call-overload]
    ):
        with pytest.raises(TypeError):
            wrong()
