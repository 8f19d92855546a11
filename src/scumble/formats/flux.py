"""Flux.1 in the names of its original code, where q, k and v are one matrix: the files of kohya, BFL and XLabs.

    lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight, .lora_up.weight, .alpha     kohya-flux: sd-scripts
    double_blocks.0.img_attn.qkv.lora_A.weight, .lora_B.weight [.alpha]                   bfl, and as ComfyUI calls it
    double_blocks.0.processor.qkv_lora1.down.weight, .up.weight                           xlabs: attention alone

A pair over a fused matrix is split without loss. Legend: A (r, in), B (out of all parts, r), R the fused rank:

    shared    every part has A, and its rows of B: rank R
    blocks    B is zero but for one block a part, so that each has its own rows of A: ranks that add up to R

They are joined the same way: `shared` where the parts have one A, as files of these tools have, else `blocks`, of rank
3R (4R in single blocks), which is what sd-scripts itself writes for q, k and v that were trained apart. A part that the
adapter does not change has zero rows of B. The parts share one scale: where theirs differ, the dialect can't hold them.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import TYPE_CHECKING, ClassVar

from scumble.adapters.state import AdapterState, LayerPath, LayerState
from scumble.errors import FormatError
from scumble.formats.codec import cannot_represent
from scumble.formats.container import TensorFile
from scumble.formats.flat_names import FLUX_DOTTED, FLUX_FLAT, expand, flat
from scumble.formats.keymap import LayerNames, classic, split_root
from scumble.formats.kohya import hashes, tool_header
from scumble.formats.metadata import LayerFacts, compact, layer_facts, parse_table, to_header
from scumble.formats.pairs import (
    NO_KIND,
    Decoded,
    Factor,
    assemble,
    beyond_lora,
    check_lora,
    refuse_integers,
    refuse_unsupported,
    split_factor,
)
from scumble.formats.scales import alpha_of, settle
from scumble.formats.stored import scalar
from scumble.formats.tables.modules import CLIP_TEXT, FLUX_TRANSFORMER, T5_TEXT

if TYPE_CHECKING:
    from torch import Tensor

PADDED = "scumble.padded"
"""Our header entry: the parts that a fused matrix has zero rows for, because the adapter does not change them."""

_ATTN = {"img": ("attn.to_q", "attn.to_k", "attn.to_v"), "txt": tuple(f"attn.add_{x}_proj" for x in "qkv")}

_DOUBLE: Mapping[str, tuple[str, ...]] = {
    "img_attn.qkv": _ATTN["img"],
    "txt_attn.qkv": _ATTN["txt"],
    "img_attn.proj": ("attn.to_out.0",),
    "txt_attn.proj": ("attn.to_add_out",),
    "img_mlp.0": ("ff.net.0.proj",),
    "img_mlp.2": ("ff.net.2",),
    "txt_mlp.0": ("ff_context.net.0.proj",),
    "txt_mlp.2": ("ff_context.net.2",),
    "img_mod.lin": ("norm1.linear",),
    "txt_mod.lin": ("norm1_context.linear",),
}
"""Layer of a double block in the original code -> diffusers' layers, in the order of their rows."""

_SINGLE: Mapping[str, tuple[str, ...]] = {
    "linear1": (*_ATTN["img"], "proj_mlp"),
    "linear2": ("proj_out",),
    "modulation.lin": ("norm.linear",),
}

_OUTSIDE: Mapping[str, str] = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    **{
        f"{theirs}.{layer}": f"time_text_embed.{ours}.linear_{number}"
        for theirs, ours in (
            ("time_in", "timestep_embedder"),
            ("guidance_in", "guidance_embedder"),
            ("vector_in", "text_embedder"),
        )
        for layer, number in (("in_layer", 1), ("out_layer", 2))
    },
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
}

_SWAPPED = "transformer.norm_out.linear"
"""The original code puts shift before scale, diffusers scale before shift: halves of the rows change places."""

_XLABS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "double_blocks": {
        "processor.qkv_lora1": _ATTN["img"],
        "processor.qkv_lora2": _ATTN["txt"],
        "processor.proj_lora1": ("attn.to_out.0",),
        "processor.proj_lora2": ("attn.to_add_out",),
    },
    "single_blocks": {"processor.qkv_lora": _ATTN["img"], "processor.proj_lora": ("proj_out",)},
}
"""XLabs' names, which leave the feed-forward of single blocks alone."""

