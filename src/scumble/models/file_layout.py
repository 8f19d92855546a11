"""File layout: how a family's single files name their components, and what is told of each by its shapes.

A family whose files hold one transformer, and with it all, some or none of the other components, writes its layout
down as a table (`single_file` of the family). What a file lacks can come from another base (see `loading`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from scumble.errors import ModelError
from scumble.models import FAMILIES
from scumble.models.configs import Configs
from scumble.models.shapes import Shapes, clip_config, t5_config, vae_config, within
from scumble.tensor_files.header import Header

if TYPE_CHECKING:
    from torch import Tensor

    from scumble.models.marks import Mark

HABIT = ("logit_scale", "position_ids", "text_projection.weight", "encoder.embed_tokens.weight")
"""Ends of names that other tools write beside what is needed, and that no model has a place for: what they say is
computed, or is in another tensor."""

QUANTIZED = (".scale_weight", ".weight_scale", "scaled_fp8", ".comfy_quant", ".absmax", ".quant_map")
"""Ends of names that only a quantized file has: its weights mean nothing without them."""

TAKE_FROM = (
    "what a file lacks is taken from another base: name a folder in diffusers' layout, or a Hub id, as rest "
    '(rest="FOLDER", or --rest FOLDER), or put the file into such a folder'
)


def _as_they_are(marks: dict[str, Mark], config: Mapping[str, Any]) -> dict[str, Mark]:
    return marks


def _nothing(config: Mapping[str, Any]) -> Mapping[str, Tensor]:
    return {}


@dataclass(frozen=True)
class FilePart:
    """One component, as single files hold it."""

    name: str
    """In diffusers' layout: "text_encoder"."""
    title: str
    """What people call it: "CLIP-L"."""
    kind: str
    """Its class in diffusers or transformers."""
    prefixes: tuple[str, ...]
    """Beginnings of its tensors' names, one of which a file uses. "" leaves out what belongs to other components."""
    sign: str
    """How a name begins, after the prefix, that only it has."""
    config: Callable[[Shapes], dict[str, Any]]
    """Shapes, after the prefix -> its config. KeyError: a tensor is not there."""
    convert: Callable[[dict[str, Mark], Mapping[str, Any]], dict[str, Mark]] = _as_they_are
    """(Marks after the prefix, config) -> the same by the names of `kind`."""
    fixed: Callable[[Mapping[str, Any]], Mapping[str, Tensor]] = _nothing
    """Config -> weights that no file holds."""
    optional: bool = False
    """A base can do without."""


@dataclass(frozen=True)
class FileLayout:
    """How a family's single files are laid out."""

    title: str
    """What people call its bases: "Flux.1"."""
    pipeline: str
    """diffusers' class name."""
    parts: tuple[FilePart, ...]
    """The denoiser first."""
    words: Mapping[str, tuple[str, Mapping[str, Any]]]
    """Tokenizer -> (the text encoder that it is for, its config)."""
    scheduler: Callable[[Mapping[str, Any]], dict[str, Any]] = field(repr=False)
    """The denoiser's config -> the scheduler's."""

    def claims(self, shapes: Shapes) -> bool:
        """Whether a file with these tensors is one of this family."""
        return self.prefix(self.parts[0], shapes) is not None

    def prefix(self, part: FilePart, shapes: Shapes) -> str | None:
        """How the names of a component begin in a file; None where it holds none of it."""
        return next(
            (begin for begin in part.prefixes if any(key.startswith(begin + part.sign) for key in shapes)),
            None,
        )

    def own(self, part: FilePart, shapes: Shapes) -> dict[str, tuple[int, ...]]:
        """The tensors of a component that the file holds, without what their names begin with."""
        prefix = self.prefix(part, shapes)
        if prefix is None:
            return {}
        others = tuple(begin for other in self.parts for begin in other.prefixes if begin and not prefix)
        return within({key: shape for key, shape in shapes.items() if not key.startswith(others)}, prefix)

    def configs(self, header: Header, name: str) -> Configs:
        """The configs of a file of this family, told from its header alone.

        Raises:
            ModelError: a tensor is not where this family has it, or the file is quantized.
        """
        shapes = header.shapes
        _refuse_quantized(shapes, name)
        parts: dict[str, Mapping[str, Any]] = {}
        lacking: dict[str, str] = {}
        count = {}
        for part in self.parts:
            own = self.own(part, shapes)
            if own:
                try:
                    parts[part.name] = part.config(own)
                except (KeyError, IndexError, ValueError) as error:
                    raise self._otherwise(part, name, error) from error
                count[part.name] = sum(math.prod(shape) for shape in own.values())
                continue
            lacking[part.name] = (
                "" if part.optional else f"the {part.title} ({part.prefixes[0]}...) in the file"
            )
            if not part.optional:
                parts[part.name] = {"_class_name": part.kind}
        for words, (encoder, config) in self.words.items():
            if encoder in parts:
                parts[words] = dict(config)
            else:
                lacking[words] = ""
        parts["scheduler"] = self.scheduler(parts[self.parts[0].name])
        return Configs(
            name,
            self.pipeline,
            parts,
            phrases(lacking),
            (),
            count,
            header.dtype,
            lacking=lacking,
        )

    def _otherwise(self, part: FilePart, name: str, error: Exception) -> ModelError:
        what = f"there is no {error}" if isinstance(error, KeyError) else str(error)
        return ModelError(
            f"{name} is not laid out as {self.title}'s files are: in the {part.title}, {what}. "
            "The file is not whole, or another tool's; if diffusers can load it, save it as a folder with "
            "save_pretrained and name that folder."
        )

    def marks(self, shapes: Shapes, name: str) -> dict[str, dict[str, Mark]]:
        """Component -> tensor, by the name that diffusers has for it -> where it is in the file.

        Raises:
            ModelError: as `configs`.
        """
        from scumble.models.marks import marks_of

        found = {}
        every = marks_of(shapes)
        for part in self.parts:
            prefix, own = self.prefix(part, shapes), self.own(part, shapes)
            if prefix is None:
                continue
            try:
                found[part.name] = part.convert({key: every[prefix + key] for key in own}, part.config(own))
            except (KeyError, IndexError, ValueError) as error:
                raise self._otherwise(part, name, error) from error
        return found


