"""Codec: one file format, two directions. `read` and `write` choose one, and check what none may forget.

Laws (tests/laws/test_codecs.py): `decode(encode(s), layers of s).state == s`, or `encode` raises
CannotRepresent; every tensor is used, unused or ignored, and none is two of these; a file that two codecs
claim is an error.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from scumble.adapters.shapes import weight_shape
from scumble.adapters.state import AdapterState, LayerPath, surveyed
from scumble.errors import (
    CannotRepresent,
    FormatError,
    NotFinite,
    UnknownFormat,
    UnusedTensors,
    WrongBase,
    printable,
)
from scumble.formats.container import (
    PICKLES,
    TENSOR_LIMIT,
    WEIGHTS_NAME,
    TensorFile,
    files_of,
    find,
    load,
    read_header,
    save,
    save_text,
    split,
)
from scumble.formats.keymap import ROOTS, split_root
from scumble.formats.pairs import NO_LAYER, Decoded, count, refuse_unsupported
from scumble.formats.seal import sealed
from scumble.formats.stored import Stored
from scumble.formats.tables.bases import TITLES, WIDTHS, told_by
from scumble.registry import Registry
from scumble.tensor_files.dtypes import word_of

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class Codec(Protocol):
    """A file format plug-in: one file in `formats/`, one line in the registry."""

    name: str
    """What users type after `--save-as`."""
    # A codec may have `file_name: str`, what its readers look for in a folder; it then writes folders only. And
    # `read_only: bool`, when it writes nothing; and `diffusers_reads = False`: model cards then name another way
    # to load the file.

    def matches(self, file: TensorFile) -> bool:
        """Whether this codec reads `file`, told from names and shapes alone (tensors may be meta tensors)."""

    def decode(self, file: TensorFile, layers: Collection[LayerPath] | None) -> Decoded:
        """The adapter in `file`. `layers` are the base's layer paths, as a mapping with the shapes of their
        weights; None believes every name.

        Raises:
            FormatError: the file contradicts itself, or holds a family that this version does not know.
        """

    def obstacle(self, state: AdapterState) -> str | None:
        """Why this format can't hold `state`, or None when it can."""

    def encode(self, state: AdapterState) -> TensorFile:
        """The inverse of `decode`.

        Raises:
            CannotRepresent: `obstacle(state)` is not None.
        """


CODECS: Registry[type[Codec]] = Registry(
    "file format",
    {
        "diffusers": "scumble.formats.diffusers:Diffusers",
        "attention-processors": "scumble.formats.attention_processors:AttentionProcessors",
        "lycoris": "scumble.formats.lycoris:Lycoris",
        "kohya": "scumble.formats.kohya:Kohya",
        "peft": "scumble.formats.peft:Peft",
        "cloneofsimo": "scumble.formats.cloneofsimo:Cloneofsimo",
        "comfyui": "scumble.formats.comfyui:ComfyUI",
        "kohya-flux": "scumble.formats.flux:FluxKohya",
        "bfl": "scumble.formats.flux:Bfl",
        "xlabs": "scumble.formats.flux:XLabs",
        "embedding": "scumble.formats.embedding:Embedding",
    },
)

_USUAL = ("diffusers", "lycoris")
"""The dialects that a file is written in when none is named, the first that can hold it."""

_FOREIGN: tuple[tuple[str, str], ...] = (
    (r"(model\.diffusion_model|first_stage_model|cond_stage_model)\.", "a whole Stable Diffusion checkpoint"),
    (r"base_model\.model\.", "a peft adapter (adapter_model.safetensors)"),
    (
        r"(lora_unet|lora_te[12]?|oft_unet|oft_te|lycoris)_",
        "a kohya or LyCORIS adapter of another family than LoRA",
    ),
    (r"(lora_transformer|lora_te3|lora_prior)_", "a kohya adapter for another kind of base"),
    (r"(diffusion_model|text_encoders\.\w+)\.", "an adapter in ComfyUI's naming"),
    (r"(input_blocks|middle_block|output_blocks)\.", "an adapter in the naming of the original SD code"),
    (r"(unet|text_encoder):\d+:(up|down)$", "a cloneofsimo/lora adapter"),
    (
        r"(conv_in|conv_out|time_embedding|down_blocks|up_blocks|mid_block)\.(?!.*lora)",
        "a whole UNet, not an adapter",
    ),
)


Layers: TypeAlias = Collection[LayerPath] | Mapping[LayerPath, Any]
"""Layer paths of a base. As a mapping to modules with a `.weight`, or to shapes, those are checked."""


