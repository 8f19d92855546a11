"""scumble: LoRA fine-tuning of Stable Diffusion. Public names are imported when they are first touched."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_PUBLIC = {
    "train": "scumble.runs.train",
    "plan": "scumble.runs.outlook",
    "RunConfig": "scumble.runs.config",
    "RunResult": "scumble.runs.train",
    "Session": "scumble.inference.session",
    "Request": "scumble.inference.request",
    "AdapterUse": "scumble.inference.request",
    "load_adapter": "scumble.inference.attach",
    "unload_adapters": "scumble.inference.attach",
    "load_base": "scumble.models.loading",
    "ScumbleError": "scumble.errors",
}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    """PEP 562: import the module of a public name, or a subpackage, at first touch."""
    import importlib

    if name in _PUBLIC:
        value = getattr(importlib.import_module(_PUBLIC[name]), name)
        globals()[name] = value
        return value
    if name in (
        "adapters",
        "data",
        "errors",
        "formats",
        "inference",
        "methods",
        "models",
        "picturebook",
        "runs",
        "training",
    ):
        return importlib.import_module(f"scumble.{name}")
    raise AttributeError(f"module 'scumble' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])


if TYPE_CHECKING:
    from scumble.errors import ScumbleError as ScumbleError
    from scumble.inference.attach import load_adapter as load_adapter
    from scumble.inference.attach import unload_adapters as unload_adapters
    from scumble.inference.request import AdapterUse as AdapterUse
    from scumble.inference.request import Request as Request
    from scumble.inference.session import Session as Session
    from scumble.models.loading import load_base as load_base
    from scumble.runs.config import RunConfig as RunConfig
    from scumble.runs.outlook import plan as plan
    from scumble.runs.train import RunResult as RunResult
    from scumble.runs.train import train as train