_BLOCKS = {"double_blocks": "transformer_blocks", "single_blocks": "single_transformer_blocks"}
_NUMBERED = re.compile(r"(double_blocks|single_blocks)\.(\d+)\.(.+)")
_PLACE = re.compile(r"transformer\.(transformer_blocks|single_transformer_blocks)\.(\d+)\.(.+)")

Parts = tuple[LayerPath, ...]


def parts_named(name: str, blocks: Mapping[str, Mapping[str, tuple[str, ...]]] | None = None) -> Parts:
    """diffusers' layers that the original code calls `name` ("double_blocks.0.img_attn.qkv"), in the order of their
    rows; empty when it has no such layer. `blocks`: other names inside blocks."""
    match = _NUMBERED.fullmatch(name)
    if match is None:
        return (f"transformer.{_OUTSIDE[name]}",) if name in _OUTSIDE and blocks is None else ()
    kind, number, rest = match.groups()
    table = (blocks or {"double_blocks": _DOUBLE, "single_blocks": _SINGLE})[kind]
    return tuple(f"transformer.{_BLOCKS[kind]}.{number}.{part}" for part in table.get(rest, ()))


def name_of(path: LayerPath, blocks: Mapping[str, Mapping[str, tuple[str, ...]]] | None = None) -> str | None:
    """The inverse: what the original code calls the matrix that `path` is, or is a part of; None when it has none."""
    match = _PLACE.fullmatch(path)
    if match is None:
        outside = {f"transformer.{ours}": theirs for theirs, ours in _OUTSIDE.items()}
        return outside.get(path) if blocks is None else None
    kind = next(theirs for theirs, ours in _BLOCKS.items() if ours == match[1])
    table = (blocks or {"double_blocks": _DOUBLE, "single_blocks": _SINGLE})[kind]
    found = next((rest for rest, parts in table.items() if match[3] in parts), None)
    return None if found is None else f"{kind}.{match[2]}.{found}"


@dataclass(frozen=True)
class _Spelled:
    """A tensor of a file, taken apart."""

    layer: str
    """What comes before the ending."""
    part: str
    """"down", "up" or "alpha"; empty for others."""
    paths: Parts
    """The layers that it changes; empty for a name that means none."""