@dataclass(frozen=True)
class Read:
    """An adapter read from a file, and an account of the file."""

    state: AdapterState
    dialect: str
    """Name of the codec."""
    path: Path
    """The file itself, also when a folder was given; the folder of an adapter in parts."""
    used: tuple[str, ...]
    """Names of the tensors that are in `state`."""
    unused: tuple[str, ...]
    """Names of the tensors that are not; not empty only under `allow_partial`."""
    notes: tuple[str, ...]
    """What was assumed or left aside, for people."""
    report: str
    """`"128/128 unet layers, 0 unused tensors (alpha absent: using alpha = rank)"`"""
    files: tuple[Path, ...] = ()
    """All its files: more than one of an adapter in parts."""
    largest: float = 0.0
    """What no number in it exceeds in size; infinity where that was not asked."""


def detect(path: str | Path) -> str:
    """The name of the codec that reads the file at `path`. Looks at the header only.

    Raises:
        UnknownFormat: none does, or several do.
        FormatError: it is no sound safetensors file.
    """
    return _codec_for(read_header(find(path))).name


def read(
    path: str | Path, layers: Layers | None = None, *, allow_partial: bool = False, stored: bool = False
) -> Read:
    """Read the adapter at `path` (a file, or a folder that holds one) for a base that has `layers`.

    Without `layers` every name is believed: for conversions and for looking at files. `allow_partial` drops
    what does not fit the base, and says so in the report. `stored` leaves the tensors as they lie in the file (see
    `stored.py`), for those who do not compute with them: torch is then not imported.

    Raises:
        UnknownFormat: no codec claims the file, or several do.
        WrongBase: its shapes are those of another family of bases.
        UnusedTensors: tensors match no layer, or not its shape, and `allow_partial` is False.
        NotFinite: a tensor holds NaN or infinity.
        FormatError: the file is damaged, contradicts itself, holds an unknown family, or nothing fits.
    """
    where = find(path)
    claims: list[Codec] = []
    # before a whole checkpoint of several GB is read
    file = load(where, lambda header: claims.append(_codec_for(header)), stored=stored)
    codec = claims[0]
    largest = _refuse_non_finite(file.tensors, f"{where.name} can't be used")
    shapes = _shapes(layers) if isinstance(layers, Mapping) else {}
    decoded = codec.decode(file, shapes or layers)
    decoded = replace(decoded, notes=tuple(map(printable, decoded.notes)))
    # the wrong base explains unused tensors better than their list does
    whole = _believed(codec, file, decoded) if decoded.unused else decoded
    _refuse_wrong_base(whole.state, shapes)
    _refuse_unused(decoded, codec, shapes, allow_partial)
    return Read(
        decoded.state,
        codec.name,
        where,
        decoded.used,
        tuple(decoded.unused),
        decoded.notes,
        _report(decoded),
        tuple(files_of(where).values()),
        largest,
    )


def write(
    state: AdapterState, path: str | Path, dialect: str | None = None, dtype: torch.dtype | None = None
) -> Path:
    """Write `state` as `dialect`, in one atomic step; equal states give equal bytes. Returns the file's path.
    Without `dialect` it is diffusers', or another that holds the adapter where that one does not.

    `path` is a .safetensors file, or a folder, where the file is called as its readers expect. A dialect of
    several files makes a folder of that name, and its path is returned. `dtype` casts the tensors, None keeps
    them as they are; alphas keep their precision.

    Raises:
        CannotRepresent: the dialect can't hold this adapter; the text names those that can.
        NotFinite: a tensor holds NaN or infinity, or does so after the cast.
        FormatError: there is nothing to write, or the disk refuses.
    """
    path = Path(path)
    if path.suffix.lower() in PICKLES:
        raise FormatError(f"{path.name} would be a pickle; adapters are written as .safetensors only.")
    if not state.layers and not state.tokens:
        raise FormatError("The adapter holds no layers: there is nothing to write.")
    codec = CODECS.get(dialect or dialect_for(state))()
    _refuse_non_finite(_tensors(state), "refusing to save")
    if dtype is not None:
        state = _cast(state, dtype)
        word = word_of(dtype)
        said = f"refusing to save: too large for {word}, take bfloat16 or float32"
        _refuse_non_finite(_tensors(state), said)
    file = codec.encode(state)
    folder = getattr(codec, "file_name", None)
    if folder is None and path.suffix.lower() == ".safetensors":
        save(sealed(file), path)
        return path
    if path.suffix.lower() == ".safetensors":  # a dialect whose adapters are folders
        path = path.with_suffix("")
    for part, one in split(file).items():
        for name, text in one.beside.items():
            save_text(text, path / part / name)
        save(sealed(one), path / part / (folder or WEIGHTS_NAME))
    return path if file.parts else path / (folder or WEIGHTS_NAME)


