"""Too little memory while drawing: fewer pictures at once, and one note; for a single one: what needs less."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from scumble.errors import OutOfMemory
from scumble.inference import session as sessions
from scumble.inference.request import AdapterUse, Request
from scumble.inference.session import Session
from tests.inference.makers import adapter_file, tiny


class Narrow:
    """A denoiser that has room for so many rows at once, guidance included."""

    def __init__(self, session: Session, rows: int) -> None:
        self.tried: list[int] = []
        self._rows = rows
        session.base.denoiser.register_forward_pre_hook(self._look)

    def _look(self, module: object, given: tuple[Any, ...]) -> None:
        rows = len(given[0])
        if not self.tried or self.tried[-1] != rows:
            self.tried.append(rows)
        if rows > self._rows:
            torch.empty(1 << 55, dtype=torch.uint8)


def test_fewer_are_drawn_at_once_and_the_first_says_so(tmp_path: Path) -> None:
    file = adapter_file(tmp_path / "a.safetensors")
    requests = [
        Request(prompt="a fox", count=5, steps=2),
        Request(prompt="a hen", count=3, steps=2, adapters=(AdapterUse(path=file),)),
    ]
    with Session(tiny(), batch_size=8) as session:
        plain = session.generate(requests)
    with Session(tiny(), batch_size=8) as session:
        narrow = Narrow(session, 4)
        told: list[tuple[int, int]] = []
        drawn = session.generate(requests, lambda done, total: told.append((done, total)))
    assert narrow.tried == [16, 8, 4] and told[-1] == (16, 16)
    assert [one.seed for one in drawn] == [one.seed for one in plain]
    notes = [note for one in drawn for note in one.notes]
    assert notes == ["There was not enough memory for 4 pictures at once: they are drawn 2 at once."]
    for one, other in zip(drawn, plain, strict=True):
        near = torch.frombuffer(bytearray(one.image.tobytes()), dtype=torch.uint8).int()
        near -= torch.frombuffer(bytearray(other.image.tobytes()), dtype=torch.uint8).int()
        assert near.abs().max() <= 1, "the pictures are those of a wide batch, to rounding"
    with Session(tiny(), batch_size=3) as session:
        Narrow(session, 2)
        (first, *others) = session.generate(Request(prompt="a fox", count=3, steps=2))
    assert first.notes == ("There was not enough memory for 3 pictures at once: they are drawn one by one.",)
    assert not any(one.notes for one in others)


def test_too_little_for_one_picture_is_an_error_that_names_what_needs_less() -> None:
    with Session(tiny()) as session:
        Narrow(session, 1)
        with pytest.raises(OutOfMemory) as told:
            session.generate(Request(prompt="a fox", steps=2))
        text = str(told.value)
        assert text.startswith("Out of memory while one picture of 16x16 pixels was drawn by tiny-sd1.")
        assert "a smaller size (it is 16x16); --dtype bf16; --quantization int8." in text, (
            "and no offload: no GPU"
        )
        session.generate(Request(prompt="a fox", steps=2, guidance=1.0))  # one row: the session is as it was


def test_a_scheduler_that_was_not_made_for_the_base_is_not_blamed_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sessions, "suits", lambda kind, own: False)
    with Session(tiny()) as session:
        Narrow(session, 0)
        with pytest.raises(OutOfMemory):
            session.generate(Request(prompt="a fox", steps=2))


def test_pictures_are_decoded_one_by_one_where_all_are_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    with Session(tiny()) as session:
        plain = session.generate(Request(prompt="a fox", count=3, steps=2))
        decode, rows = session.base.decode_latents, list[int]()

        def narrow(latents: torch.Tensor) -> torch.Tensor:
            rows.append(len(latents))
            if len(latents) > 1:
                torch.empty(1 << 55, dtype=torch.uint8)
            return decode(latents)

        monkeypatch.setattr(session.base, "decode_latents", narrow)
        drawn = session.generate(Request(prompt="a fox", count=3, steps=2))
    assert rows == [3, 1, 1, 1] and not any(one.notes for one in drawn)
    assert [one.image.size for one in drawn] == [one.image.size for one in plain]


def test_loading_too_large_a_base_says_what_needs_less(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    monkeypatch.setattr(sessions, "load_base", refuse)
    expected = "Out of GPU memory while picturebook was loaded. 20 MiB more were asked for."
    with pytest.raises(OutOfMemory, match=f"^{re.escape(expected)} What needs less: --dtype bf16"):
        Session("picturebook")
