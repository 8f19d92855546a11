"""What an adapter is: a named, trainable change to a frozen model, that leaves no trace. Torch only.

operate.py   a layer's own operation, done with another weight
delta.py     Delta: the change to one layer, seen in two ways that must agree (write one to add a family)
lora.py, dora.py, loha.py, lokr.py, ia3.py, full.py, oft.py, boft.py      the families: settings and maths
biased.py    a delta of any family and a change to the layer's bias, as files hold them
magnitude.py a change of direction with a learned length, which DoRA, LoHa and LoKr may have
families.py  the registry of families
adapted.py   Adapted: a layer and the deltas on it, each with its strength
dial.py      Dial: one adapter's strength, which all of its layers read; a number, or one per sample of a batch
stack.py     the LoRAs that act on one layer, side by side: two products, however many they are
layers.py    which layers a model has, and where they hang
targets.py   which of them an adapter changes: patterns, presets, one value per pattern
adapter.py   Adapter: inject, eject, strength, parameters, state, load
tokens.py    TokenRows: learned rows of new words, beside a text encoder's frozen table
state.py     AdapterState: an adapter as plain data
memory.py    tensors that lie side by side, taken as one
algebra.py   merge into a base's weights, and the exact way back
factors.py   a change as a thin product: its singular values, its norm, how much of it to keep
mix.py       several adapters become one; what one does and another does not
resize.py    the nearest adapter of smaller rank
extract.py   a LoRA from a full fine-tune
overlap.py   how far two adapters meet in each layer, and whether they agree there
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
from scumble.adapters.tokens import TokenRows, TokenTable, Vocabulary

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
    "TokenRows",
    "TokenState",
    "TokenTable",
    "Vocabulary",
    "base_state",
    "layers_of",
    "merge",
    "operate",
    "resolve",
]
