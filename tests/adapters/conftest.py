"""A model small enough to read, with everything that an adapter may meet: names as in diffusers and
transformers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from scumble.adapters import Adapter


class Attention(nn.Module):
    """Names as in diffusers."""

    def __init__(self, width: int, context: int) -> None:
        super().__init__()
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(context, width, bias=False)
        self.to_v = nn.Linear(context, width, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(width, width), nn.Dropout(0.0)])

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        probs = (self.to_q(x) @ self.to_k(context).transpose(-1, -2)).softmax(-1)
        return self.to_out[0](probs @ self.to_v(context))


class Block(nn.Module):
    """Self-attention, cross-attention, feed-forward."""

    def __init__(self, width: int, context: int) -> None:
        super().__init__()
        self.attn1 = Attention(width, width)
        self.attn2 = Attention(width, context)
        self.ff = nn.Module()
        self.ff.net = nn.ModuleList([nn.Module(), nn.Dropout(0.0), nn.Linear(2 * width, width)])
        self.ff.net[0].proj = nn.Linear(width, 2 * width)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        x = x + self.attn1(x, x)
        x = x + self.attn2(x, context)
        return x + self.ff.net[2](torch.tanh(self.ff.net[0].proj(x)))


class Denoiser(nn.Module):
    """(B, 4, H, W), (B, L, 6) -> (B, 4, H/2, W/2)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(4, 8, 3, padding=1)
        self.down = nn.Module()
        self.down.op = nn.Conv2d(8, 8, 3, stride=2, padding=1)
        self.down.alias = self.down.op  # as diffusers' Downsample2D does
        self.blocks = nn.ModuleList([Block(8, 6), Block(8, 6)])
        self.conv_out = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        x = self.down.alias(self.conv_in(x))
        rows = x.flatten(2).transpose(1, 2)
        for block in self.blocks:
            rows = block(rows, context)
        return self.conv_out(rows.transpose(1, 2).reshape(x.shape))


class TextEncoder(nn.Module):
    """Names as in transformers' CLIP."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.Module()
        layer.self_attn = nn.Module()
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            setattr(layer.self_attn, name, nn.Linear(6, 6))
        layer.mlp = nn.Module()
        layer.mlp.fc1, layer.mlp.fc2 = nn.Linear(6, 12), nn.Linear(12, 6)
        self.layers = nn.ModuleList([layer])


@pytest.fixture
def roots() -> dict[str, nn.Module]:
    """A frozen denoiser and text encoder."""
    torch.manual_seed(0)
    return {"unet": Denoiser().requires_grad_(False), "text_encoder": TextEncoder().requires_grad_(False)}


@pytest.fixture
def run(roots: dict[str, nn.Module]) -> Callable[[], Tensor]:
    """The denoiser's output on a fixed batch of four."""
    rng = torch.Generator().manual_seed(1)
    x, context = torch.randn(4, 4, 8, 8, generator=rng), torch.randn(4, 5, 6, generator=rng)
    return lambda: roots["unet"](x, context)


@pytest.fixture
def stir() -> Callable[[Adapter], Adapter]:
    """Gives an adapter values as if it had been trained."""

    def stir(adapter: Adapter, seed: int = 0) -> Adapter:
        rng = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=rng) * 0.3)
        return adapter

    return stir
