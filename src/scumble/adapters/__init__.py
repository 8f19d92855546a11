"""What an adapter is: a named, trainable change to a frozen model, that leaves no trace. Torch only.

operate.py   a layer's own operation, done with another weight
delta.py     Delta: the change to one layer, seen in two ways that must agree (write one to add a family)
lora.py, dora.py, loha.py, lokr.py, glora.py, ia3.py, full.py, oft.py, boft.py      the families: settings and maths
biased.py    a delta of any family and a change to the layer's bias, as files hold them
magnitude.py a change of direction with a learned length, which DoRA, LoHa and LoKr may have
families.py  the registry of families
blank.py     modules set up as torch does it, by the hundred
adapted.py   Adapted: a layer and the deltas on it, each with its strength
dial.py      Dial: one adapter's strength, which all of its layers read; a number, or one per sample of a batch
stack.py     the LoRAs that act on one layer, side by side: two products, however many they are
layers.py    which layers a model has, and where they hang
targets.py   which of them an adapter changes: patterns, presets, one value per pattern
adapter.py   Adapter: inject, eject, strength, parameters, state, load
tokens.py    TokenRows: learned rows of new words, beside a text encoder's frozen table
state.py     AdapterState: an adapter as plain data
names.py     what the tensors are called that several families have
shapes.py    what they tell of the weight that they change
memory.py    tensors that lie side by side, taken as one; memory for many
algebra.py   merge into a base's weights, and the exact way back
factors.py   a change as a thin product: its singular values, its norm, how much of it to keep
mix.py       several adapters become one; what one does and another does not
resize.py    the nearest adapter of smaller rank
extract.py   a LoRA from a full fine-tune
overlap.py   how far two adapters meet in each layer, and whether they agree there
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from scumble.lazy import lazily

if TYPE_CHECKING:
    from scumble.adapters.adapted import Adapted as Adapted
    from scumble.adapters.adapter import Adapter as Adapter
    from scumble.adapters.algebra import Merged as Merged
    from scumble.adapters.algebra import merge as merge
    from scumble.adapters.delta import Delta as Delta
    from scumble.adapters.delta import DeltaSettings as DeltaSettings
    from scumble.adapters.families import FAMILIES as FAMILIES
    from scumble.adapters.layers import base_state as base_state
    from scumble.adapters.layers import layers_of as layers_of
    from scumble.adapters.lora import Lora as Lora
    from scumble.adapters.lora import LoraSettings as LoraSettings
    from scumble.adapters.operate import Layer as Layer
    from scumble.adapters.state import AdapterState as AdapterState
    from scumble.adapters.state import LayerPath as LayerPath
    from scumble.adapters.state import LayerState as LayerState
    from scumble.adapters.state import Metadata as Metadata
    from scumble.adapters.state import TokenState as TokenState
    from scumble.adapters.targets import PRESETS as PRESETS
    from scumble.adapters.targets import Matched as Matched
    from scumble.adapters.targets import Targets as Targets
    from scumble.adapters.targets import resolve as resolve
    from scumble.adapters.tokens import TokenRows as TokenRows
    from scumble.adapters.tokens import TokenTable as TokenTable
    from scumble.adapters.tokens import Vocabulary as Vocabulary

_PUBLIC = {
    "Adapted": "scumble.adapters.adapted",
    "Adapter": "scumble.adapters.adapter",
    "AdapterState": "scumble.adapters.state",
    "Delta": "scumble.adapters.delta",
    "DeltaSettings": "scumble.adapters.delta",
    "FAMILIES": "scumble.adapters.families",
    "Layer": "scumble.adapters.operate",
    "LayerPath": "scumble.adapters.state",
    "LayerState": "scumble.adapters.state",
    "Lora": "scumble.adapters.lora",
    "LoraSettings": "scumble.adapters.lora",
    "Matched": "scumble.adapters.targets",
    "Merged": "scumble.adapters.algebra",
    "Metadata": "scumble.adapters.state",
    "PRESETS": "scumble.adapters.targets",
    "Targets": "scumble.adapters.targets",
    "TokenRows": "scumble.adapters.tokens",
    "TokenState": "scumble.adapters.state",
    "TokenTable": "scumble.adapters.tokens",
    "Vocabulary": "scumble.adapters.tokens",
    "base_state": "scumble.adapters.layers",
    "layers_of": "scumble.adapters.layers",
    "merge": "scumble.adapters.algebra",
    "resolve": "scumble.adapters.targets",
}

__all__ = list(_PUBLIC)


__getattr__, __dir__ = lazily(__name__, _PUBLIC)
