"""Benchmarks as modules: what `python benchmarks/NAME.py` would run."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def benchmark_named(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """Import benchmarks/NAME.py, which finds its neighbours as when it is run."""
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module
