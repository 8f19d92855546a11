"""Pictures and their words, from files to encoded batches: sources, images, captions, cache, order,
checks."""

from __future__ import annotations

from importlib import import_module
from typing import Any

_WHERE = {
    "DataSettings": "settings",
    "Dataset": "sources",
    "open_dataset": "sources",
    "split": "split",
    "Loader": "loader",
    "still_batches": "loader",
    "Cache": "cache",
    "check": "check",
    "DataReport": "check",
    "Record": "record",
    "Batch": "record",
    "Batches": "record",
}
__all__ = sorted(_WHERE)


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_WHERE[name]}"), name)
