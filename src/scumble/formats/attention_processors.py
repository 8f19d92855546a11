"""The first dialect of diffusers (January to August 2023): LoRA as attention processors, scale 1, no alpha.

    down_blocks.1...attn1.processor.to_q_lora.down.weight               0.12 to 0.15: UNet alone, no prefix
    unet.down_blocks.1...attn1.processor.to_q_lora.down.weight          0.16 to 0.20
    text_encoder.text_model...self_attn.to_q_lora.down.weight           0.17 and 0.18: the layer is q_proj
    text_encoder.text_model...self_attn.q_proj.to_q_lora.down.weight    0.16: with to_k_lora, to_v_lora,
                                                                        to_out_lora beside it, which were
                                                                        never used
    text_encoder.text_model...q_proj.lora_linear_layer.down.weight      0.19 and 0.20: as of today's dialect

`to_out_lora` is the layer `to_out.0`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from functools import lru_cache

from scumble.adapters.names import SIDES
from scumble.adapters.state import AdapterState, LayerPath
from scumble.errors import FormatError
from scumble.formats.codec import cannot_represent
from scumble.formats.container import TensorFile
from scumble.formats.keymap import LayerNames, classic
from scumble.formats.metadata import LayerFacts, layer_facts, to_header
from scumble.formats.pairs import (
    Decoded,
    Factor,
    assemble,
    beyond_lora,
    check_lora,
    refuse_unsupported,
    split_factor,
)

_TENSOR = re.compile(
    r"(?P<parent>.+?)(\.processor)?\.to_(?P<which>q|k|v|out)_lora\.(?P<part>down|up)\.weight"
)
_UNET = re.compile(r"(?P<parent>unet\..+)\.to_(?P<which>q|k|v|out\.0)")
_CLIP = re.compile(r"(?P<parent>text_encoder.*\.self_attn)\.(?P<which>q|k|v|out)_proj")


_ROOTED = ("unet.", "text_encoder.", "text_encoder_2.")


@lru_cache(maxsize=2**15)
def is_processor(name: str) -> bool:
    """Whether a tensor is called as in this dialect."""
    return _TENSOR.fullmatch(name) is not None and not name.startswith(
        ("lora_", "lycoris_", "diffusion_model.")
    )


class AttentionProcessors:
    """What `save_attn_procs` of diffusers 0.12 to 0.20 wrote."""

    name = "attention-processors"

    def matches(self, file: TensorFile) -> bool:
        """Whether any tensor is called so."""
        return any(is_processor(name) for name in file.tensors)

    def decode(self, file: TensorFile, layers: Collection[LayerPath] | None) -> Decoded:
        """See `Codec.decode`. The scale is always 1."""
        refuse_unsupported(file.tensors)
        factors, padding = [], []
        for name in file.tensors:
            match = _TENSOR.fullmatch(name)
            if match is None:
                spelled, part = split_factor(name)
                if part in ("down", "up") and name.startswith(_ROOTED):
                    factors.append(Factor(name, spelled, part))
                continue
            layer = _layer(match["parent"], match["which"])
            if layer is None:
                padding.append(name)
            else:
                factors.append(Factor(name, layer, match["part"]))

        def scales(ranks: Mapping[str, int]) -> tuple[Mapping[str, LayerFacts], tuple[str, ...]]:
            said = layer_facts(file.metadata, ranks)
            facts = {layer: LayerFacts(rank, float(rank)) for layer, rank in ranks.items()}
            if said is not None and said != facts:
                raise FormatError(
                    f"{file.label} contradicts itself: this dialect has alpha = rank, its header says "
                    "otherwise."
                )
            return facts, ("alpha absent: using alpha = rank",) if said is None else ()

        return assemble(file, factors, LayerNames(layers), scales, padding)

    def obstacle(self, state: AdapterState) -> str | None:
        """See `Codec.obstacle`."""
        if (beyond := beyond_lora(state)) is not None:
            return beyond
        for path, layer in state.layers.items():
            if _spelled(path) is None or layer.tensors["down"].ndim != 2:
                return f"it holds attention projections only, not {path!r}"
            if SIDES & layer.tensors.keys():
                return f"it has no place for the change to the bias of {path!r}"
            if layer.alpha != layer.rank or layer.rank_stabilized:
                return f"it has no alpha, and {path!r} has alpha {layer.alpha:g} at rank {layer.rank}"
        return None

    def encode(self, state: AdapterState) -> TensorFile:
        """See `Codec.encode`."""
        if self.obstacle(state) is not None:
            raise cannot_represent(self, state)
        tensors = {}
        for path, layer in state.layers.items():
            check_lora(path, layer)
            tensors[f"{_spelled(path)}.down.weight"] = layer.tensors["down"]
            tensors[f"{_spelled(path)}.up.weight"] = layer.tensors["up"]
        # the names in `scumble.layers` are those that decode finds in the file
        return TensorFile(
            tensors, to_header(state.metadata, {classic(path): layer for path, layer in state.layers.items()})
        )


def _layer(parent: str, which: str) -> str | None:
    """The layer that a tensor belongs to; None for the unused three of 0.16's text-encoder processors."""
    last = parent.rpartition(".")[2]
    if last in ("q_proj", "k_proj", "v_proj", "out_proj"):
        return parent if last == which + "_proj" else None
    if last == "self_attn":
        return f"{parent}.{which}_proj"
    return f"{parent}.to_{which}" + (".0" if which == "out" else "")


def _spelled(path: LayerPath) -> str | None:
    """The first half of the names of a layer's tensors; None when the dialect has no name for it."""
    if match := _UNET.fullmatch(path):
        return f"{match['parent']}.processor.to_{match['which'].removesuffix('.0')}_lora"
    if match := _CLIP.fullmatch(classic(path)):
        return f"{match['parent']}.to_{match['which']}_lora"
    return None
