"""FAMILIES: the adapter families by name. To add one, write its file and one line here."""

from __future__ import annotations

from typing import TYPE_CHECKING

from scumble.registry import Registry

if TYPE_CHECKING:
    from scumble.adapters.delta import Delta

FAMILIES: Registry[type[Delta]] = Registry(
    "adapter family",
    {
        "lora": "scumble.adapters.lora:Lora",
        "dora": "scumble.adapters.dora:Dora",
        "loha": "scumble.adapters.loha:Loha",
        "lokr": "scumble.adapters.lokr:Lokr",
        "glora": "scumble.adapters.glora:Glora",
        "full": "scumble.adapters.full:Full",
        "ia3": "scumble.adapters.ia3:Ia3",
        "oft": "scumble.adapters.oft:Oft",
        "boft": "scumble.adapters.boft:Boft",
    },
)
"""Name -> Delta class. Outsiders add to it by an entry point in the group `scumble.adapter_family`."""