class _Fused:
    """What the three dialects share."""

    name: str
    scaled: ClassVar[bool]
    """Whether it has a place for alpha; without, alpha is the rank."""

    def matches(self, file: TensorFile) -> bool:
        """See `Codec`."""
        raise NotImplementedError

    def spelled(self, name: str, layers: Collection[LayerPath] | None) -> _Spelled:
        """A tensor's name, taken apart."""
        raise NotImplementedError

    def layer_name(self, path: LayerPath) -> str | None:
        """What the dialect calls the matrix that `path` is a part of; None when it has no name for it."""
        raise NotImplementedError

    def parts(self, layer: str) -> Parts:
        """The layers that a matrix of the dialect consists of."""
        raise NotImplementedError

    def endings(self) -> tuple[str, str]:
        """Of the two factors, down and up."""
        raise NotImplementedError

    def decode(self, file: TensorFile, layers: Collection[LayerPath] | None) -> Decoded:
        """See `Codec.decode`. Fused pairs are split; what they come from is reported whole."""
        refuse_unsupported(file.tensors)
        found: dict[str, dict[str, str]] = defaultdict(dict)
        paths: dict[str, Parts] = {}
        for name in file.tensors:
            spelled = self.spelled(name, layers)
            if spelled.part in ("down", "up", "alpha") and spelled.paths:
                if spelled.part in found[spelled.layer]:
                    raise FormatError(
                        f"Two tensors claim one place: {found[spelled.layer][spelled.part]!r} and {name!r}."
                    )
                found[spelled.layer][spelled.part], paths[spelled.layer] = name, spelled.paths
        whole = {layer: parts for layer, parts in found.items() if set(parts) != {"alpha"}}
        padded = frozenset(parse_table(file.metadata.get(PADDED, "{}"), PADDED))
        facts = _own_facts(file, {path for layer in whole for path in paths[layer]} - padded)
        tensors: dict[str, Tensor] = {}
        origin: dict[str, str] = {}
        for layer, names in whole.items():
            split = _split(file, layer, names, paths[layer], padded, facts)
            for path, tensors_of in split.items():
                for part, tensor in tensors_of.items():
                    ending = {"down": "lora_A.weight", "up": "lora_B.weight", "alpha": "alpha"}[part]
                    virtual = f"{path}.{ending}"
                    if virtual in tensors:
                        raise FormatError(
                            f"The file describes one layer twice: {origin[virtual]!r} and {names[part]!r} are both "
                            f"of {path!r}."
                        )
                    tensors[virtual], origin[virtual] = tensor, names[part]
        apart = TensorFile(tensors, file.metadata, file.path)
        factors = [Factor(name, *split_factor(name)) for name in tensors]
        decoded = assemble(apart, factors, LayerNames(layers), partial(settle, apart, zero_means_rank=True))
        unused = {origin[name]: why for name, why in decoded.unused.items()}
        unused |= {
            name: NO_KIND
            for name in file.tensors
            if name not in {given for names in whole.values() for given in names.values()}
        }
        extra = {key: text for key, text in decoded.state.metadata.extra.items() if key != PADDED}
        return replace(
            decoded,
            state=replace(decoded.state, metadata=replace(decoded.state.metadata, extra=extra)),
            used=tuple(name for name in file.tensors if name not in unused),
            unused=unused,
        )

    def obstacle(self, state: AdapterState) -> str | None:
        """See `Codec.obstacle`."""
        if (beyond := beyond_lora(state)) is not None:
            return beyond
        if not any(split_root(path)[0] == "transformer" for path in state.layers):
            return "it is for Flux.1's transformer, of which the adapter changes nothing"
        for path, layer in state.layers.items():
            if self.layer_name(path) is None:
                return f"it has no name for {path!r}"
            beside = sorted(layer.tensors.keys() - {"down", "up"})
            if beside:
                return f"it has no place for {', '.join(beside)}, as beside the factors of {path!r}"
            if not self.scaled and layer.scale != 1:
                return f"it has no place for an alpha, and the scale of {path!r} is {layer.scale:g}"
            if layer.alpha == 0:
                return f"alpha 0 means alpha = rank in it, and {path!r} has alpha 0"
        for name, group in self._groups(state).items():
            parts = [layer for layer in group.values() if layer is not None]
            if len({layer.scale for layer in parts}) > 1:
                listed = ", ".join(f"{layer.scale:g}" for layer in parts)
                return f"{name!r} is one matrix with one alpha in it, and its parts have the scales {listed}"
            if len({tensor.dtype for layer in parts for tensor in layer.tensors.values()}) > 1:
                return f"{name!r} is one matrix in it, and its parts have several dtypes"
            if len(group) > 1 and (strange := _without_sizes(group)):
                return strange
        return None

    def encode(self, state: AdapterState) -> TensorFile:
        """See `Codec.encode`."""
        if self.obstacle(state) is not None:
            raise cannot_represent(self, state)
        for path, layer in state.layers.items():
            check_lora(path, layer)
        down_ending, up_ending = self.endings()
        tensors: dict[str, Tensor] = {}
        padded: list[LayerPath] = []
        for name, group in self._groups(state).items():
            down, up = _joined(group)
            if _SWAPPED in group:
                up = _halves_swapped(up)
            tensors[f"{name}.{down_ending}"], tensors[f"{name}.{up_ending}"] = down, up
            if self.scaled:
                scale = next(layer.scale for layer in group.values() if layer is not None)
                tensors[f"{name}.alpha"] = scalar(scale * len(down), down)
            padded += [path for path, layer in group.items() if layer is None]
        header = to_header(state.metadata, {classic(path): layer for path, layer in state.layers.items()})
        if padded:
            header[PADDED] = compact(dict.fromkeys(padded, 0))
        return self._finished(TensorFile(tensors, header), state)

    def _finished(self, file: TensorFile, state: AdapterState) -> TensorFile:
        return file

    def _groups(self, state: AdapterState) -> dict[str, dict[LayerPath, LayerState | None]]:
        """Matrix of the dialect -> its parts; None for those that the adapter does not change."""
        groups: dict[str, dict[LayerPath, LayerState | None]] = {}
        for path in sorted(state.layers):
            name = self.layer_name(path)
            assert name is not None
            if name not in groups:
                parts = self.parts(name) or (path,)
                groups[name] = {part: state.layers.get(part) for part in parts}
        return groups


