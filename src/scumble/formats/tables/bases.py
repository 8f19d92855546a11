"""Families of base models as a LoRA betrays them: by the width of the text that cross-attention reads, or by layers
that no other family has."""

from __future__ import annotations

from collections.abc import Iterable

WIDTHS: dict[int, tuple[str, str]] = {
    768: ("sd1", "SD 1.x"),
    1024: ("sd2", "SD 2.x"),
    2048: ("sdxl", "SDXL"),
}
"""Cross-attention width -> (family name, as people write it)."""

ORIGINAL: dict[str, bool] = {"sd1": False, "sd2": False, "sdxl": True}
"""Base family -> whether flat names of its UNet's layers are those of the original code, not diffusers'."""

SIGNS: tuple[tuple[tuple[str, ...], str, str], ...] = (
    (("transformer.single_transformer_blocks.",), "flux", "Flux.1"),
    (("transformer.pos_embed.proj", "transformer.context_embedder"), "sd3", "SD 3"),
)
"""Beginnings of layers' paths that one family of transformers alone has, together -> (family name, as people write
it)."""

TITLES: dict[str, str] = {
    **{family: title for family, title in WIDTHS.values()},
    **{family: title for _, family, title in SIGNS},
}
"""Family name -> as people write it."""


def told_by(layers: Iterable[str]) -> str:
    """The family of transformers that these layers betray; empty when they betray none."""
    paths = tuple(layers)
    for signs, family, _ in SIGNS:
        if all(any(path.startswith(sign) for path in paths) for sign in signs):
            return family
    return ""
