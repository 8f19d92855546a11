"""What tests are worth of the time there is: which cases run always, and which files begin."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest

LONGEST = (
    "training/test_processes.py",
    "laws/test_resume.py",
    "training/test_compiled.py",
    "golden/test_losses.py",
    "runs/test_processes.py",
    "training/test_rescue.py",
    "training/test_loop.py",
    "runs/test_forecast.py",
    "scripts/test_train_text_to_image_lora.py",
    "runs/test_families.py",
    "runs/test_inpainting.py",
    "runs/test_train.py",
    "runs/test_sdxl.py",
    "picturebook/test_base.py",
)
"""Files of minutes: begun last, one of them would be waited for by all workers (`pytest --durations=50` tells)."""


def longest_first(path: str) -> int:
    """The place of a test's file: those of `LONGEST` in their order, then all others in theirs."""
    return next((n for n, end in enumerate(LONGEST) if path.endswith(end)), len(LONGEST))


def weighed(names: Iterable[str], quick: str | None, standing: Collection[str]) -> list[Any]:
    """Parameters: `quick` runs always, those that are `standing` for the others but where quick tests are asked for,
    all others where every case is."""

    def marks(name: str) -> tuple[pytest.MarkDecorator, ...]:
        if name == quick:
            return ()
        return (pytest.mark.slow,) if name in standing else (pytest.mark.slow, pytest.mark.thorough)

    return [pytest.param(name, marks=marks(name)) for name in names]
