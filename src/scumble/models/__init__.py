"""Base models: the only room that diffusers and transformers enter.

Importing this package imports neither torch nor diffusers; its names load when they are touched (PEP 562).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from scumble.lazy import lazily
from scumble.registry import Registry

if TYPE_CHECKING:
    from scumble.models.configs import BaseFacts as BaseFacts
    from scumble.models.family import BaseModel as BaseModel
    from scumble.models.family import Conditioning as Conditioning
    from scumble.models.family import Family
    from scumble.models.family import Frame as Frame
    from scumble.models.loading import describe_base as describe_base
    from scumble.models.loading import load_base as load_base
    from scumble.models.precision import check_precision as check_precision
    from scumble.models.prediction import Prediction as Prediction

FAMILIES: Registry[Family] = Registry(
    "base family",
    {
        "flux": "scumble.models.flux:Flux",
        "sd1": "scumble.models.sd1:SD1",
        "sd1-inpainting": "scumble.models.inpainting:SD1Inpainting",
        "sd2": "scumble.models.sd2:SD2",
        "sd2-inpainting": "scumble.models.inpainting:SD2Inpainting",
        "sd3": "scumble.models.sd3:SD3",
        "sdxl": "scumble.models.sdxl:SDXL",
        "sdxl-inpainting": "scumble.models.inpainting:SDXLInpainting",
    },
)
"""Base families by name: each one file in this folder and one line here."""

_PUBLIC = {
    "BaseFacts": "scumble.models.configs",
    "BaseModel": "scumble.models.family",
    "Conditioning": "scumble.models.family",
    "Frame": "scumble.models.family",
    "Prediction": "scumble.models.prediction",
    "check_precision": "scumble.models.precision",
    "describe_base": "scumble.models.loading",
    "load_base": "scumble.models.loading",
}


__getattr__, __dir__ = lazily(__name__, _PUBLIC)
