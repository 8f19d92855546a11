"""What an adapter is: a named, trainable change to a frozen model, that leaves no trace. Torch only.

operate.py   a layer's own operation, done with another weight
delta.py     Delta: the change to one layer, seen in two ways that must agree (write one to add a family)
lora.py      the family "lora": its settings and its maths
families.py  the registry of families
adapted.py   Adapted: a layer and the deltas on it, each with its strength
layers.py    which layers a model has, and where they hang
targets.py   which of them an adapter changes: patterns, presets, one value per pattern
adapter.py   Adapter: inject, eject, strength, parameters, state, load
state.py     AdapterState: an adapter as plain data
algebra.py   merge into a base's weights, and the exact way back
"""

from __future__ import annotations

from scumble.adapters.adapted import Adapted
from scumble.adapters.adapter import Adapter
from scumble.adapters.algebra import Merged, merge
from scumble.adapters.delta import Delta, DeltaSettings
from scumble.adapters.families import FAMILIES
from scumble.adapters.layers import base_state, layers_of
from scumble.adapters.lora import Lora, LoraSettings
from scumble.adapters.operate import Layer, operate
from scumble.adapters.state import AdapterState, LayerPath, LayerState, Metadata, TokenState
from scumble.adapters.targets import PRESETS, Matched, Targets, resolve

__all__ = [
    "FAMILIES",
    "PRESETS",
    "Adapted",
    "Adapter",
    "AdapterState",
    "Delta",
    "DeltaSettings",
    "Layer",
    "LayerPath",
    "LayerState",
    "Lora",
    "LoraSettings",
    "Matched",
    "Merged",
    "Metadata",
    "Targets",
    "TokenState",
    "base_state",
    "layers_of",
    "merge",
    "operate",
    "resolve",
]
