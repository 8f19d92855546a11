"""Request: what to draw, as one frozen value for the command line, Python and servers."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, field_validator

from scumble.settings import Settings


class AdapterUse(Settings):
    """One adapter and how strongly it acts."""

    path: Path
    """The adapter: a .safetensors file or a folder that holds one."""
    strength: float = 1.0
    """0 is the bare base, 1 as trained; negative turns away from what was learned."""


class Request(Settings):
    """What to draw."""

    prompt: str
    """What the picture shows."""
    negative: str = ""
    """What it should not show."""
    count: int = Field(1, ge=1)
    """Pictures; the n-th uses seed + n."""
    width: int | None = None
    """Pixels; None is the base's own size, or that of `image`."""
    height: int | None = None
    """Pixels; None is the base's own size, or that of `image`."""
    steps: int = Field(25, ge=1)
    """Denoising steps."""
    guidance: float | None = Field(None, ge=0)
    """Classifier-free guidance scale (Ho & Salimans, 2022); 1 or less turns it off. Flux.1 dev is told it as a number.
    None is the base's own, usually 7.5."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Seed of the first picture."""
    image: Path | None = None
    """A picture to paint into; needs an inpainting base, and mask."""
    mask: Path | None = None
    """Where to paint: a grey picture of the image's size, white where something new should be, black where the image
    should stay."""
    scheduler: str = "DPMSolverMultistepScheduler"
    """Any diffusers scheduler by its class name."""
    adapters: tuple[AdapterUse, ...] = ()
    """Adapters to use together."""

    @field_validator("prompt", "negative")
    @classmethod
    def _no_nul(cls, text: str) -> str:
        if "\0" in text:
            raise ValueError("a prompt can't hold a NUL character")
        return text
