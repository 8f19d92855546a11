"""The format of cloneofsimo/lora (2022 and 2023), in which layers have numbers instead of names; read only.

    unet:0:up (out, r), unet:0:down (r, in[, k, k])    .safetensors: metadata "unet" lists the classes of modules
    text_encoder:0:up, ...                             whose layers were changed, "unet:0:rank" the ranks
    <s1> (dim,)                                        a learned token, metadata "<s1>": "<embed>"
    [up0, down0, up1, down1, ...]                      lora.pt and lora.text_encoder.pt; tokens in lora.ti.pt

The numbers count layers as that tool met them: down blocks, up blocks, middle block; in a transformer block
attn1, attn2, feed-forward, but up to diffusers 0.14 attn1, feed-forward, attn2. Both orders are in
circulation; shapes tell which it is. The scale is 1.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from scumble.adapters.state import AdapterState, LayerPath, LayerState, TokenState
from scumble.errors import FormatError, WrongBase
from scumble.formats.bundles import rows
from scumble.formats.codec import cannot_represent
from scumble.formats.container import TensorFile, split
from scumble.formats.flat_names import expand
from scumble.formats.keymap import split_root
from scumble.formats.metadata import from_header
from scumble.formats.pairs import NO_KIND, Decoded, count, fit
from scumble.formats.tables.modules import CLIP_DEPTHS, CLIP_TEXT, SD_UNET

if TYPE_CHECKING:
    from torch import Tensor

_NUMBERED = re.compile(r"(?P<root>unet|text_encoder):(?P<number>\d{1,5}):(?P<part>up|down)")
_LISTED = re.compile(r"\[(?P<number>\d{1,5})\]")
_EMBED = "<embed>"
_CLIP_ORDER = ("k_proj", "v_proj", "q_proj", "out_proj")
_ATTENTION_ORDER = ("to_q", "to_k", "to_v", "to_out.0")
_RESNET_ORDER = ("conv1", "time_emb_proj", "conv2", "conv_shortcut")
_OLD, _NEW = ("attn1", "ff", "attn2"), ("attn1", "attn2", "ff")
_TRANSFORMER = re.compile(r"(?P<block>.+\.transformer_blocks\.\d+)\.(?P<part>attn1|attn2|ff)\.(?P<rest>.+)")
_RESNET = re.compile(r"(?P<block>.+\.resnets\.\d+)\.(?P<rest>.+)")

Pair = tuple[str, str]
"""Names of a layer's two tensors in the file: (up, down)."""


class Cloneofsimo:
    """What lora_diffusion's `save_all` and `save_safeloras` write."""

    name = "cloneofsimo"
    read_only = True

    def matches(self, file: TensorFile) -> bool:
        """Whether its layers have numbers; learned tokens alone are an embedding."""
        if file.parts:
            return bool(file.tensors) and all(_part_matches(one) for one in _layer_parts(file).values())
        return _part_matches(file)

    def decode(self, file: TensorFile, layers: Collection[LayerPath] | None) -> Decoded:
        """See `Codec.decode`. Needs the base's layers, or believes that it is SD 1 or SD 2."""
        pairs, tokens = _pairs(file), _tokens(file)
        shapes: Mapping[LayerPath, Sequence[int]] = layers if isinstance(layers, Mapping) else {}
        found: dict[LayerPath, LayerState] = {}
        used, unused, labels = list(tokens.values()), dict[str, str](), []
        for root, numbered in pairs.items():
            paths = _known(root, numbered) if layers is None else list(layers)
            order = _order(file, root, numbered, paths, shapes)
            for path, (up, down) in zip(order, numbered, strict=True):
                layer = _layer(file, up, down)
                shape = shapes.get(path)
                fitted = layer if shape is None else fit(layer, shape)
                labels.append(path)
                if fitted is None:
                    mine = (file.tensors[up].shape[0], *file.tensors[down].shape[1:])
                    why = f"would change a weight of {mine}, where the model has {tuple(shape or ())}"
                    unused |= {up: why, down: why}
                    continue
                found[path] = fitted
                used += [up, down]
        learned = {
            name: TokenState({"text_encoder": rows(key, file.tensors[key])}) for name, key in tokens.items()
        }
        taken = {*used, *unused}
        unused |= {name: NO_KIND for name in file.tensors if name not in taken}
        header = {} if file.parts else file.metadata
        notes = [f"with {count(learned, 'token')}: {', '.join(learned)[:200]}"] if learned else []
        return Decoded(
            AdapterState(found, learned, from_header(header)),
            tuple(used),
            unused,
            notes=tuple(notes),
            layers=tuple(labels),
        )

    def obstacle(self, state: AdapterState) -> str | None:
        """See `Codec.obstacle`."""
        return "it is read and not written, since its numbers mean nothing to other tools"

    def encode(self, state: AdapterState) -> TensorFile:
        """See `Codec.encode`."""
        raise cannot_represent(self, state)


