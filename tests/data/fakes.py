"""A base and pictures for the data room's tests: quick, but true to the contracts."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from scumble.data.settings import DataSettings
from scumble.models.family import BaseModel, Conditioning, Frame


class FakeBase(BaseModel):
    """Latents are the means of 8x8 pixels; a prompt's embedding is drawn from its hash. Counts what it
    encodes."""

    family, name, resolution, size_multiple = "fake", "fake", 32, 8
    latent_factor, latent_channels = 8, 3
    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self) -> None:
        self.vae, self.text_encoder, unet = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(1, 1)
        with torch.no_grad():
            for parameter in (*self.vae.parameters(), *self.text_encoder.parameters()):
                parameter.fill_(1.0)
        self.roots: Mapping[str, nn.Module] = {"unet": unet, "text_encoder": self.text_encoder}
        self.images: list[Tensor] = []
        self.prompts: list[str] = []
        self.poison: Tensor | None = None

    def encode_images(self, pixels: Tensor, rng: torch.Generator | None) -> Tensor:
        assert pixels.shape[1] == 3 and pixels.dtype == torch.float32 and pixels.abs().max() <= 1
        self.images.extend(pixels)
        latents = nn.functional.avg_pool2d(pixels, 8) * self.vae.weight.flatten()[0]
        if self.poison is not None and torch.equal(latents[0], self.poison):
            latents = latents * float("nan")
        return latents.detach()

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        self.prompts.extend(prompts)
        return Conditioning(torch.stack([embedding(prompt) for prompt in prompts]))

    def token_counts(self, prompts: Sequence[str]) -> tuple[list[int], int]:
        return count_words(prompts)

    def pipeline(self) -> Any:
        return SimpleNamespace(
            components={"vae": self.vae, "text_encoder": self.text_encoder, "scheduler": None}
        )

    def decode_latents(self, latents: Tensor) -> Tensor:
        raise AssertionError("the data room decodes nothing")

    def denoise(self, latents: Tensor, t: Tensor, conditioning: Conditioning, frame: Frame) -> Tensor:
        raise AssertionError("the data room denoises nothing")

    def fingerprint(self) -> str:
        raise AssertionError("the data room does not ask for the denoiser")


def embedding(prompt: str) -> Tensor:
    """(4, 8) numbers that belong to `prompt`."""
    seed = int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:6], "little")
    return torch.randn((4, 8), generator=torch.Generator().manual_seed(seed))


def count_words(prompts: Sequence[str]) -> tuple[list[int], int]:
    """A tokenizer whose tokens are words, with two special ones and room for 7."""
    return [len(prompt.split()) + 2 for prompt in prompts], 7


def noise(height: int, width: int, seed: int = 0) -> Image.Image:
    """A picture of random blobs: no two seeds look alike."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC)


def shade(index: int) -> int:
    """The grey that says which picture this is."""
    return 10 + 11 * index


def folder(
    root: Path,
    sizes: Sequence[tuple[int, int]] = ((32, 32),) * 6,
    caption: str = "picture {index}, red, small, old",
) -> Path:
    """Pictures whose red is the shade of their index, and darker on the right otherwise; captions beside
    them."""
    root.mkdir(parents=True, exist_ok=True)
    for index, (height, width) in enumerate(sizes):
        pixels = np.full((height, width, 3), shade(index), np.uint8)
        pixels[:, width // 2 :, 1:] //= 2
        Image.fromarray(pixels).save(root / f"{index}.png")
        (root / f"{index}.txt").write_text(caption.format(index=index))
    return root


def settings(images: Path | str, **changes: Any) -> DataSettings:
    """Settings with two workers."""
    return DataSettings(**{"images": images, "workers": 2, **changes})
