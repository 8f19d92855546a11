"""Attach: adapters for people who already have a diffusers pipeline, checked before and proven after.

    report = load_adapter(pipeline, "runs/fox/pytorch_lora_weights.safetensors", strength=0.8)
    ...
    unload_adapters(pipeline)

The pipeline stays diffusers' own; its modules are what adapters go to. A failed load leaves them alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from scumble.adapters import Adapted, Adapter, base_state
from scumble.adapters.biased import delta_of
from scumble.adapters.delta import wide
from scumble.adapters.layers import Place, layers_of, places
from scumble.adapters.names import one_word
from scumble.adapters.operate import Held, shape_of
from scumble.adapters.state import LayerPath, Metadata
from scumble.collector import no_collection
from scumble.errors import AdapterError, NoEffect, NotFinite, UnusedTensors, printable
from scumble.formats.codec import Read, cross_attention_width, read
from scumble.formats.container import PEFT_NAME, WEIGHTS_NAME
from scumble.formats.inspection import is_idle
from scumble.formats.keymap import ROOTS
from scumble.formats.tables.bases import WIDTHS, told_by
from scumble.inference.provenance import Match, Used, compare
from scumble.models.family import BaseModel, fingerprint
from scumble.models.prediction import FLOW_SAMPLED, Flow
from scumble.models.vocabulary import Vocabulary, spelled, vocabulary_of
from scumble.tensor_files.dtypes import word_of

_KEY = "_scumble_attached"
_UNNAMED = (Path(WEIGHTS_NAME).stem, Path(PEFT_NAME).stem)
"""What files are called that take their name from their folder."""
_USUAL = 1e6
"""No product of a family's few factors overflows fp32 below it, and no sound adapter comes near it."""
_FUSED = {"to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj"}
"""What diffusers' attention leaves idle when it is fused."""
_FINGERPRINTS: WeakKeyDictionary[nn.Module, tuple[object, str]] = WeakKeyDictionary()
"""Denoiser -> (which tensors, in which version; their fingerprint): reading a whole UNet takes seconds."""


@dataclass(frozen=True)
class Attached:
    """An adapter in a pipeline, and the account of how it got there."""

    name: str
    adapter: Adapter
    path: Path
    report: str
    """`"applied 128/128 unet layers, 0 unused tensors (alpha absent: using alpha = rank)"`"""
    notes: tuple[str, ...]
    """What the user should know, each a sentence: another base, layers that change nothing, tensors left
    out."""
    match: Match = Match("unknown")  # noqa: RUF009 - a frozen value
    """Whether this is the base that it was trained on."""

    @property
    def strength(self) -> float | Tensor:
        """How strongly it acts: 0 is the bare base, bit for bit; 1 as trained."""
        return self.adapter.strength

    def __str__(self) -> str:
        return "\n".join([f"{self.name}: {self.report}", *(f"note: {note}" for note in self.notes)])


@overload
def load_adapter(
    pipeline: Any,
    path: str | Path,
    strength: float = 1.0,
    name: str | None = None,
    allow_partial: bool = False,
    *,
    quiet: bool = False,
) -> Attached: ...


@overload
def load_adapter(
    pipeline: Any,
    path: Sequence[str | Path],
    strength: float | Sequence[float] = 1.0,
    name: Sequence[str] | None = None,
    allow_partial: bool = False,
    *,
    quiet: bool = False,
) -> tuple[Attached, ...]: ...