def _part_matches(file: TensorFile) -> bool:
    numbered = any(_NUMBERED.fullmatch(name) for name in file.tensors)
    return numbered or (bool(file.tensors) and all(_LISTED.fullmatch(name) for name in file.tensors))


def _layer_parts(file: TensorFile) -> dict[str, TensorFile]:
    return {part: one for part, one in split(file).items() if part != "ti"}


def _pairs(file: TensorFile) -> dict[str, list[Pair]]:
    """Component -> its layers in the file's order.

    Raises:
        FormatError: numbers are missing, or a layer has one tensor.
    """
    numbers: dict[str, dict[int, str]] = {}
    for name in file.tensors:
        if match := _NUMBERED.fullmatch(name):
            place = 2 * int(match["number"]) + (match["part"] == "down")
            numbers.setdefault(match["root"], {})[place] = name
    for part, one in _layer_parts(file).items():
        root = part or ("text_encoder" if _is_text_encoder(file) else "unet")
        for name in one.tensors:
            if match := _LISTED.fullmatch(name):
                numbers.setdefault(root, {})[int(match["number"])] = f"{part}/{name}" if part else name
    for root, places in numbers.items():
        if sorted(places) != list(range(len(places))) or len(places) % 2:
            gap = next(place for place in range(len(places) + 1) if place not in places)
            raise FormatError(
                f"{file.label}: the {'down' if gap % 2 else 'up'} factor of {root} layer {gap // 2} is missing. "
                "Layers have numbers in this dialect, so none may. The file is damaged or was edited."
            )
    return {
        root: [(places[place], places[place + 1]) for place in range(0, len(places), 2)]
        for root, places in numbers.items()
    }


def _is_text_encoder(file: TensorFile) -> bool:
    """Of a list alone: by the name of its file, else by its shapes, which are all alike in a text encoder."""
    if file.path is not None and ".text_encoder" in file.path.name:
        return True
    outs = {
        tensor.shape[0]
        for name, tensor in file.tensors.items()
        if name in ("[0]", "[2]", "[4]", "[6]", "[8]")
    }
    return len(outs) == 1 and file.tensors["[0]"].shape[0] in (768, 1024)


def _tokens(file: TensorFile) -> dict[str, str]:
    """Learned token -> its tensor's name."""
    found = {name: name for name in file.tensors if file.metadata.get(name) == _EMBED}
    if "ti" in file.parts:
        found |= {
            name.removeprefix("ti/"): name
            for name, tensor in file.tensors.items()
            if name.startswith("ti/") and tensor.ndim in (1, 2)
        }
    return found


def _layer(file: TensorFile, up: str, down: str) -> LayerState:
    tensors: dict[str, Tensor] = {"down": file.tensors[down], "up": file.tensors[up]}
    shapes = f"{tuple(tensors['up'].shape)} and {tuple(tensors['down'].shape)}"
    if (
        any(tensor.ndim not in (2, 4) or not tensor.is_floating_point() for tensor in tensors.values())
        or tensors["up"].shape[1] != tensors["down"].shape[0]
        or math.prod(tensors["up"].shape[2:]) != 1
    ):
        raise FormatError(f"{file.label}: {up!r} and {down!r} have shapes {shapes}, which are no factors.")
    rank = tensors["down"].shape[0]
    said = file.metadata.get(f"{up.rpartition(':')[0]}:rank", str(rank))
    if said != str(rank):
        raise FormatError(
            f"{file.label} contradicts itself: rank {said[:20]} of {up!r}, which has rank {rank}."
        )
    return LayerState("lora", rank, float(rank), tensors)


def _known(root: str, pairs: Sequence[Pair]) -> list[LayerPath]:
    """The layers of SD 1 or SD 2, without a base at hand."""
    if root == "unet":
        return [f"unet.{name}" for name in expand(SD_UNET)]
    depth = next((depth for depth in CLIP_DEPTHS.values() if 4 * depth == len(pairs)), 0)
    names = expand(CLIP_TEXT[:1])
    return [f"text_encoder.{name}" for name in names if int(name.split(".")[3]) < depth]