class FluxKohya(_Fused):
    """What `networks.lora_flux` of sd-scripts writes, text encoders included; read is OneTrainer's `lora_transformer_`
    too."""

    name = "kohya-flux"
    scaled = True

    def matches(self, file: TensorFile) -> bool:
        """Whether any tensor is a factor under a flat name of Flux."""
        return any(FLUX_FLAT.match(name) and split_factor(name)[1] in ("down", "up") for name in file.tensors)

    def spelled(self, name: str, layers: Collection[LayerPath] | None) -> _Spelled:
        """See `_Fused`."""
        layer, part = split_factor(name)
        table = _known() if layers is None else _flat_table(tuple(layers))
        return _Spelled(layer, part, table.get(layer, ()) or self._unknown(layer))

    def _unknown(self, layer: str) -> Parts:
        """Names of blocks that the base does not have, so that they are reported as layers that it lacks."""
        match = re.fullmatch(r"lora_unet_(double|single)_blocks_(\d+)_(\w+)", layer)
        if match is None:
            return ()
        table = _DOUBLE if match[1] == "double" else _SINGLE
        rest = next((rest for rest in table if flat(rest) == match[3]), None)
        return () if rest is None else parts_named(f"{match[1]}_blocks.{match[2]}.{rest}")

    def layer_name(self, path: LayerPath) -> str | None:
        """See `_Fused`."""
        root, rest = split_root(path)
        if root == "transformer":
            name = name_of(path)
            return None if name is None else f"lora_unet_{flat(name)}"
        if root == "text_encoder" and rest.removeprefix("text_model.").startswith("encoder.layers."):
            return f"lora_te1_{flat(classic(path).removeprefix('text_encoder.'))}"
        if root == "text_encoder_2" and rest.startswith("encoder.block."):
            return f"lora_te3_{flat(rest)}"
        return None

    def parts(self, layer: str) -> Parts:
        """See `_Fused`."""
        return self._unknown(layer)

    def endings(self) -> tuple[str, str]:
        """See `_Fused`."""
        return "lora_down.weight", "lora_up.weight"

    def _finished(self, file: TensorFile, state: AdapterState) -> TensorFile:
        """With what sd-scripts and A1111 show of a file, and the hashes by which they know it."""
        said = tool_header(state.metadata, state.layers, "flux")
        said["ss_network_module"] = "networks.lora_flux"
        whole = replace(file, metadata={**file.metadata, **said})
        return replace(whole, metadata={**whole.metadata, **hashes(whole)})


class Bfl(_Fused):
    """The names of the original code with dots, as BFL's own and ComfyUI's files have them; no text encoder."""

    name = "bfl"
    scaled = True
    diffusers_reads = False
    """diffusers' own loader takes these names only for whole control models."""

    def matches(self, file: TensorFile) -> bool:
        """Whether any tensor is a factor under such a name."""
        return any(
            FLUX_DOTTED.fullmatch(name)
            and ".processor." not in name
            and split_factor(name)[1] in ("down", "up")
            for name in file.tensors
        )

    def spelled(self, name: str, layers: Collection[LayerPath] | None) -> _Spelled:
        """See `_Fused`."""
        layer, part = split_factor(name)
        match = FLUX_DOTTED.fullmatch(layer + ".")
        return _Spelled(layer, part, parts_named(match["rest"].removesuffix(".")) if match else _bare(layer))

    def layer_name(self, path: LayerPath) -> str | None:
        """See `_Fused`."""
        return name_of(path)

    def parts(self, layer: str) -> Parts:
        """See `_Fused`."""
        return parts_named(layer)

    def endings(self) -> tuple[str, str]:
        """See `_Fused`."""
        return "lora_A.weight", "lora_B.weight"


class XLabs(_Fused):
    """What XLabs' trainer writes: attention alone, and no alpha."""

    name = "xlabs"
    scaled = False

    def matches(self, file: TensorFile) -> bool:
        """Whether any tensor belongs to one of its processors."""
        return any(FLUX_DOTTED.match(name) and self.spelled(name, None).paths for name in file.tensors)

    def spelled(self, name: str, layers: Collection[LayerPath] | None) -> _Spelled:
        """See `_Fused`."""
        bare = name.removeprefix("diffusion_model.")
        match = re.fullmatch(r"(.+)\.(down|up)\.weight", bare)
        return (
            _Spelled(match[1], match[2], parts_named(match[1], _XLABS)) if match else _Spelled(bare, "", ())
        )

    def layer_name(self, path: LayerPath) -> str | None:
        """See `_Fused`."""
        return name_of(path, _XLABS)

    def parts(self, layer: str) -> Parts:
        """See `_Fused`."""
        return parts_named(layer, _XLABS)

    def endings(self) -> tuple[str, str]:
        """See `_Fused`."""
        return "down.weight", "up.weight"


