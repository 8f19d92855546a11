"""Inpainting: UNets that are shown a picture with a hole, and fill it as the prompt says.

Beside the 4 noisy channels of the latents such a UNet takes 5 more: the hole, and the latents of the picture with
its hole grey. An adapter does not see the difference, so that adapters of the text-to-image bases fit, and the other
way round.

Source: Rombach et al. 2022, "High-Resolution Image Synthesis with Latent Diffusion Models", section 4.5; the calls
are those of diffusers' StableDiffusionInpaintPipeline and StableDiffusionXLInpaintPipeline.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from scumble.models.family import Components, Conditioning
from scumble.models.sd1 import SD1
from scumble.models.sd2 import SD2
from scumble.models.sdxl import SDXL, SDXLBase
from scumble.models.tiny import TinySizes
from scumble.models.unet import UNetBase

if TYPE_CHECKING:
    from PIL.Image import Image


class InpaintingBase(UNetBase):
    """A frozen inpainting UNet, VAE and CLIP text encoder, as diffusers' StableDiffusionInpaintPipeline puts them
    together."""

    drawn_by: ClassVar[str] = "StableDiffusionInpaintPipeline"

    def __init__(self, family: str, parts: Components, *, dtype: torch.dtype, device: torch.device) -> None:
        """See UNetBase."""
        super().__init__(family, parts, dtype=dtype, device=device)
        self.shown_channels = 1 + self.latent_channels
        self._nothing: dict[tuple[int, ...], Tensor] = {}

    def show(self, pixels: Tensor, holes: Tensor) -> Tensor:
        """See BaseModel: the hole in the latents' size, then the latents of the picture that is grey (0) in the
        hole."""
        hole = (holes >= 0.5).to(pixels)
        latents = self.encode_images(pixels * (1 - hole), None)
        return torch.cat([functional.interpolate(hole, size=latents.shape[-2:]).to(latents), latents], dim=1)

    def input_of(self, latents: Tensor, conditioning: Conditioning) -> Tensor:
        """See UNetBase: the noisy latents, and what is shown beside them."""
        shown = conditioning.shown
        if shown is None:
            shown = self.nothing_shown(latents.shape[-2:]).expand(len(latents), -1, -1, -1)
        return torch.cat([latents, shown.to(latents)], dim=1)

    def nothing_shown(self, size: tuple[int, ...]) -> Tensor:
        """(1, `shown_channels`, h, w) of a picture that is all hole."""
        key = tuple(size)
        if key not in self._nothing:
            height, width = (side * self.latent_factor for side in key)
            grey = torch.zeros(1, 3, height, width, device=self.device)
            self._nothing[key] = self.show(grey, torch.ones_like(grey[:, :1]))
        return self._nothing[key]

    def drawn_into(
        self, picture: Image | None, mask: Image | None, count: int, size: tuple[int, int]
    ) -> Mapping[str, Any]:
        """See BaseModel. All hole: its latents are the ones that training sees, not a sample of them."""
        from PIL import Image

        if picture is not None and mask is not None:
            # one for each: the pipeline draws the masked picture's latents from each one's own generator
            return {"image": [picture] * count, "mask_image": [mask] * count}
        width, height = size
        shown = self.nothing_shown((height // self.latent_factor, width // self.latent_factor))
        return {
            "image": Image.new("RGB", size),
            "mask_image": Image.new("L", size, 255),
            "masked_image_latents": shown[:, 1:],
        }


class SDXLInpaintingBase(InpaintingBase, SDXLBase):
    """The same with two text encoders, as diffusers' StableDiffusionXLInpaintPipeline puts them together."""

    drawn_by: ClassVar[str] = "StableDiffusionXLInpaintPipeline"
    usual_guidance = 7.5
    fewest_steps_into = 2

    def drawn_into(
        self, picture: Image | None, mask: Image | None, count: int, size: tuple[int, int]
    ) -> Mapping[str, Any]:
        """See BaseModel. Into a picture this pipeline paints from the second step on, starting from that picture under
        almost nothing but noise; where all is hole there is none to start from."""
        into = super().drawn_into(picture, mask, count, size)
        return into if picture is not None else {**into, "strength": 1.0}


class Filling:
    """What makes a family over a UNet the inpainting one of its kind."""

    base: ClassVar[type[UNetBase]] = InpaintingBase
    fills: ClassVar[bool] = True


class SD1Inpainting(Filling, SD1):
    """Stable Diffusion 1.x inpainting."""

    name: ClassVar[str] = "sd1-inpainting"
    title: ClassVar[str] = "Stable Diffusion 1 inpainting"
    adapters: ClassVar[str] = SD1.name
    tiny_sizes: ClassVar[TinySizes] = replace(SD1.tiny_sizes, channels=9)


class SD2Inpainting(Filling, SD2):
    """Stable Diffusion 2 inpainting."""

    name: ClassVar[str] = "sd2-inpainting"
    title: ClassVar[str] = "Stable Diffusion 2 inpainting"
    adapters: ClassVar[str] = SD2.name
    tiny_sizes: ClassVar[TinySizes] = replace(SD2.tiny_sizes, channels=9)


class SDXLInpainting(Filling, SDXL):
    """Stable Diffusion XL inpainting."""

    name: ClassVar[str] = "sdxl-inpainting"
    title: ClassVar[str] = "Stable Diffusion XL inpainting"
    base: ClassVar[type[UNetBase]] = SDXLInpaintingBase
    adapters: ClassVar[str] = SDXL.name
