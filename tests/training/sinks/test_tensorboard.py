"""TensorBoard: what its own reader finds in our event files."""

from __future__ import annotations

import io
from pathlib import Path

import numpy
import pytest
from PIL import Image

from scumble.training.sinks.tensorboard import NAME, TensorBoardSink
from tests.training.sinks.runs import events, feed, loss

pytest.importorskip("tensorboard")


def read(folder: Path):  # type: ignore[no-untyped-def]
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(folder / NAME), size_guidance={"scalars": 0, "images": 0, "tensors": 0})
    return reader.Reload()


def test_scalars_pictures_and_text(tmp_path: Path) -> None:
    feed(TensorBoardSink(tmp_path), events(tmp_path))
    reader = read(tmp_path)
    found = {event.step: event.value for event in reader.Scalars("train/loss")}
    assert found == {step: pytest.approx(loss(step), rel=1e-6) for step in range(1, 41) if step != 13}
    assert reader.Scalars("train/learning_rate/unet")[-1].value == 0.0
    assert reader.Scalars("train/samples_per_second")[0].value == pytest.approx(80)
    assert [event.step for event in reader.Scalars("held_out/adapter")] == [10, 20, 30, 40]
    assert [event.value for event in reader.Scalars("train/skipped")] == [1.0]
    tag = "preview/0 a <b>small</b> & red fox"
    assert [event.step for event in reader.Images(tag)] == [10, 20, 30, 40]
    picture = numpy.asarray(Image.open(io.BytesIO(reader.Images(tag)[1].encoded_image_string)))
    assert picture.shape == (16, 32, 3)
    assert tuple(picture[0, 0]) == (40, 90, 160)
    assert tuple(picture[0, 31]) == (200, 20, 30)
    words = reader.Tensors("settings/text_summary")[0].tensor_proto.string_val[0].decode()
    assert '"rank": 4' in words
    notes = [event.tensor_proto.string_val[0].decode() for event in reader.Tensors("notes/text_summary")]
    assert any("7.png, 9.png" in note for note in notes)
    assert any("thing" in note for note in notes)


def test_a_resume_shows_every_step_once(tmp_path: Path) -> None:
    feed(TensorBoardSink(tmp_path), events(tmp_path, last=27))  # killed at 27, saved at 20
    feed(TensorBoardSink(tmp_path), events(tmp_path, first=20))
    steps = [event.step for event in read(tmp_path).Scalars("train/loss")]
    assert steps == [step for step in range(1, 41) if step != 13]
