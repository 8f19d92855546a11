"""Layer names: how a file spells a layer, and the live model's path for it, in both directions.

The one real difference is CLIP: transformers before 5 called its layers `text_model.encoder.layers...`, from
5 on `encoder.layers...`. Files exist with both; we write the classic one, and find either in the layers that
we are given.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import lru_cache
from typing import Protocol

from scumble.adapters.state import LayerPath

ROOTS = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3")
"""Components of diffusers pipelines that adapters go to."""


PEFT_MODEL = "base_model.model."
"""How a peft model's own names begin."""
CLIP_BEGINS = ("encoder.layers.", "final_layer_norm")
"""How the names of CLIP's layers begin, less `text_model.`."""


@lru_cache(maxsize=2**15)
def split_root(spelled: str) -> tuple[str, str]:
    """(component, rest) of a layer's name. A component saved alone has no prefix: a text encoder, which its names
    tell, or a UNet."""
    root, _, rest = spelled.partition(".")
    if root in ROOTS:
        return root, rest
    alone = spelled.startswith(("text_model.", *CLIP_BEGINS))
    return ("text_encoder" if alone else "unet"), spelled


class Names(Protocol):
    """How one dialect's names of layers lead to the layers of one base."""

    def resolve(self, spelled: str) -> LayerPath | None:
        """The layer that a file calls `spelled`, or None when the base has no such layer."""

    def shape(self, path: LayerPath) -> Sequence[int] | None:
        """The shape of a layer's weight, (out, in[, k, k]), or None when it is not known."""

    def labelled(self, spelled: str) -> str:
        """`spelled` with the component that it belongs to before it, for counting."""


class LayerNames:
    """The layers of one base, found under every spelling."""

    def __init__(self, layers: Collection[LayerPath] | None) -> None:
        """`layers`: paths of the base's layers, or a mapping from them to the shapes of their weights; None
        when there is no base at hand: then every name is believed."""
        self._layers = None if layers is None else frozenset(layers)
        self._shapes: Mapping[LayerPath, Sequence[int]] = layers if isinstance(layers, Mapping) else {}

    def resolve(self, spelled: str) -> LayerPath | None:
        """The layer that a file calls `spelled`, or None when the base has no such layer."""
        if self._layers is None:
            return _spellings(spelled)[0]
        if spelled in self._layers:
            return spelled
        return next((path for path in _spellings(spelled) if path in self._layers), None)

    def shape(self, path: LayerPath) -> Sequence[int] | None:
        """The shape of a layer's weight, (out, in[, k, k]), or None when it is not known."""
        return self._shapes.get(path)

    def labelled(self, spelled: str) -> str:
        """`spelled` with the component that it belongs to before it, for counting."""
        return ".".join(split_root(spelled))


def _spellings(spelled: str) -> list[LayerPath]:
    """All paths that `spelled` may stand for, the likeliest first."""
    root, rest = split_root(spelled)
    if root == "unet" and rest.startswith("unet."):  # diffusers 0.22 wrote the prefix twice
        rest = rest.removeprefix("unet.")
    rest = rest.removeprefix(PEFT_MODEL)  # saved by diffusers' writer
    names = [f"{root}.{rest}"]
    if root.startswith("text_encoder"):
        other = rest.removeprefix("text_model.") if rest.startswith("text_model.") else f"text_model.{rest}"
        names.append(f"{root}.{other}")
    return names


def classic(path: LayerPath) -> str:
    """`path` as files have always spelled it: with CLIP's `text_model.`."""
    root, rest = split_root(path)
    if root.startswith("text_encoder") and rest.startswith(CLIP_BEGINS):
        return f"{root}.text_model.{rest}"
    return path
