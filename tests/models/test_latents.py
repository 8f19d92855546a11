"""LatentSpace: scale and shift, and a VAE that overflows in its own dtype."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from scumble.errors import ModelError
from scumble.models import FAMILIES
from scumble.models.latents import LatentSpace


class Config(dict):  # type: ignore[type-arg]
    __getattr__ = dict.__getitem__


class Vae(nn.Module):
    """z = 2 x, through a value that fp16 can't hold for bright pictures."""

    def __init__(self, dtype: torch.dtype, **config: Any) -> None:
        super().__init__()
        self.config = Config(
            {"scaling_factor": 0.5, "latent_channels": 3, "block_out_channels": [1], **config}
        )
        self.anchor = nn.Parameter(torch.zeros(1, dtype=dtype))
        self.calls: list[torch.dtype] = []

    @property
    def dtype(self) -> torch.dtype:
        return self.anchor.dtype

    device = torch.device("cpu")

    def encode(self, x: torch.Tensor) -> Any:
        assert x.dtype == self.dtype
        self.calls.append(x.dtype)
        z = x * 60000 * 2 / 60000
        draw = lambda generator: z + torch.randn(z.shape, generator=generator)  # noqa: E731
        return SimpleNamespace(latent_dist=SimpleNamespace(mode=lambda: z, sample=draw))

    def decode(self, z: torch.Tensor) -> Any:
        assert z.dtype == self.dtype
        return SimpleNamespace(sample=z / 2)


def test_scale_and_shift_are_inverse() -> None:
    space = LatentSpace(Vae(torch.float32, shift_factor=0.25))
    x = torch.rand(2, 3, 4, 4)
    latents = space.encode(x, None)
    torch.testing.assert_close(latents, (2 * x - 0.25) * 0.5)
    torch.testing.assert_close(space.decode(latents), x)


def test_overflow_in_fp16_is_computed_again_in_fp32() -> None:
    vae = Vae(torch.float16)
    space = LatentSpace(vae)
    dark, bright = torch.full((1, 3, 2, 2), 0.1), torch.full((1, 3, 2, 2), 1.0)
    space.encode(dark, None)
    assert vae.calls == [torch.float16] and not space.widened
    one, two = torch.Generator().manual_seed(0), torch.Generator().manual_seed(0)
    result = space.encode(bright, one)
    assert space.widened and vae.calls[1:] == [torch.float16, torch.float32] and vae.dtype == torch.float16
    assert torch.equal(
        result, (2 * bright + torch.randn(bright.shape, generator=two)) * 0.5
    )  # the draw of one run
    space.encode(dark, None)
    assert vae.calls[-1] == torch.float32


def test_what_is_not_finite_in_fp32_is_named_by_row() -> None:
    x = torch.zeros(3, 3, 2, 2)
    x[1] = torch.nan
    with pytest.raises(ModelError, match=r"rows \[1\]"):
        LatentSpace(Vae(torch.float32)).encode(x, None)
    with pytest.raises(ModelError, match=r"can't decode rows \[1\]"):
        LatentSpace(Vae(torch.float32)).decode(x)


def test_autocast_does_not_narrow_the_vae() -> None:
    base = FAMILIES.get("sd1").tiny()
    pixels = torch.rand(1, 3, 16, 16)
    exact = base.encode_images(pixels, None)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(base.encode_images(pixels, None), exact)
        assert torch.equal(base.decode_latents(exact), base.decode_latents(exact))


def test_the_base_notes_that_its_vae_was_widened(monkeypatch: pytest.MonkeyPatch) -> None:
    base: Any = FAMILIES.get("sd1").tiny()
    base.latents = LatentSpace(Vae(torch.float16))
    base.encode_images(torch.ones(1, 3, 2, 2), None)
    base.encode_images(torch.ones(1, 3, 2, 2), None)
    assert len(base.notes) == 1 and "fp32" in base.notes[0]