@no_collection()
def load_adapter(
    pipeline: Any,
    path: str | Path | Sequence[str | Path],
    strength: float | Sequence[float] = 1.0,
    name: str | Sequence[str] | None = None,
    allow_partial: bool = False,
    *,
    quiet: bool = False,
) -> Attached | tuple[Attached, ...]:
    """Put one adapter, or several at once, into a diffusers pipeline: all or none. Prints a line for each.

    Args:
        pipeline: any pipeline with a `unet` or `transformer`; its text encoders are found too.
        path: a file in any dialect of `formats`, or a folder that holds one; several as a list.
        strength: 0 is the bare base, 1 as trained; a list, or one for all.
        name: how to call it; by default after the file or its folder.
        allow_partial: use what fits when some tensors of the file do not, and say so.
        quiet: print nothing; the account is in what is returned.

    Returns:
        The account of one path, or a tuple of them for a list.

    Raises:
        FormatError: see `formats.read`. Nothing was changed.
        NoEffect: every change in the file is zero. Nothing was changed.
        AdapterError: the name is taken, or the pipeline has no denoiser, or holds adapters of peft's or fused
            attention, beside which this one would not act. Nothing was changed.
    """
    paths = [path] if isinstance(path, str | Path) else list(path)
    strengths = list(strength) if isinstance(strength, Sequence) else [strength] * len(paths)
    roots = roots_of(pipeline)
    there = places(roots, norms=True)
    _refuse_peft(there)
    names = _names(name, paths, there)
    if not paths or len({len(paths), len(strengths), len(names)}) != 1:
        raise AdapterError(
            f"{len(paths)} adapters were given with {len(strengths)} strengths and {len(names)} names; "
            "there must be one of each per adapter."
        )
    shapes = shapes_of(there)
    done: list[Attached] = []
    # everything that can be wrong with files is found before the first layer is touched
    read_in = [read_checked(where, shapes, allow_partial, pipeline, roots) for where in paths]
    for found, _, _ in read_in:
        _refuse_fused({path: there[path] for path in found.state.layers})
    try:
        for (found, match, notes), how_much, called in zip(read_in, strengths, names, strict=True):
            words = vocabularies_of(pipeline)
            adapter = Adapter.load(
                roots,
                found.state,
                name=called,
                strength=how_much,
                vocabularies=words,
                there=there,
                fresh=True,
            )
            done.append(Attached(called, adapter, found.path, f"applied {found.report}", notes, match))
    except BaseException:
        for attached in reversed(done):
            attached.adapter.eject()
        raise
    _remember(roots, done)
    if not quiet:
        for attached in done:
            print(attached)
    return done[0] if isinstance(path, str | Path) else tuple(done)


def unload_adapters(pipeline: Any) -> int:
    """Take out every adapter that `load_adapter` put in, and return how many it was."""
    attached = _attached(roots_of(pipeline))
    still = [one for one in attached if one.adapter.attached]
    for one in reversed(still):
        one.adapter.eject()
    for root in roots_of(pipeline).values():
        root.__dict__.pop(_KEY, None)
    return len(still)


def roots_of(pipeline: Any) -> dict[str, nn.Module]:
    """The modules of a pipeline that adapters go to, under diffusers' names for them; the denoiser first.

    Raises:
        AdapterError: it has no denoiser.
    """
    found = {name: getattr(pipeline, name, None) for name in ROOTS}
    roots = {name: module for name, module in found.items() if isinstance(module, nn.Module)}
    if "unet" not in roots and "transformer" not in roots:
        raise AdapterError(
            f"A {type(pipeline).__name__} has no unet and no transformer: nothing to put an adapter into."
        )
    return roots


def vocabularies_of(pipeline: Any) -> dict[str, Vocabulary]:
    """The words of each text encoder of a pipeline that words are taught to, under diffusers' name for the encoder. A
    third one is SD 3's T5, which learns none."""
    names = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}
    found = {
        encoder: getattr(pipeline, words, None)
        for encoder, words in names.items()
        if isinstance(getattr(pipeline, encoder, None), nn.Module)
    }
    return {encoder: vocabulary_of(words) for encoder, words in found.items() if words is not None}


def _refuse_peft(there: Mapping[LayerPath, Place]) -> None:
    if any(path.endswith(".base_layer") for path in there):
        raise AdapterError(
            "This pipeline already holds adapters that diffusers loaded through peft. Take them out first: "
            "pipeline.unload_lora_weights()."
        )


