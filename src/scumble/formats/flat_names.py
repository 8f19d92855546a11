"""Flat names: the layer `unet.mid_block...to_q` as kohya, LyCORIS and A1111 call it, `lora_unet_mid_block_..._to_q`.

    lora_unet_down_blocks_1_attentions_0_proj_in      diffusers' names: SD 1 and 2, some SDXL files
    lora_unet_input_blocks_4_1_proj_in                the same layer in the names of the original code: SDXL
    lora_te_text_model_encoder_layers_0_mlp_fc1       the text encoder of SD 1 and 2; lora_te1_, lora_te2_: SDXL's
    lora_transformer_transformer_blocks_0_attn_to_q   SD 3, Flux.1 and their kin, in diffusers' names: OneTrainer
    lycoris_down_blocks_1_attentions_0_proj_in        LyCORIS used as a library

A name that had '.' and '_' can't be told apart again once both are '_'. So every layer is flattened in each of
its spellings, and names are looked up; nothing is ever split. Without a base at hand the layers come from
`tables/modules.py`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache

from scumble.adapters.shapes import weight_shape
from scumble.adapters.state import AdapterState, LayerPath
from scumble.errors import FormatError
from scumble.formats.keymap import CLIP_BEGINS, split_root
from scumble.formats.tables.bases import ORIGINAL
from scumble.formats.tables.modules import ANY_TRANSFORMER, ANY_UNET, CLIP_NORMS, CLIP_TEXT, UNET_NORMS

PREFIXES: dict[str, tuple[str, ...]] = {
    "lora_unet_": ("unet",),
    "lora_te_": ("text_encoder",),
    "lora_te1_": ("text_encoder",),
    "lora_te2_": ("text_encoder_2",),
    "oft_unet_": ("unet",),
    "oft_te_": ("text_encoder",),
    "lora_transformer_": ("transformer",),
    "lycoris_": ("unet", "text_encoder", "text_encoder_2"),
}
"""How a flat name begins -> the components whose layers it may mean. None begins as another does."""

_BEGINNINGS = tuple(PREFIXES)

FLUX_FLAT = re.compile(
    r"lora_unet_(double_blocks|single_blocks|img_in|txt_in|time_in|vector_in|guidance_in|final_layer)_"
    r"|lora_unet_(img_in|txt_in)\."
    r"|lora_transformer_((single_)?transformer_blocks|time_text_embed|x_embedder|context_embedder|norm_out|proj_out)"
)
FLUX_DOTTED = re.compile(
    r"(?:diffusion_model\.)?(?P<rest>(?:double_blocks|single_blocks)\.\d+\..+"
    r"|(?:img_in|txt_in|time_in|vector_in|guidance_in|final_layer)\..+)"
)
"""The names of Flux.1, which are those of its own code (see `flux.py`): flat and with dots."""

_LYCORIS = re.compile(
    r"hada_[wt][12](_[ab])?|lokr_[wt][12](_[ab])?|dora_scale|magnitude|diff(_b)?|[wb]_norm|on_input|weight|bias|"
    r"oft_(blocks|diag|R(\.\w+)?)|boft_\w+|rescale|scalar|[ab][12]\.weight|scumble\.\w+\.\w+"
)

_ARCHITECTURE = ("ss_base_model_version", "modelspec.architecture")
"""Header entries in which kohya's tools and their kin say what an adapter is for."""
_SDXL, _SD = ("sdxl", "stable-diffusion-xl"), ("sd_v", "sd_1", "sd_2", "stable-diffusion-v")
_DEEP = re.compile(r"^unet\..*\.transformer_blocks\.[1-9]")
"""SD 1 and 2 have one block in each transformer, SDXL up to ten."""

_LEVEL = 2
"""Resnets on one level of the original code's UNets: SD 1, SD 2 and SDXL."""

_RESNET = {
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
    "norm1": "in_layers.0",
    "norm2": "out_layers.0",
}
_OUTSIDE = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "conv_norm_out": "out.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
_INSIDE = re.compile(
    r"(?:(?P<side>down|up)_blocks\.(?P<level>\d+)|mid_block)"
    r"\.(?P<kind>resnets|attentions|downsamplers|upsamplers)\.(?P<number>\d+)\.(?P<rest>.+)"
)


