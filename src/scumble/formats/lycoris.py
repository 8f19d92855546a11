"""The format of LyCORIS (LoHa, LoKr, DoRA, IA3, full matrices): kohya's flat names with other tensors after them.

    lora_unet_..._to_q.hada_w1_a (out, r), .hada_w1_b, .hada_w2_a, .hada_w2_b, .alpha
    lora_unet_..._to_q.lokr_w1 (a, c), .lokr_w2_a (b, r), .lokr_w2_b (r, d k k), .alpha
    lora_unet_..._to_q.lora_down.weight, .lora_up.weight, .alpha, .dora_scale (out, 1) or, older, (1, in)
    lora_unet_..._to_q.diff (out, in); .weight (out,) with .on_input
    lora_unet_..._to_q.oft_blocks (n, b, b) or, of BOFT, (m, n, b, b), .rescale, .alpha
    lora_unet_..._norm1.w_norm (channels,), .b_norm; .diff_b (out,) beside any other

Endings are those of `kinds.py`; families may be mixed in one file, plain LoRA among them. The scale is alpha / r,
and 1 where there is no rank: `diff`, `weight`, and LoKr with both matrices whole. A family that no other tool has
is written under endings of our own. rsLoRA needs no mark, its
alpha is written multiplied by sqrt(r).
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from scumble.adapters.families import FAMILIES
from scumble.adapters.names import BIAS, INPUTS, OUTPUTS, UP_BIAS
from scumble.adapters.shapes import weight_shape
from scumble.adapters.state import AdapterState, LayerPath, LayerState
from scumble.errors import FormatError, NoEffect
from scumble.formats.bundles import with_tokens
from scumble.formats.codec import cannot_represent
from scumble.formats.container import TensorFile
from scumble.formats.flat_names import FlatNames, is_flat, is_sdxl, of_lycoris, spell
from scumble.formats.kinds import (
    LIMITED,
    bias_parts,
    has_alpha,
    is_own,
    parts_of,
    split_ending,
    told_rank,
)
from scumble.formats.kohya import hashes, refuse_transformers, tool_header
from scumble.formats.metadata import compact, to_header
from scumble.formats.pairs import (
    Decoded,
    Factor,
    alpha_tensor,
    assemble,
    check_lora,
    count,
    refuse_unsupported,
    split_factor,
)
from scumble.formats.scales import settle

if TYPE_CHECKING:
    from torch import Tensor

_PAIRS = ("lora", "dora")
_STABILIZED = re.compile(r'"rs_lora":\s*"?true', re.IGNORECASE)
"""In the header entry ss_network_args."""
_LIMIT = re.compile(r"oft_.*\.alpha")
_ALGORITHMS = {"lora": "locon", "dora": "locon"}
"""Family -> LyCORIS's word for it, where that is another."""


