"""A run in events, for tests of sinks: a little of everything that can happen."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from scumble.training.events import (
    Event,
    Finished,
    HeldOut,
    Noted,
    Panel,
    Previewed,
    Saved,
    Sink,
    Started,
    StepDone,
    StepSkipped,
)

SETTINGS = {"base": "picturebook", "adapter": {"family": "lora", "rank": 4, "alpha": None}, "seed": 7}
FACTS = {"layers": 32, "parameters": 49152, "file size": "201 kB"}


def loss(step: int) -> float:
    """The loss of a step, the same in every run."""
    return 0.1 + 0.05 * math.cos(step) + 1 / (step + 5)


def pictures(run: Path, step: int, side: int = 16) -> list[Panel]:
    """Two prompts drawn at `step`, as files; the second pair is the same picture twice."""
    folder = run / "previews"
    folder.mkdir(parents=True, exist_ok=True)
    panels = []
    for number, prompt in enumerate(("a <b>small</b> & red fox", "a house"), 1):
        base, adapter = folder / f"base-{number:02}.png", folder / f"{step:06}-{number:02}.png"
        Image.new("RGB", (side, side), (40, 90, 160)).save(base)
        same = number == 2
        Image.new("RGB", (side, side), (40, 90, 160) if same else (200, step % 256, 30)).save(adapter)
        panels.append(Panel(prompt, number, base, adapter, 0.0 if same else 61.25))
    return panels


def events(run: Path, first: int = 0, last: int = 40, total: int = 40, every: int = 10) -> Iterator[Event]:
    """The events of a run from step `first` + 1 to `last`; finished when that is `total`."""
    yield Started(run, total, first, FACTS, SETTINGS)
    for step in range(first + 1, last + 1):
        if step == 13:
            yield StepSkipped(step, "the loss is not finite (inf)", ["7.png", "9.png"], 1)
            continue
        rates = {"unet": 1e-3 * (1 - step / total), "text_encoder": 1e-4}
        yield StepDone(step, "adapter", loss(step), rates, 1 / step, 0.05, 4)
        if step % every == 0:
            yield Saved(step, run / f"checkpoint-{step:06}", False)
            yield HeldOut(step, 0.2 - step / 1000 + max(0, step - 30) / 200, 0.2, 0.01, step <= 30)
            yield Previewed(step, pictures(run, step))
    if last == total:
        yield Noted(last, "one <i>thing</i> to know")
        yield Saved(last, run / "pytorch_lora_weights.safetensors", True)
        yield Finished(last, 2.5, run / "pytorch_lora_weights.safetensors", "complete")


def feed(sink: Sink, what: Iterator[Event], close: bool = True) -> None:
    """Give every event to the sink."""
    for event in what:
        sink.handle(event)
    if close:
        sink.close()
