"""Pictures and their words, from files to encoded batches: sources, images, captions, cache, order,
checks."""

from __future__ import annotations

from scumble.lazy import lazily

_PUBLIC = {
    "DataSettings": "scumble.data.settings",
    "Dataset": "scumble.data.sources",
    "open_dataset": "scumble.data.sources",
    "split": "scumble.data.split",
    "Loader": "scumble.data.loader",
    "still_batches": "scumble.data.loader",
    "Cache": "scumble.data.cache",
    "check": "scumble.data.check",
    "DataReport": "scumble.data.check",
    "Record": "scumble.data.record",
    "Batch": "scumble.data.record",
    "Batches": "scumble.data.record",
}
__all__ = sorted(_PUBLIC)


__getattr__, __dir__ = lazily(__name__, _PUBLIC)