class FlatNames:
    """The layers of one base, found under their flat names."""

    def __init__(self, layers: Collection[LayerPath] | None) -> None:
        """`layers`: paths of the base's layers, or a mapping from them to the shapes of their weights; None
        when there is no base at hand: then the layers of every well-known base are known."""
        self._shapes: Mapping[LayerPath, Sequence[int]] = layers if isinstance(layers, Mapping) else {}
        self._table = _known_layers() if layers is None else _table(layers)

    def resolve(self, spelled: str) -> LayerPath | None:
        """The layer that a file calls `spelled` ("lora_unet_..."), or None when the base has no such layer.

        Raises:
            FormatError: two layers of the base flatten to this name.
        """
        prefix = _prefix(spelled)
        if prefix is None:
            return None
        rest = spelled.removeprefix(prefix)
        found: tuple[LayerPath, ...] = ()
        for root in PREFIXES[prefix]:
            found = found or self._table.get((root, rest), ())
        if len(found) > 1:
            raise FormatError(f"{spelled!r} may mean {' or '.join(found)}: no way to tell. Not applied.")
        return found[0] if found else None

    def shape(self, path: LayerPath) -> Sequence[int] | None:
        """The shape of a layer's weight, (out, in[, k, k]), or None when it is not known."""
        return self._shapes.get(path)

    def labelled(self, spelled: str) -> str:
        """`spelled` with the component that it belongs to before it, for counting."""
        prefix = _prefix(spelled)
        return f"{PREFIXES[prefix][0] if prefix else 'unet'}.{spelled}"


def is_flat(name: str) -> bool:
    """Whether a layer's or a tensor's name begins as flat names do."""
    return name.startswith(_BEGINNINGS)


def of_lycoris(name: str) -> bool:
    """Whether a tensor under a flat name is of a family that LyCORIS adds to LoRA."""
    return is_flat(name) and _LYCORIS.fullmatch(name.partition(".")[2]) is not None


def spell(path: LayerPath, sdxl: bool) -> str | None:
    """The flat name of a layer in files for SDXL or for SD 1 and 2; None when the dialect has no name for it."""
    root, rest = split_root(path)
    if root == "unet":
        return "lora_unet_" + flat((original_name(rest) if sdxl else None) or rest)
    if root == "transformer":
        return "lora_transformer_" + flat(rest)
    if root in ("text_encoder", "text_encoder_2"):
        prefix = "lora_te2_" if root == "text_encoder_2" else "lora_te1_" if sdxl else "lora_te_"
        return prefix + flat(_with_text_model(rest))
    return None


def is_sdxl(state: AdapterState) -> bool:
    """Whether an adapter is for SDXL: by what it says of its base, layers that no other UNet has, or the width of its
    text."""
    if any(path.startswith("transformer.") for path in state.layers):
        return False
    if state.metadata.base_family in ORIGINAL:
        return ORIGINAL[state.metadata.base_family]
    said = [state.metadata.extra.get(entry, "").lower() for entry in _ARCHITECTURE]
    if any(word.startswith(_SDXL) for word in said):
        return True
    if any(word.startswith(_SD) for word in said):
        return False
    return any(
        path.startswith(("text_encoder_2.", "unet.add_embedding."))
        or _DEEP.search(path) is not None
        or (path.endswith((".attn2.to_k", ".attn2.to_v")) and (weight_shape(layer) or (0, 0))[1] == 2048)
        for path, layer in state.layers.items()
    )


def original_name(rest: str, level: int = _LEVEL) -> str | None:
    """What the original code calls a layer of diffusers' UNet: `input_blocks.4.1.proj_in`; None when unknown.

    `level` is the number of resnets on one level of the way down.
    """
    names = list(_original_names(rest, level))
    return names[0] if names else None


def levels_of(layers: Collection[LayerPath] | None) -> int:
    """The number of resnets on one level of a whole UNet's way down; 2 when `layers` are no whole UNet."""
    if layers is None or not ("unet.conv_in" in layers and "unet.conv_out" in layers):
        return _LEVEL
    numbers = [
        int(match[1])
        for path in layers
        if (match := re.match(r"unet\.down_blocks\.\d+\.resnets\.(\d+)\.", path))
    ]
    return max(numbers, default=_LEVEL - 1) + 1