def _bare(layer: str) -> Parts:
    """A layer outside the blocks that has no dot of its own: `img_in`."""
    return parts_named(layer.removeprefix("diffusion_model."))


def known_layers() -> tuple[LayerPath, ...]:
    """The layers of Flux.1 dev at full size, its text encoders with CLIP's `text_model.`."""
    roots = {"transformer": FLUX_TRANSFORMER, "text_encoder": CLIP_TEXT[:1], "text_encoder_2": T5_TEXT}
    return tuple(f"{root}.{name}" for root, patterns in roots.items() for name in expand(patterns))


@lru_cache(maxsize=1)
def _known() -> Mapping[str, Parts]:
    return _flat_table(known_layers())


@lru_cache(maxsize=4)
def _flat_table(layers: tuple[LayerPath, ...]) -> Mapping[str, Parts]:
    """Flat name -> the layers of the matrix that is called so: every spelling of every layer."""
    table: dict[str, Parts] = {}
    for path in layers:
        root, rest = split_root(path)
        if root == "transformer":
            table[f"lora_transformer_{flat(rest)}"] = (path,)
            name = name_of(path)
            if name is not None:
                table[f"lora_unet_{flat(name)}"] = parts_named(name)
        elif root == "text_encoder":
            for spelled in {rest, rest.removeprefix("text_model."), f"text_model.{rest}"}:
                table[f"lora_te1_{flat(spelled)}"] = table[f"lora_te_{flat(spelled)}"] = (path,)
        elif root == "text_encoder_2":
            table[f"lora_te3_{flat(rest)}"] = table[f"lora_te2_{flat(rest)}"] = (path,)
    return table


def _own_facts(file: TensorFile, paths: Collection[LayerPath]) -> Mapping[str, LayerFacts]:
    """What our header says of the ranks of layers, by diffusers' names; empty without it."""
    return layer_facts(file.metadata, dict.fromkeys(map(classic, paths))) or {}


def _split(
    file: TensorFile,
    layer: str,
    names: Mapping[str, str],
    paths: Parts,
    padded: Collection[LayerPath],
    facts: Mapping[str, LayerFacts],
) -> dict[str, dict[str, Tensor]]:
    """The factors of each part of a pair, by diffusers' names.

    Raises:
        FormatError: a factor is missing, or the shapes are none of such a pair.
    """
    if "down" not in names or "up" not in names:
        half = next(iter(names.values()))
        raise FormatError(
            f"1 layer has only one of the two factors: {half!r}. The file is damaged or was edited. Not applied."
        )
    down, up = file.tensors[names["down"]], file.tensors[names["up"]]
    if down.ndim == 4 and math.prod(down.shape[2:]) == 1:
        down, up = down.flatten(1), up.flatten(1)
    if down.ndim != 2 or up.ndim != 2 or up.shape[1] != down.shape[0]:
        raise FormatError(
            f"The factors of {layer!r} have shapes {tuple(down.shape)} and {tuple(up.shape)}; expected (rank, in) and "
            "(out, rank). Not applied."
        )
    refuse_integers(layer, down, up)
    spelled = [classic(path) for path in paths]
    alpha = {"alpha": alpha_of(file, names["alpha"])} if "alpha" in names else {}
    rank = down.shape[0]
    if len(paths) == 1:
        up = _halves_swapped(up) if paths == (_SWAPPED,) else up
        return {spelled[0]: {"down": down, "up": up, **_alphas(alpha, 1.0)}}
    rows = _rows(layer, down, up, len(paths))
    here = [path not in padded for path in paths]
    told = [
        facts[one].rank if there and one in facts else 0 for one, there in zip(spelled, here, strict=True)
    ]
    ranks = _ranks(rank, up, rows, told if facts else None)
    found, begin, first = {}, 0, 0
    for spelling, there, size, own in zip(spelled, here, rows, ranks or [rank] * len(paths), strict=True):
        mine = up[begin : begin + size]
        begin += size
        if ranks is None:
            factors = {"down": down, "up": mine}
        else:
            columns = slice(first, first + own)
            factors = {"down": down[columns], "up": mine[:, columns].contiguous()}
            first += own
            rest = mine.clone()
            rest[:, columns] = 0
            if rest.any():
                raise FormatError(
                    f"The header says that the parts of {layer!r} have ranks {told}, and {names['up']!r} is not "
                    "made of such blocks. The file was changed after it was written."
                )
        if there:
            found[spelling] = {**factors, **_alphas(alpha, own / rank)}
    return found