def _refuse_fused(there: Mapping[LayerPath, Place]) -> None:
    """Refuse attention that computes q, k and v in one product (`fuse_qkv_projections`): diffusers keeps the layers
    that adapters change beside it, and nobody calls them."""
    idle = next(
        (
            path
            for path, place in there.items()
            for parent, name in place.slots
            if name in _FUSED and _is_fused(parent)
        ),
        None,
    )
    if idle is not None:
        raise AdapterError(
            f"This pipeline's attention is fused (fuse_qkv_projections), so that nothing calls {idle!r} and an adapter "
            "there would do nothing. Call pipeline.unfuse_qkv_projections() first; unload adapters before you fuse."
        )


def _is_fused(attention: nn.Module) -> bool:
    if not getattr(attention, "fused_projections", False):
        return False
    # diffusers' first class of attention keeps the mark when it is taken apart again: its processor tells
    processor = getattr(attention, "processor", None)
    return type(attention).__name__ != "Attention" or type(processor).__name__.startswith("Fused")


def _names(
    name: str | Sequence[str] | None, paths: Sequence[str | Path], there: Mapping[LayerPath, Place]
) -> list[str]:
    if name is not None:
        return [name] if isinstance(name, str) else list(name)
    adapted = [holder for place in there.values() if isinstance(holder := place.holder, Adapted)]
    names: list[str] = []
    for path in map(Path, paths):
        whole = path.resolve()
        stem = whole.name if whole.is_dir() else whole.parent.name if whole.stem in _UNNAMED else whole.stem
        called, number = stem or "adapter", 2
        while called in names or any(called in module for module in adapted):
            called, number = f"{stem or 'adapter'}-{number}", number + 1
        names.append(called)
    return names


def shapes_of(there: Mapping[LayerPath, Place]) -> dict[LayerPath, tuple[int, ...]]:
    """The shape of every layer's weight."""
    return {path: shape_of(place.layer) for path, place in there.items()}


def read_checked(
    path: str | Path,
    shapes: Mapping[LayerPath, tuple[int, ...]],
    allow_partial: bool,
    pipeline: Any,
    roots: Mapping[str, nn.Module],
    base: BaseModel | None = None,
) -> tuple[Read, Match, tuple[str, ...]]:
    """The file, whether the base is the one that it was trained on, and what its user should know of both.

    Args:
        path: as for `load_adapter`.
        shapes: `shapes_of` the model's layers.
        allow_partial: as for `load_adapter`.
        pipeline: as for `load_adapter`.
        roots: the modules that adapters go to, the denoiser first.
        base: what the pipeline was made of, where that is known.

    Raises:
        FormatError: see `formats.read`; WrongBase also where the file names another family than the base's.
        NoEffect: every change in the file is zero.
        NotFinite: a tensor holds NaN or infinity, or their products come to it.
    """
    try:
        found = read(path, shapes, allow_partial=allow_partial)
    except UnusedTensors as error:
        if not error.usable:
            raise
        raise UnusedTensors(
            f"{error} To draw with the other {error.usable}: scumble generate --allow-partial, in Python "
            "allow_partial=True.",
            error.usable,
        ) from None
    idle = [layer for layer, state in found.state.layers.items() if is_idle(state)]
    if len(idle) == len(found.state.layers) and not found.state.tokens:
        raise NoEffect(
            f"{found.path.name} has no numerical effect: the change is zero in all {len(idle)} layers. It "
            "was saved before its first training step, or its alpha is 0. Not applied."
        )
    if not found.largest < _USUAL or any(abs(state.scale) > _USUAL for state in found.state.layers.values()):
        _refuse_overflow(found, roots)
    notes = []
    if idle:
        notes.append(
            f"{len(idle)} of {len(found.state.layers)} layers have a change of zero, first {idle[0]!r}."
        )
    if found.unused:
        notes.append(f"{len(found.unused)} tensors were left out, first {found.unused[0]!r}.")
    notes += [
        f"Write {one_word(name)!r} in a prompt for the file's token {name!r}: a word has no blanks."
        for name in found.state.tokens
        if one_word(name) != name
    ]
    several = [
        name for name, token in found.state.tokens.items() if len(next(iter(token.vectors.values()))) > 1
    ]
    if several and base is None and not hasattr(pipeline, "maybe_convert_prompt"):
        word = one_word(several[0])
        written = " ".join(spelled(word, len(next(iter(found.state.tokens[several[0]].vectors.values())))))
        notes.append(
            f"A {type(pipeline).__name__} doesn't spell words of several vectors: write {written!r} where you mean "
            f"{word!r}."
        )
    said = found.state.metadata
    scheduler = getattr(pipeline, "scheduler", None)
    prediction = getattr(getattr(scheduler, "config", None), "prediction_type", "")
    prediction = Flow.name if prediction == FLOW_SAMPLED else prediction
    if said.prediction_type and prediction and said.prediction_type != prediction:
        notes.append(
            f"It was trained on a base that predicts {said.prediction_type}; this pipeline's scheduler "
            f"says {prediction}."
        )
    match = compare(said, _used(said, shapes, pipeline, roots, base))
    notes += [match.note] if match.note else []
    return found, match, tuple(map(printable, notes))