def _tensors(state: AdapterState) -> dict[str, Tensor]:
    tensors = {
        f"{path}.{name}": t for path, layer in state.layers.items() for name, t in layer.tensors.items()
    }
    return tensors | {
        f"{n}.{root}": t for n, token in state.tokens.items() for root, t in token.vectors.items()
    }


def _cast(state: AdapterState, dtype: torch.dtype) -> AdapterState:
    def cast(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor.to(dtype) for name, tensor in tensors.items()}

    return replace(
        state,
        layers={path: replace(layer, tensors=cast(layer.tensors)) for path, layer in state.layers.items()},
        tokens={name: replace(token, vectors=cast(token.vectors)) for name, token in state.tokens.items()},
    )


def dialect_for(state: AdapterState) -> str:
    """The dialect that `state` is written in when none is named.

    Raises:
        CannotRepresent: no dialect holds it.
    """
    order = (*_USUAL, *(name for name in CODECS if name not in _USUAL))
    able = next((name for name in order if CODECS.get(name)().obstacle(state) is None), None)
    if able is None:
        raise cannot_represent(CODECS.get(_USUAL[0])(), state)
    return able


def _believed(codec: Codec, file: TensorFile, decoded: Decoded) -> Decoded:
    """The file's content without a base; what the base made of it where the dialect can't do without one."""
    try:
        return codec.decode(file, None)
    except WrongBase:
        return decoded


def written() -> tuple[str, ...]:
    """The names of the formats that are written; the others are read only."""
    return tuple(name for name, kind in CODECS.working() if not getattr(kind, "read_only", False))


def cannot_represent(codec: Codec, state: AdapterState) -> CannotRepresent:
    """The error for `encode`: why `codec` can't hold `state`, and which formats can."""
    able = [name for name, kind in CODECS.working() if kind().obstacle(state) is None]
    advice = f"Write it as {' or '.join(able)}." if able else "No format of this version can hold it."
    return CannotRepresent(
        f"The format {codec.name} can't hold this adapter: {codec.obstacle(state)}. {advice}"
    )


def cross_attention_width(shapes: Mapping[LayerPath, Sequence[int]]) -> int | None:
    """The width of the text that a UNet's cross-attention reads, from shapes (any, in) by layer path; else None."""
    for path, shape in shapes.items():
        # the second attention of a transformer (SD 3.5 medium) is no cross-attention
        if path.endswith((".attn2.to_k", ".attn2.to_v")) and not path.startswith("transformer."):
            return shape[1]
    return None


def down_shapes(state: AdapterState) -> dict[LayerPath, tuple[int, ...]]:
    """Shapes (any, in[, k, k]) of the weights that the layers change, where their tensors tell."""
    shapes = {path: weight_shape(layer) for path, layer in state.layers.items()}
    return {path: shape for path, shape in shapes.items() if shape is not None and any(shape[1:2])}


def base_title(width: int | None, family: str = "") -> str | None:
    """What base it is: `"SD 1.x (cross-attention 768)"`, `"cross-attention 320"`, or by its family's name;
    else None."""
    if width in WIDTHS:
        return f"{WIDTHS[width][1]} (cross-attention {width})"
    return f"cross-attention {width}" if width is not None else TITLES.get(family)


def _codec_for(file: TensorFile) -> Codec:
    if not file.tensors:
        raise UnknownFormat(f"{file.label} holds no tensors.")
    if len(file.tensors) > TENSOR_LIMIT:
        raise UnknownFormat(
            f"{file.label} holds {len(file.tensors)} tensors; no adapter has more than {TENSOR_LIMIT}."
        )
    claims = [codec for _, kind in CODECS.working() if (codec := kind()).matches(file)]
    if len(claims) == 1:
        return claims[0]
    if claims:
        names = ", ".join(codec.name for codec in claims)
        raise UnknownFormat(
            f"{file.label} is claimed by {len(claims)} formats: {names}. It was not used. Put the tensors of each into "
            "a file of their own, and load these together."
        )
    refuse_unsupported(file.tensors)
    reads = f"This version reads: {', '.join(CODECS)}."
    kinds = Counter(title for name in file.tensors for pattern, title in _FOREIGN if re.match(pattern, name))
    if kinds:
        raise UnknownFormat(
            f"{file.label} looks like {kinds.most_common(1)[0][0]}, which is not read. {reads}"
        )
    raise UnknownFormat(
        f"{file.label} is no adapter that is known here. {reads} It holds {count(file.tensors, 'tensor')}, "
        f"for instance {', '.join(_short(name) for name in sorted(file.tensors)[:3])}."
    )


