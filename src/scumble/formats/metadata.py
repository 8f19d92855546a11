"""Metadata: what a file says of itself, as entries of the safetensors header.

Ours carry the prefix `scumble.`: one per field of `Metadata`, and `scumble.layers`, the rank and alpha of
every layer as JSON: `{"default": {"rank": 4, "alpha": 4.0, "rank_stabilized": false}, "exceptions":
{"unet.mid_block...": {...}}}`, where names are spelled as in the file.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from scumble.adapters.state import LayerState, Metadata, scale_of
from scumble.errors import FormatError

PREFIX = "scumble."
LAYERS = PREFIX + "layers"
SEAL = PREFIX + "seal"
SIGNATURE = PREFIX + "signature"
TOKENS = PREFIX + "tokens"
"""The learned words of a file, with their numbers of vectors: `{"<fox>": 4}`."""
DERIVED = ("format", "lora_adapter_metadata", LAYERS, SEAL, SIGNATURE, TOKENS)
"""Entries that every writer makes anew from the tensors, or that are of the file and not of the adapter."""

HASHES = ("sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256")
"""Entries that speak of the very file they are in: not carried over to another."""

_TEXTS = tuple(field.name for field in fields(Metadata) if field.name != "extra")


@dataclass(frozen=True)
class LayerFacts:
    """What a header says of one layer."""

    rank: int
    alpha: float
    rank_stabilized: bool = False

    @property
    def scale(self) -> float:
        """What the product of the factors is multiplied by."""
        return scale_of(self.rank, self.alpha, self.rank_stabilized)

    @staticmethod
    def of(layer: LayerState) -> LayerFacts:
        """The facts of a layer in memory."""
        return LayerFacts(layer.rank, float(layer.alpha), layer.rank_stabilized)


def to_header(metadata: Metadata, layers: Mapping[str, LayerState]) -> dict[str, str]:
    """Header entries for an adapter whose layers the file calls by the keys of `layers`."""
    header = {key: value for key, value in metadata.extra.items() if key not in (*DERIVED, *HASHES)}
    header |= {PREFIX + name: text for name in _TEXTS if (text := getattr(metadata, name))}
    header["format"] = "pt"
    facts = {name: LayerFacts.of(layer) for name, layer in layers.items()}
    if facts:
        default = majority(facts.values())
        header[LAYERS] = compact(
            {
                "default": vars(default),
                "exceptions": {name: vars(fact) for name, fact in facts.items() if fact != default},
            }
        )
    return header


def from_header(header: Mapping[str, str]) -> Metadata:
    """The inverse of `to_header`, without the layers. Foreign entries become `extra`."""
    ours = {name: header[PREFIX + name] for name in _TEXTS if PREFIX + name in header}
    taken = {*DERIVED, *(PREFIX + name for name in ours)}
    return Metadata(**ours, extra={key: value for key, value in header.items() if key not in taken})


def layer_facts(header: Mapping[str, str], names: Mapping[str, object]) -> dict[str, LayerFacts] | None:
    """Rank and alpha of the layers called `names`, as `scumble.layers` says; None when the header has no such
    entry.

    Raises:
        FormatError: the entry is malformed, or speaks of layers that the file does not hold.
    """
    if LAYERS not in header:
        return None
    table = parse_table(header[LAYERS], LAYERS)
    exceptions = table.get("exceptions", {})
    if not isinstance(exceptions, dict):
        raise FormatError(f"The header entry {LAYERS!r} is malformed: no table of exceptions.")
    strangers = [name for name in exceptions if name not in names]
    if strangers:
        raise FormatError(
            f"The header describes {len(strangers)} layers that the file does not hold, first "
            f"{strangers[0][:120]!r}. The file was changed after it was written."
        )
    default = _facts(table.get("default"))
    special = {name: _facts(entry) for name, entry in exceptions.items()}
    return {name: special.get(name, default) for name in names}


def _facts(entry: Any) -> LayerFacts:
    try:
        rank, alpha, stabilized = entry["rank"], entry["alpha"], entry["rank_stabilized"]
    except (KeyError, TypeError) as error:
        raise FormatError(
            f"The header entry {LAYERS!r} is malformed: a layer without rank or alpha."
        ) from error
    if not is_count(rank) or not is_number(alpha) or not isinstance(stabilized, bool):
        raise FormatError(f"The header entry {LAYERS!r} is malformed: rank {rank!r}, alpha {alpha!r}.")
    return LayerFacts(rank, float(alpha), stabilized)


def parse_table(text: str, entry: str) -> dict[str, Any]:
    """A JSON object out of a header entry.

    Raises:
        FormatError: it is not one.
    """
    try:
        table = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"The header entry {entry!r} is not valid JSON ({error}).") from error
    if not isinstance(table, dict):
        raise FormatError(f"The header entry {entry!r} is not a JSON table.")
    return table


def compact(value: Any) -> str:
    """JSON without spaces, keys sorted: equal values give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def majority(values: Any) -> Any:
    """The most frequent value; of equally frequent ones the first in sorted order of their text."""
    counts = Counter(values)
    return min(counts, key=lambda value: (-counts[value], repr(value)))


def is_count(value: object) -> bool:
    """A whole number of at least 1."""
    return type(value) is int and 0 < value < 2**31


def is_number(value: object) -> bool:
    """A finite int or float (no bool)."""
    return type(value) in (int, float) and abs(value) < 1e300  # type: ignore[arg-type, operator]
