"""Adapters as data for the tests of this folder: random tensors on layers of a small base."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import nn

from scumble.adapters.delta import DeltaSettings
from scumble.adapters.families import FAMILIES
from scumble.adapters.state import AdapterState, LayerState, Metadata

BLOCK = "unet.down_blocks.0.attentions.0.transformer_blocks.0"
CLIP = "text_encoder.encoder.layers.0.self_attn"

SHAPES: dict[str, tuple[int, ...]] = {
    f"{BLOCK}.attn1.to_q": (32, 32),
    f"{BLOCK}.attn1.to_out.0": (32, 32),
    f"{BLOCK}.attn2.to_k": (32, 768),
    f"{BLOCK}.attn2.to_v": (32, 768),
    f"{BLOCK}.ff.net.0.proj": (64, 32),
    "unet.down_blocks.0.attentions.0.proj_in": (32, 32, 1, 1),
    "unet.down_blocks.0.resnets.0.conv1": (16, 32, 3, 3),
    "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q": (64, 64),
    f"{CLIP}.q_proj": (24, 24),
    f"{CLIP}.out_proj": (24, 24),
    "text_encoder_2.text_model.encoder.layers.1.mlp.fc1": (48, 24),
}
"""Layer path -> shape of its weight. Cross-attention as in SD 1."""

ATTENTION = tuple(path for path in SHAPES if ".attn" in path or "self_attn" in path)


def layer(
    path: str, rank: int = 4, alpha: float | None = None, rank_stabilized: bool = False, seed: int = 0
) -> LayerState:
    """A random change to a layer of SHAPES."""
    out, *inner = SHAPES[path]
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        "down": torch.randn(rank, *inner, generator=generator),
        "up": torch.randn(out, rank, *(1 for _ in inner[1:]), generator=generator),
    }
    return LayerState("lora", rank, float(rank) if alpha is None else alpha, tensors, rank_stabilized)


def of_family(settings: DeltaSettings, paths: Iterable[str] = tuple(SHAPES), seed: int = 0) -> AdapterState:
    """A random adapter of the settings' family on `paths`, as it would be trained."""
    family, generator = FAMILIES.get(settings.family), torch.Generator().manual_seed(seed)
    layers = {}
    for path in paths:
        out, inner, *kernel = SHAPES[path]
        base = nn.Conv2d(inner, out, kernel[0]) if kernel else nn.Linear(inner, out)
        alpha = float(settings.rank) if settings.alpha is None else settings.alpha
        delta = family.fresh(base, settings, rank=settings.rank, alpha=alpha, generator=generator)
        with torch.no_grad():
            for parameter in delta.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator))
        layers[path] = delta.state()
    return AdapterState(layers)


def adapter(
    paths: Iterable[str] = tuple(SHAPES), metadata: Metadata | None = None, **how: float
) -> AdapterState:
    """A random adapter on `paths`; `how` goes to `layer`."""
    layers: Mapping[str, LayerState] = {path: layer(path, seed=n, **how) for n, path in enumerate(paths)}  # type: ignore[arg-type]
    return AdapterState(layers, metadata=metadata or Metadata())