class Lycoris:
    """What `lycoris.kohya` writes."""

    name = "lycoris"
    diffusers_reads = False
    """diffusers' own loader refuses these families, or drops their magnitudes."""

    def matches(self, file: TensorFile) -> bool:
        """Whether any tensor under a flat name is of a family that LyCORIS adds."""
        return any(of_lycoris(name) for name in file.tensors)

    def decode(self, file: TensorFile, layers: Collection[LayerPath] | None) -> Decoded:
        """See `Codec.decode`."""
        refuse_unsupported(file.tensors)
        _refuse_untold_scales(file)
        refuse_transformers(file)
        factors = [
            Factor(name, *split) for name in file.tensors if is_flat(name) and (split := _split(name))[1]
        ]
        whole = {factor.layer for factor in factors if factor.part != "alpha"}
        factors = [factor for factor in factors if factor.layer in whole]
        still = _still(file)
        ignored = [factor.name for factor in factors if factor.layer in still]
        factors = [factor for factor in factors if factor.layer not in still]
        if still and not factors:
            raise NoEffect(
                f"{file.label} has no effect: its alpha is 0, which in kohya's OFT allows no turn at all. Not applied."
            )
        scales = partial(settle, file, zero_means_rank=True)
        decoded = assemble(file, factors, FlatNames(layers), scales, ignored)
        if still:
            said = f"{count(still, 'layer')} left out, where alpha 0 allows kohya's OFT no turn"
            decoded = replace(decoded, notes=(*decoded.notes, said))
        return with_tokens(file, decoded)

    def obstacle(self, state: AdapterState) -> str | None:
        """See `Codec.obstacle`."""
        if state.tokens:
            return "it has no place for learned tokens"
        if all(layer.family == "lora" and BIAS not in layer.tensors for layer in state.layers.values()):
            return "plain LoRA is kohya's format"
        sdxl, seen = is_sdxl(state), dict[str, LayerPath]()
        for path, layer in state.layers.items():
            spelled = spell(path, sdxl)
            if layer.family not in FAMILIES:
                return f"it does not know {layer.family}"
            if spelled is None:
                return f"it has no name for {path!r}"
            if spelled in seen:
                return f"it has one name for {seen[spelled]!r} and {path!r}"
            if UP_BIAS in layer.tensors:
                return f"it has no bias that is scaled with LoRA's factors, as that of {path!r}"
            if layer.alpha == 0 and layer.family not in LIMITED:
                return f"alpha 0 means alpha = rank in it, and {path!r} has alpha 0"
            if is_own(layer.family):  # scale and all in our own header entry
                seen[spelled] = path
                continue
            if layer.family not in _PAIRS and weight_shape(layer) is None:
                return f"the tensors of {path!r} are no whole {layer.family}"
            if any(name.endswith("multipliers") or name in ("triangles", "series") for name in layer.tensors):
                return f"{path!r} is in a form of {layer.family} that is peft's"
            if not told_rank(layer) and not math.isclose(layer.scale, 1.0):
                return f"a change without rank has no alpha in it, and that of {path!r} is {layer.scale:g}"
            seen[spelled] = path
        return None

    def encode(self, state: AdapterState) -> TensorFile:
        """See `Codec.encode`. `.alpha` is the one by which alpha / r is the layer's scale, in float32."""
        if self.obstacle(state) is not None:
            raise cannot_represent(self, state)
        sdxl = is_sdxl(state)
        tensors: dict[str, Tensor] = {}
        layers = {}
        for path, layer in state.layers.items():
            spelled = spell(path, sdxl)
            assert spelled is not None
            layers[spelled] = layer
            tensors |= {f"{spelled}.{part}": tensor for part, tensor in _parts(path, layer).items()}
        families = sorted({_ALGORITHMS.get(layer.family, layer.family) for layer in layers.values()})
        said = tool_header(state.metadata, layers, "sdxl" if sdxl else state.metadata.base_family) | {
            "ss_network_module": "lycoris.kohya",
            "ss_network_args": compact({"algo": families[0] if len(families) == 1 else "mixed"}),
        }
        file = TensorFile(tensors, {**to_header(state.metadata, layers), **said})
        return replace(file, metadata={**file.metadata, **hashes(file)})


def _split(name: str) -> tuple[str, str]:
    layer, part = split_factor(name)
    return (layer, part) if part else split_ending(name, flat=True)


def _still(file: TensorFile) -> set[str]:
    """The layers that kohya's own OFT does not turn: there, and only there, a limit of 0 allows nothing."""
    limits = {name: tensor for name, tensor in file.tensors.items() if _LIMIT.fullmatch(name)}
    return {name.removesuffix(".alpha") for name, tensor in limits.items() if not bool(tensor.any())}


def _refuse_untold_scales(file: TensorFile) -> None:
    """Refuse GLoRA that is scaled by alpha / sqrt(rank): its alpha is saved as if it were alpha / rank, unlike all
    others'."""
    stabilized = _STABILIZED.search(file.metadata.get("ss_network_args", ""))
    if stabilized and any(name.endswith(".a1.weight") for name in file.tensors):
        raise FormatError(
            "unsupported: a rank-stabilized GLoRA. Its file does not say by how much its change is multiplied. Nothing "
            f"of {file.label} was used."
        )


def _parts(path: LayerPath, layer: LayerState) -> dict[str, Tensor]:
    """A layer's tensors by the endings of their names."""
    alpha = {"alpha": alpha_tensor(layer)}
    if layer.family in _PAIRS:
        pair = {name: layer.tensors[name] for name in ("down", "up") if name in layer.tensors}
        check_lora(path, replace(layer, tensors=pair))
        parts = {f"lora_{name}.weight": tensor for name, tensor in pair.items()}
        dimensions = pair["down"].ndim
    else:
        parts = parts_of(layer)
        dimensions = len(weight_shape(layer) or (0, 0))
        alpha = alpha if has_alpha(layer.family) else {}
    if is_own(layer.family):
        return parts
    return parts | alpha | _dora_scale(layer, dimensions) | bias_parts(layer)


def _dora_scale(layer: LayerState, dimensions: int) -> dict[str, Tensor]:
    """The magnitude beside a weight of so many dimensions."""
    tail = (1,) * (dimensions - 2)
    if OUTPUTS in layer.tensors:
        return {"dora_scale": layer.tensors[OUTPUTS].reshape(-1, 1, *tail)}
    return {"dora_scale": layer.tensors[INPUTS].reshape(1, -1, *tail)} if INPUTS in layer.tensors else {}