def original_names(layers: Collection[LayerPath]) -> dict[str, LayerPath]:
    """Every layer of a UNet by its names in the original code, with dots and without `unet.`."""
    level = levels_of(layers)
    return {
        name: path
        for path in layers
        if path.startswith("unet.")
        for name in _original_names(path.removeprefix("unet."), level)
    }


def known_layers() -> tuple[LayerPath, ...]:
    """The layers and normalisations of every well-known base, with CLIP's `text_model.`."""
    roots = {
        "unet": (*ANY_UNET, *UNET_NORMS),
        "transformer": ANY_TRANSFORMER,
        "text_encoder": (*CLIP_TEXT[:1], *CLIP_NORMS),
        "text_encoder_2": (*CLIP_TEXT, *CLIP_NORMS),
    }
    return tuple(f"{root}.{name}" for root, patterns in roots.items() for name in expand(patterns))


def expand(patterns: Iterable[str]) -> Iterator[str]:
    """All names that patterns with braces stand for, in their order."""
    for pattern in patterns:
        start = pattern.find("{")
        if start < 0:
            yield pattern
            continue
        depth, choices, begin = 0, [], start + 1
        for position in range(start, len(pattern)):
            depth += {"{": 1, "}": -1}.get(pattern[position], 0)
            if depth == 0 or (depth == 1 and pattern[position] == ","):
                choices.append(pattern[begin:position])
                begin = position + 1
            if depth == 0:
                break
        yield from expand(pattern[:start] + choice + pattern[begin:] for choice in choices)


def flat(dotted: str) -> str:
    """A dotted name with underscores alone."""
    return dotted.replace(".", "_")


def _prefix(name: str) -> str | None:
    return next((prefix for prefix in PREFIXES if name.startswith(prefix)), None)


_Table = Mapping[tuple[str, str], tuple[LayerPath, ...]]


@lru_cache(maxsize=1)
def _known_layers() -> _Table:
    return _table(known_layers())


def _table(layers: Collection[LayerPath]) -> _Table:
    """(component, flat name without prefix) -> the layers that it may mean."""
    table: dict[tuple[str, str], tuple[LayerPath, ...]] = {}
    level = levels_of(layers)
    for path in layers:
        root, rest = split_root(path)
        names = {flat(rest)}
        if root == "unet":
            names |= {flat(name) for name in _original_names(rest, level)}
        else:
            names |= {flat(_with_text_model(rest)), flat(rest.removeprefix("text_model."))}
        for name in names:
            table[root, name] = (*table.get((root, name), ()), path)
    return table


def _with_text_model(rest: str) -> str:
    """A text encoder's layer as files have always spelled it."""
    return "text_model." + rest if rest.startswith(CLIP_BEGINS) else rest


def _original_names(rest: str, level: int) -> Iterator[str]:
    """A layer's names in the original code, the usual one first."""
    if rest in _OUTSIDE:
        yield _OUTSIDE[rest]
    match = _INSIDE.fullmatch(rest)
    if match is None:
        return
    kind, number, inner = match["kind"], int(match["number"]), match["rest"]
    if kind == "resnets":
        leaf = _RESNET.get(inner)
    elif kind == "downsamplers":
        leaf = "op" if inner == "conv" else None
    else:
        leaf = inner
    if leaf is None:
        return
    place = {"resnets": 0, "attentions": 1, "downsamplers": 0, "upsamplers": 2}[kind]
    if match["side"] is None:  # resnet, attention, resnet
        yield f"middle_block.{1 if kind == 'attentions' else 2 * number}.{leaf}"
        return
    where = int(match["level"]) * (level + 1)
    if match["side"] == "down":
        yield f"input_blocks.{1 + where + (level if kind == 'downsamplers' else number)}.{place}.{leaf}"
        return
    where += level if kind == "upsamplers" else number
    yield f"output_blocks.{where}.{place}.{leaf}"
    if kind == "upsamplers":  # where the block has no attention
        yield f"output_blocks.{where}.1.{leaf}"
