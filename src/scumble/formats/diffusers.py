"""The format of today's diffusers and peft: `unet.<layer>.lora_A.weight` (r, in), `.lora_B.weight` (out, r).

Alpha is not in the tensors but in the header entry `lora_adapter_metadata`: the keyword arguments of peft's
`LoraConfig` per component, as `{"unet.r": 4, "unet.lora_alpha": 8, ...}`. Its patterns are regular
expressions on the end of a layer's name. DoRA adds `.lora_magnitude_vector`, (out,) or (1, out, 1, 1). Read as
well, because one file may mix them: `.lora.down.weight` and `.lora_linear_layer.down.weight` (diffusers 0.19 to
0.22), `.lora_down.weight` (OneTrainer), and an `.alpha` tensor beside a pair.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from functools import partial
from typing import Any

from scumble.adapters.names import UP_BIAS
from scumble.adapters.state import AdapterState, LayerPath
from scumble.formats.attention_processors import is_processor
from scumble.formats.bundles import sizes, token_tensors, with_tokens
from scumble.formats.codec import cannot_represent
from scumble.formats.container import PEFT_CONFIG, TensorFile
from scumble.formats.keymap import PEFT_MODEL, ROOTS, LayerNames, classic, split_root
from scumble.formats.lora_config import (
    LoraConfig,
    lora_configs,
    pair_obstacle,
    pair_tensors,
    refuse_lost_magnitudes,
)
from scumble.formats.metadata import TOKENS, LayerFacts, compact, parse_table, to_header
from scumble.formats.pairs import Decoded, Factor, assemble, refuse_unsupported, split_factor
from scumble.formats.scales import settle

ENTRY = "lora_adapter_metadata"

_FOREIGN = re.compile(
    r"(base_model\.model|diffusion_model|text_encoders|clip_[glh]|input_blocks|middle_block|output_blocks|time_embed|"
    r"label_emb|out|double_blocks|single_blocks|(img|txt|time|vector|guidance)_in|final_layer)\.|"
    r"(lora|lycoris|oft)_|bundle_emb\."
)


class Diffusers:
    """What `StableDiffusionPipeline.save_lora_weights` and `UNet2DConditionModel.save_lora_adapter` write."""

    name = "diffusers"

    def matches(self, file: TensorFile) -> bool:
        """Whether any tensor is called so, and none as in the first dialect, whose files hold some of both;
        with a configuration beside it is peft's."""
        if file.parts or PEFT_CONFIG in file.beside or any(is_processor(name) for name in file.tensors):
            return False
        return any(
            (split_factor(name)[1] in ("down", "up") and not _FOREIGN.match(name))
            # other families under these names, as OneTrainer writes them
            or (split_factor(name)[1] not in ("", "alpha") and name.partition(".")[0] in ROOTS)
            for name in file.tensors
        )

    def decode(self, file: TensorFile, layers: Collection[LayerPath] | None) -> Decoded:
        """See `Codec.decode`. Alpha from our header entry, else peft's, else tensors, else the rank."""
        refuse_unsupported(file.tensors)
        factors = [Factor(name, *split) for name in file.tensors if (split := split_factor(name))[1]]
        pairs = {factor.layer for factor in factors if factor.part != "alpha"}
        factors = [factor for factor in factors if factor.layer in pairs]
        decoded = assemble(file, factors, LayerNames(layers), partial(_scales, file))
        refuse_lost_magnitudes(decoded.state, _dora_roots(file), f"the header entry {ENTRY!r}")
        return with_tokens(file, decoded)

    def obstacle(self, state: AdapterState) -> str | None:
        """See `Codec.obstacle`."""
        if not state.layers:
            return "it changes no layer"
        return pair_obstacle(state)

    def encode(self, state: AdapterState) -> TensorFile:
        """See `Codec.encode`."""
        if self.obstacle(state) is not None:
            raise cannot_represent(self, state)
        tensors = {}
        for path, layer in state.layers.items():
            of_text = split_root(path)[0].startswith("text_encoder")
            for part, tensor in pair_tensors(path, layer).items():
                # transformers 5 finds the magnitudes of a text encoder under this name alone
                ending = ".weight" if of_text and part == "lora_magnitude_vector" else ""
                tensors[f"{classic(path)}.{part}{ending}"] = tensor
        header = to_header(state.metadata, {classic(path): layer for path, layer in state.layers.items()})
        facts = {path: LayerFacts.of(layer) for path, layer in state.layers.items()}
        configs = lora_configs(
            facts,
            [path for path, layer in state.layers.items() if layer.family == "dora"],
            [path for path, layer in state.layers.items() if UP_BIAS in layer.tensors],
        )
        fields = {f"{root}.{name}": value for root, table in configs.items() for name, value in table.items()}
        header[ENTRY] = compact(fields)
        if state.tokens:
            tensors |= token_tensors(state.tokens)
            header[TOKENS] = compact(sizes(state.tokens))
        return TensorFile(tensors, header)


def _scales(file: TensorFile, ranks: Mapping[str, int]) -> tuple[Mapping[str, LayerFacts], tuple[str, ...]]:
    """Rank and alpha per layer, from all places that speak of them."""
    headers = {}
    if ENTRY in file.metadata:
        headers[ENTRY] = _read_lora_configs(parse_table(file.metadata[ENTRY], ENTRY), ranks)
    return settle(file, ranks, headers=headers)


def _dora_roots(file: TensorFile) -> list[str]:
    """The components that the header says are DoRA."""
    table = parse_table(file.metadata[ENTRY], ENTRY) if ENTRY in file.metadata else {}
    named = [root for root in ROOTS if table.get(f"{root}.use_dora")]
    return ["unet"] if table.get("use_dora") else named


def _read_lora_configs(table: Mapping[str, Any], ranks: Mapping[str, int]) -> dict[str, LayerFacts]:
    """Layer spelling -> facts, for the components that `table` speaks of."""
    facts = {}
    bare = not any(key.startswith(tuple(f"{root}." for root in ROOTS)) for key in table)
    readers: dict[str, LoraConfig | None] = {}
    for name in ranks:
        root, rest = split_root(name)
        rest = rest.removeprefix(PEFT_MODEL)
        if root not in readers:
            # a component that was saved alone has no prefix on its tensors, and none on its fields
            prefix = "" if bare else f"{root}."
            fields = {
                key.removeprefix(prefix): value for key, value in table.items() if key.startswith(prefix)
            }
            readers[root] = LoraConfig(fields, f"the header entry {ENTRY!r} for {root}") if fields else None
        reader = readers[root]
        if reader is not None:
            facts[name] = reader.facts(rest)
    return facts