def _order(
    file: TensorFile,
    root: str,
    pairs: Sequence[Pair],
    layers: Sequence[LayerPath],
    shapes: Mapping[LayerPath, Sequence[int]],
) -> list[LayerPath]:
    """The layers that the numbers mean.

    Raises:
        WrongBase: the base has another number of such layers, or none of the orders fits its shapes.
    """
    resnets = root == "unet" and "ResnetBlock2D" in _targets(file, root)
    orders = [
        list(_walk(root, layers, order, resnets)) for order in ((_NEW, _OLD) if root == "unet" else (_NEW,))
    ]
    if len(orders[0]) != len(pairs):
        raise WrongBase(
            f"{file.label} changes {count(len(pairs), 'layer')} of the {root}, by their number; this base has "
            f"{len(orders[0])} of that kind. It is for another base. Not applied."
        )
    fitting = [order for order in orders if _misfits(file, pairs, order, shapes) == 0]
    if not fitting:
        raise WrongBase(
            f"{file.label} numbers its {root} layers, and neither order in use fits the shapes of this base "
            f"({min(_misfits(file, pairs, order, shapes) for order in orders)} of {len(pairs)} do not). It is "
            "for another base. Not applied."
        )
    return fitting[0]


def _targets(file: TensorFile, root: str) -> list[str]:
    """The classes of modules whose layers were changed."""
    try:
        said = json.loads(file.metadata.get(root, "[]"))
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{file.label}: the header entry {root!r} is not valid JSON ({error}).") from error
    return [str(name) for name in said] if isinstance(said, list) else []


def _misfits(
    file: TensorFile,
    pairs: Sequence[Pair],
    order: Sequence[LayerPath],
    shapes: Mapping[LayerPath, Sequence[int]],
) -> int:
    """How many layers do not fit. Without shapes only what every UNet has in common is asked: a GEGLU has eight
    times as many outputs as inputs, and nothing else has."""
    wrong = 0
    for path, (up, down) in zip(order, pairs, strict=True):
        out, inner = file.tensors[up].shape[0], file.tensors[down].shape[1:]
        shape = shapes.get(path)
        if shape is None:
            wrong += path.endswith(".ff.net.0.proj") != (len(inner) == 1 and out == 8 * inner[0])
        else:
            wrong += fit(_layer(file, up, down), shape) is None
    return wrong


def _walk(root: str, layers: Sequence[LayerPath], order: Sequence[str], resnets: bool) -> Iterator[LayerPath]:
    """The layers of a component as the tool met them."""
    mine = [path for path in layers if split_root(path)[0] == root]
    if root != "unet":
        found = [path for path in mine if ".self_attn." in path and path.endswith(_CLIP_ORDER)]
        yield from sorted(found, key=lambda path: (_place(path), _CLIP_ORDER.index(path.rpartition(".")[2])))
        return
    keyed = []
    for path in mine:
        key = _unet_key(path, order, resnets)
        if key is not None:
            keyed.append((key, path))
    yield from (path for _, path in sorted(keyed))


def _unet_key(path: LayerPath, order: Sequence[str], resnets: bool) -> tuple[object, ...] | None:
    """Where a layer comes in the tool's walk; None for one that it does not change."""
    side = (
        ("down_blocks", "up_blocks", "mid_block").index(s)
        if (s := path.split(".")[1])
        in (
            "down_blocks",
            "up_blocks",
            "mid_block",
        )
        else 3
    )
    if match := _TRANSFORMER.fullmatch(path):
        inside = _ATTENTION_ORDER if match["part"] != "ff" else ("net.0.proj",)
        if match["rest"] not in inside:
            return None
        kind, last = 0, (order.index(match["part"]), inside.index(match["rest"]))
    elif resnets and (match := _RESNET.fullmatch(path)):
        kind, last = 1, (_RESNET_ORDER.index(match["rest"]), 0)
    else:
        return None
    # in every block the attentions come before the resnets
    numbers = _place(match["block"])
    level = numbers[:1] if side < 2 else ()
    return (side, level, kind, numbers, last)


def _place(path: LayerPath) -> tuple[int, ...]:
    """The numbers in a layer's path."""
    return tuple(int(part) for part in path.split(".") if part.isdigit())
