"""Header entries: ours round-trip, foreign ones are kept, malformed ones are refused."""

from __future__ import annotations

import json

import pytest

from scumble.adapters.state import Metadata
from scumble.errors import FormatError
from scumble.formats.metadata import LAYERS, LayerFacts, from_header, layer_facts, to_header
from tests.formats.adapters_of import ATTENTION, adapter, layer

FULL = Metadata(
    "picturebook", "ab" * 32, "sd1", "epsilon", "cd" * 32, '{"rank": 4}', "0.1.0", {"ss_tag": "x"}
)


def test_metadata_round_trips_and_carries_foreign_entries_on() -> None:
    header = to_header(FULL, adapter().layers)
    assert all(isinstance(value, str) for value in header.values())
    assert from_header(header) == FULL
    assert header["ss_tag"] == "x" and header["format"] == "pt"


def test_what_is_not_said_is_not_written() -> None:
    assert set(to_header(Metadata(), adapter().layers)) == {"format", LAYERS}


def test_derived_entries_of_another_file_are_not_carried_on() -> None:
    header = to_header(Metadata(extra={"lora_adapter_metadata": "stale", LAYERS: "stale"}), adapter().layers)
    assert "lora_adapter_metadata" not in header and header[LAYERS] != "stale"


def test_rank_and_alpha_of_every_layer_come_back() -> None:
    layers = {
        "a": layer(ATTENTION[0], 4, 4.0),
        "b": layer(ATTENTION[0], 4, 4.0),
        "c": layer(ATTENTION[0], 2, 1 / 3, True),
    }
    facts = layer_facts(to_header(Metadata(), layers), layers)
    assert facts == {"a": LayerFacts(4, 4.0), "b": LayerFacts(4, 4.0), "c": LayerFacts(2, 1 / 3, True)}
    assert list(json.loads(to_header(Metadata(), layers)[LAYERS])["exceptions"]) == ["c"]
    assert layer_facts({}, layers) is None


@pytest.mark.parametrize(
    "text",
    [
        "nonsense",
        "[1]",
        "[" * 100_000,
        "{}",
        '{"default": 3}',
        '{"default": {"rank": 4, "alpha": "4", "rank_stabilized": false}}',
        '{"default": {"rank": 0, "alpha": 4, "rank_stabilized": false}}',
        '{"default": {"rank": 4, "alpha": NaN, "rank_stabilized": false}}',
        '{"default": {"rank": 4, "alpha": 1e999, "rank_stabilized": false}}',
        '{"default": {"rank": 4, "alpha": 4, "rank_stabilized": 0}}',
        '{"default": {"rank": 4, "alpha": 4, "rank_stabilized": false}, "exceptions": []}',
        '{"default": {"rank": 4, "alpha": 4, "rank_stabilized": false}, "exceptions": {"a": null}}',
        '{"default": {"rank": 4, "alpha": 4, "rank_stabilized": false}, "exceptions": {"gone": {}}}',
    ],
)
def test_a_malformed_entry_is_refused(text: str) -> None:
    with pytest.raises(FormatError, match=r"scumble\.layers|does not hold"):
        layer_facts({LAYERS: text}, {"a": None})