@torch.no_grad()
def _refuse_overflow(found: Read, roots: Mapping[str, nn.Module]) -> None:
    """Refuse finite numbers whose products are not."""
    layers = layers_of(roots, norms=True)
    for path, state in found.state.layers.items():
        weight = layers[path].weight
        delta = delta_of(layers[path], state)
        if not bool(delta.weight_delta(weight.to(wide(weight.dtype))).isfinite().all()):
            raise NotFinite(
                f"{found.path.name} can't be used: its numbers are finite, but so large that the change which they "
                f"make to {path!r} is not. The training diverged: take an earlier checkpoint. Not applied."
            )


def _used(
    said: Metadata,
    shapes: Mapping[LayerPath, tuple[int, ...]],
    pipeline: Any,
    roots: Mapping[str, nn.Module],
    base: BaseModel | None,
) -> Used:
    """The base in the pipeline, as far as it is known. Its weights are read only where the file says its own's."""
    if base is not None:
        name, family = base.name, base.family
    else:
        width = cross_attention_width(shapes)
        name = str(getattr(getattr(pipeline, "config", None), "_name_or_path", None) or "")
        family = WIDTHS[width][0] if width in WIDTHS else told_by(shapes)
    if not said.base_fingerprint:
        return Used(name, family)
    denoiser = next(iter(roots.values()))
    weight = next(denoiser.parameters())
    if weight.is_meta:
        return Used(name, family, why="its weights are offloaded")
    # rounded to bf16, or held in few bits, the weights have lost what the fingerprint is made of; a loaded base took it
    # before
    held = next((part.held_in for part in denoiser.modules() if isinstance(part, Held)), "")
    if not held and weight.dtype in (torch.float16, torch.float32, torch.float64):
        return Used(name, family, _fingerprint(denoiser))
    if base is not None:
        return Used(name, family, base.fingerprint())
    if held:
        return Used(name, family, why=f"they are held in {held}")
    word = word_of(weight.dtype)
    return Used(
        name, family, why=f"they are rounded to {word} (load the pipeline in float16 or float32 to compare)"
    )


def _fingerprint(denoiser: nn.Module) -> str:
    state = base_state(denoiser)
    # a tensor made in inference mode counts no versions
    version = tuple((t.data_ptr(), 0 if t.is_inference() else t._version) for t in state.values())
    known = _FINGERPRINTS.get(denoiser)
    if known is None or known[0] != version:
        known = _FINGERPRINTS[denoiser] = (version, fingerprint(state))
    return known[1]


def _remember(roots: Mapping[str, nn.Module], done: Sequence[Attached]) -> None:
    """Keep the list on the denoiser itself: pipelines that share it share the list, and it dies with it."""
    denoiser = next(iter(roots.values()))
    denoiser.__dict__[_KEY] = (*denoiser.__dict__.get(_KEY, ()), *done)


def _attached(roots: Mapping[str, nn.Module]) -> tuple[Attached, ...]:
    return tuple(one for root in roots.values() for one in root.__dict__.get(_KEY, ()))