def _alphas(alpha: Mapping[str, float], share: float) -> dict[str, Tensor]:
    import torch

    return {part: torch.tensor(value * share, dtype=torch.float64) for part, value in alpha.items()}


def _rows(layer: str, down: Tensor, up: Tensor, parts: int) -> list[int]:
    """How many rows each part has: q, k and v as many as there are inputs, and what is left."""
    width, total = down.shape[1], up.shape[0]
    rest = total - 3 * width
    if (parts == 3 and rest) or (parts == 4 and rest <= 0):
        raise FormatError(
            f"The factors of {layer!r} have shapes {tuple(down.shape)} and {tuple(up.shape)}: {total} outputs are not "
            f"q, k and v of {width} each{' and a feed-forward' if parts == 4 else ''}. Not applied."
        )
    return [width] * 3 + [rest] * (parts - 3)


def _ranks(rank: int, up: Tensor, rows: Sequence[int], told: Sequence[int] | None) -> list[int] | None:
    """The ranks of parts that have blocks of their own; None where they share one.

    Our header tells; without it equal blocks are looked for, as sd-scripts and diffusers do.
    """
    if told is not None:
        present = [one for one in told if one]
        return None if all(one == rank for one in present) else list(told)
    if rank % len(rows):
        return None
    own = rank // len(rows)
    blocks = up.split(list(rows))
    for number, block in enumerate(blocks):
        if block[:, : number * own].any() or block[:, (number + 1) * own :].any():
            return None
    return [own] * len(rows)


def _joined(group: Mapping[LayerPath, LayerState | None]) -> tuple[Tensor, Tensor]:
    """(down, up) of the matrix whose parts these are."""
    parts = list(group.values())
    there = [layer for layer in parts if layer is not None]
    first = there[0].tensors["down"]
    if len(parts) == 1:
        return there[0].tensors["down"], there[0].tensors["up"]
    rows = _sizes(group)
    import torch

    shared = all(first.equal(layer.tensors["down"]) for layer in there)
    down = first if shared else torch.cat([layer.tensors["down"] for layer in there])
    up = first.new_zeros(sum(rows), len(down))
    begin = column = 0
    for layer, size in zip(parts, rows, strict=True):
        if layer is not None:
            up[begin : begin + size, column : column + layer.rank] = layer.tensors["up"]
            column += 0 if shared else layer.rank
        begin += size
    return down, up


def _sizes(group: Mapping[LayerPath, LayerState | None]) -> list[int]:
    """Rows of each part, those that are not there included: q, k and v are square, the feed-forward has four times
    as many, as Flux.1's has."""
    width = next(layer.tensors["down"].shape[1] for layer in group.values() if layer is not None)
    usual = [width, width, width, 4 * width][: len(group)]
    return [
        size if layer is None else layer.tensors["up"].shape[0]
        for layer, size in zip(group.values(), usual, strict=True)
    ]


def _without_sizes(group: Mapping[LayerPath, LayerState | None]) -> str | None:
    """Why the parts can't be rows of one matrix; None when they can."""
    inputs = {layer.tensors["down"].shape[1] for layer in group.values() if layer is not None}
    if len(inputs) > 1:
        return f"{next(iter(group))!r} and its neighbours are one matrix in it, and read {sorted(inputs)} numbers"
    width = inputs.pop()
    for path, layer in list(group.items())[:3]:
        if layer is not None and layer.tensors["up"].shape[0] != width:
            return f"{path!r} is not square, as q, k and v are in it"
    return None


def _halves_swapped(up: Tensor) -> Tensor:
    import torch

    return torch.cat(up.chunk(2)[::-1])
