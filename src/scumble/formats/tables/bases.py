"""Families of base models as a LoRA betrays them: by the width of the text that cross-attention reads."""

from __future__ import annotations

WIDTHS: dict[int, tuple[str, str]] = {
    768: ("sd1", "SD 1.x"),
    1024: ("sd2", "SD 2.x"),
    2048: ("sdxl", "SDXL"),
}
"""Cross-attention width -> (family name, as people write it)."""

TITLES: dict[str, str] = {family: title for family, title in WIDTHS.values()}
"""Family name -> as people write it."""
