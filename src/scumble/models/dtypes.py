"""Dtypes: what each component of a base is kept in and computes in, where that is not one dtype for all.

A denoiser in bf16 beside a VAE in fp32, say. What one component gives another takes in its own dtype; diffusers'
pipelines expect one dtype throughout, and are told here what to hand on.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from scumble.errors import ModelError, UnknownName, did_you_mean
from scumble.models.precision import DTYPES
from scumble.tensor_files.dtypes import word_of

if TYPE_CHECKING:
    from scumble.models.latents import LatentSpace

SPELLED: dict[str, torch.dtype] = {word_of(dtype): dtype for dtype in DTYPES.values()}
"""torch's names of the dtypes: "float32" is "fp32"."""


@dataclass(frozen=True)
class Dtypes:
    """The dtype of every component of a base."""

    common: torch.dtype
    """Of all that have none of their own."""
    own: Mapping[str, torch.dtype] = field(default_factory=dict)
    """Component -> its dtype."""
    quantization: str = "none"
    """What the denoiser's blocks are held in (see `models.quantized`); they are read in its dtype."""

    def of(self, component: str) -> torch.dtype:
        """What `component` is kept in."""
        return self.own.get(component, self.common)

    @property
    def used(self) -> tuple[torch.dtype, ...]:
        """Each dtype once."""
        return tuple(dict.fromkeys((self.common, *self.own.values())))


def dtype_spelled(name: str | torch.dtype) -> torch.dtype:
    """The dtype that is called "fp32" or "float32", "bf16" or "bfloat16", "fp16" or "float16".

    Raises:
        UnknownName: none is called so.
    """
    name = word_of(name)
    if name not in DTYPES and name not in SPELLED:
        raise UnknownName("dtype", name, DTYPES)
    return DTYPES[name] if name in DTYPES else SPELLED[name]


def short(dtype: torch.dtype) -> str:
    """What people call it: "fp32" for torch.float32."""
    return next((name for name, known in DTYPES.items() if known == dtype), word_of(dtype))


def own_dtypes(
    asked: Mapping[str, str | torch.dtype] | None, components: Collection[str], base: str
) -> dict[str, torch.dtype]:
    """Component -> its own dtype, as asked of `base`, which has these components.

    Raises:
        ModelError: it has no such component; the text names those that it has.
        UnknownName: there is no such dtype.
    """
    for name in asked or ():
        if name not in components:
            raise ModelError(
                f"dtypes names {name!r}, and {base} has no such component with weights."
                f"{did_you_mean(name, components)} It has {', '.join(components)}."
            )
    return {name: dtype_spelled(value) for name, value in (asked or {}).items()}


def check_kept(modules: Mapping[str, nn.Module], own: Mapping[str, torch.dtype], base: str) -> None:
    """
    Raises:
        ModelError: one of `modules` is not in the dtype that was asked for it.
    """
    for name, wanted in own.items():
        kept = {p.dtype for p in modules[name].parameters()} if name in modules else {wanted}
        if wanted not in kept:
            found = "/".join(sorted(map(short, kept)))
            raise ModelError(
                f"The {name} of {base} is in {found}, though {short(wanted)} was asked for it: the plug-in of its "
                "family takes one dtype for all components (Components.dtypes says which are asked). Leave dtypes out, "
                "or tell its author."
            )


def computing(dtype: torch.dtype | None, device: torch.device) -> AbstractContextManager[Any]:
    """For the length of a `with` block, autocast to `dtype` where another is on: a component computes in its own dtype
    within a step that computes in another. None, or no autocast, leaves things as they are."""
    kind = device.type
    if dtype is None or not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return nullcontext()
    return (
        torch.autocast(kind, enabled=False) if dtype == torch.float32 else torch.autocast(kind, dtype=dtype)
    )


def accept_any(vae: nn.Module) -> None:
    """From now on the VAE takes tensors of every floating-point dtype, and computes in its own."""
    for name in ("encoder", "post_quant_conv", "decoder"):
        part = getattr(vae, name, None)
        if isinstance(part, nn.Module) and _narrow not in part._forward_pre_hooks.values():
            part.register_forward_pre_hook(_narrow)


def _narrow(module: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(_as(one, next(module.parameters()).dtype) for one in given)


def agree(pipeline: Any, dtype: torch.dtype, latents: LatentSpace) -> None:
    """Have `pipeline` hand its denoiser, which is in `dtype`, what was read in other dtypes.

    A pipeline draws in the dtype of its text embeddings; they are cast once they are read. (Of several text encoders
    that differ among themselves some pipelines round the others to one of them before that.)
    """
    read = pipeline.encode_prompt

    @functools.wraps(read)
    def said(*given: Any, **told: Any) -> tuple[Any, ...]:
        return tuple(_as(part, dtype) for part in read(*given, **told))

    pipeline.encode_prompt = said
    if not hasattr(pipeline, "_encode_vae_image"):
        return

    def seen(image: Tensor, generator: Any) -> Tensor:
        # diffusers' own may leave the VAE in the picture's dtype
        if isinstance(generator, list):
            rows = [
                latents.encode(row[None], one)
                for row, one in zip(image, generator[: len(image)], strict=True)
            ]
            return torch.cat(rows).to(image.dtype)
        return latents.encode(image, generator or torch.default_generator).to(image.dtype)

    pipeline._encode_vae_image = seen


def _as(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