def _refuse_non_finite(tensors: Mapping[str, Tensor], what: str) -> float:
    """What no number exceeds; infinity where they are left as they lie."""
    everything: Mapping[str, object] = tensors
    as_they_lie = {name: tensor for name, tensor in everything.items() if isinstance(tensor, Stored)}
    others = {name: t for name, t in tensors.items() if name not in as_they_lie} if as_they_lie else tensors
    strange, largest = surveyed(others)
    broken = [name for name, tensor in as_they_lie.items() if not tensor.finite()] + strange
    if broken:
        raise NotFinite(
            f"{what}: {len(broken)} of {count(tensors, 'tensor')} not finite (NaN or infinity), "
            f"first {_short(broken[0])}."
        )
    return math.inf if as_they_lie else largest


def _shapes(layers: Mapping[LayerPath, Any]) -> dict[LayerPath, tuple[int, ...]]:
    return {
        path: tuple(value.weight.shape if hasattr(value, "weight") else value)
        for path, value in layers.items()
    }


def _refuse_wrong_base(state: AdapterState, shapes: Mapping[LayerPath, Sequence[int]]) -> None:
    model = cross_attention_width(shapes)
    mine, family = (
        cross_attention_width(down_shapes(state)),
        told_by(state.layers) or state.metadata.base_family,
    )
    if model is None:
        own = told_by(shapes)
        family = WIDTHS[mine][0] if mine in WIDTHS else family
        if own and family in TITLES and family != own:
            raise WrongBase(f"LoRA is for {base_title(mine, family)}; model is {TITLES[own]}. Not applied.")
        return
    if mine is not None:  # noqa: SIM108 - one line would hide the comment
        wrong = mine != model
    else:  # no cross-attention in the file: believe its header, if both are well-known families
        wrong = family in TITLES and model in WIDTHS and WIDTHS[model][0] != family
    if wrong:
        title = f"{WIDTHS[model][1]} ({model})" if model in WIDTHS else f"cross-attention {model}"
        raise WrongBase(f"LoRA is for {base_title(mine, family)}; model is {title}. Not applied.")


def _refuse_unused(
    decoded: Decoded, codec: Codec, shapes: Mapping[LayerPath, Sequence[int]], allow_partial: bool
) -> None:
    something = decoded.state.layers or decoded.state.tokens
    if something and (allow_partial or not decoded.unused):
        return
    reasons = Counter(decoded.unused.values())
    total = len(decoded.unused) + len(decoded.used) + len(decoded.ignored)
    lines = [f"{number} of {total} tensors {reason}." for reason, number in reasons.most_common(6)]
    if len(reasons) > 6:
        lines.append(f"{sum(reasons.values()) - sum(n for _, n in reasons.most_common(6))} more do not fit.")
    model = base_title(cross_attention_width(shapes))
    lines.append(f"File dialect: {codec.name}." + (f" Model: {model}." if model else ""))
    there = {split_root(path)[0] for path in shapes}
    strange = sorted({split_root(name)[0] for name in decoded.layers} - there) if there else []
    if strange:
        what = " (a diffusion transformer such as Flux or SD 3)" if "transformer" in strange else ""
        lines.append(
            f"The file speaks of {', '.join(strange)}{what}; the model has {', '.join(sorted(there))}."
        )
    shown = sorted(decoded.unused, key=lambda name: decoded.unused[name] != NO_LAYER)[:3]
    lines.append(f"First {len(shown)} unmatched: {', '.join(_short(name) for name in shown)}.")
    if not something:
        raise UnusedTensors(" ".join([*lines, "Nothing matched: not applied."]))
    raise UnusedTensors(" ".join([*lines, "Not applied."]), len(decoded.used))


def _report(decoded: Decoded) -> str:
    """One line: layers found per root (tokens, where there is no layer), tensors left over, what was assumed."""
    claimed = Counter(split_root(spelled)[0] for spelled in decoded.layers)
    found = Counter(split_root(path)[0] for path in decoded.state.layers)
    parts = [f"{found[root]}/{claimed[root]} {root} layers" for root in ROOTS if claimed[root]]
    if decoded.state.tokens and not parts:
        parts = [count(decoded.state.tokens, "token")]
    notes = list(decoded.notes)
    if decoded.ignored:
        notes.append(f"{count(decoded.ignored, 'tensor')} of this dialect without content")
    line = ", ".join([*parts, count(len(decoded.unused), "unused tensor")])
    return line + (f" ({'; '.join(notes)})" if notes else "")


def _short(name: str) -> str:
    return repr(name if len(name) <= 120 else name[:117] + "...")