def layout_of(shapes: Shapes) -> FileLayout | None:
    """The layout of the family whose file has these tensors; None where no family says that it is its own."""
    for _, family in FAMILIES.working():
        layout: FileLayout | None = getattr(family, "single_file", None)
        if layout is not None and layout.claims(shapes):
            return layout
    return None


def phrases(lacking: Mapping[str, str]) -> tuple[str, ...]:
    """What has to be there and is not, with the next step: for `Configs.missing`."""
    needed = [phrase for phrase in lacking.values() if phrase]
    return (*needed[:-1], f"{needed[-1]}; {TAKE_FROM}") if needed else ()


def _refuse_quantized(shapes: Shapes, name: str) -> None:
    marks = [key for key in shapes if key.endswith(QUANTIZED) or "bitsandbytes__" in key]
    if marks:
        raise ModelError(
            f"{name} is quantized ({len(marks)} tensors as {marks[0]} say so): its weights are not read here. Use the "
            "file in bf16, fp16 or plain fp8."
        )


def unread(shapes: Shapes, marks: Mapping[str, Mapping[str, Mark]]) -> tuple[str, ...]:
    """What there is to say of tensors that go nowhere."""
    read = {mark.name for part in marks.values() for mark in part.values()}
    left = sorted(key for key in shapes if key not in read and not key.endswith(HABIT))
    return (f"{len(left)} tensors of the file are read by nothing, e.g. {left[0]}.",) if left else ()


def clip_part(
    name: str, title: str, prefix: str, *, projected: bool = False, fixed: bool = False
) -> FilePart:
    """A CLIP text encoder in transformers' own names.

    `projected`: its pooled embedding goes through a projection, and its activation is OpenCLIP's. `fixed`: it goes
    through one that leaves it as it is, whatever the file holds, as SD 3 has it.
    """
    kind = "CLIPTextModelWithProjection" if projected or fixed else "CLIPTextModel"
    projection = "text_projection.weight"

    def config(s: Shapes) -> dict[str, Any]:
        told = clip_config(within(s, "text_model."), kind, activation="gelu" if projected else "quick_gelu")
        return {**told, "projection_dim": s[projection][0]} if projected else told

    def convert(marks: dict[str, Mark], config: Mapping[str, Any]) -> dict[str, Mark]:
        kept = {key: mark for key, mark in marks.items() if key.startswith("text_model.")}
        kept.pop("text_model.embeddings.position_ids", None)
        return {**kept, projection: marks[projection]} if projected else kept

    def identity(config: Mapping[str, Any]) -> Mapping[str, Tensor]:
        import torch

        return {projection: torch.eye(config["hidden_size"])} if fixed else {}

    sign = "text_model.embeddings.token_embedding.weight"
    return FilePart(name, title, kind, (prefix,), sign, config, convert, identity)


def t5_part(name: str, *, optional: bool = False) -> FilePart:
    """T5's encoder in transformers' own names."""

    def convert(marks: dict[str, Mark], config: Mapping[str, Any]) -> dict[str, Mark]:
        kept = {key: mark for key, mark in marks.items() if key.startswith(("encoder.", "shared."))}
        kept.pop("encoder.embed_tokens.weight", None)  # it is `shared`
        return kept

    return FilePart(
        name,
        "text encoder T5",
        "T5EncoderModel",
        ("text_encoders.t5xxl.transformer.",),
        "shared.weight",
        t5_config,
        convert,
        optional=optional,
    )


def vae_part(**constants: Any) -> FilePart:
    """A VAE in CompVis' names, with what shapes don't tell of it."""

    def config(s: Shapes) -> dict[str, Any]:
        asked = {"use_quant_conv": "quant_conv.weight", "use_post_quant_conv": "post_quant_conv.weight"}
        return vae_config(s, **{option: tensor in s for option, tensor in asked.items()}, **constants)

    def convert(marks: dict[str, Mark], config: Mapping[str, Any]) -> dict[str, Mark]:
        from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

        converted: dict[str, Mark] = convert_ldm_vae_checkpoint(marks, config)
        return converted

    return FilePart(
        "vae",
        "VAE",
        "AutoencoderKL",
        ("first_stage_model.", "vae."),
        "decoder.conv_in.weight",
        config,
        convert,
    )
