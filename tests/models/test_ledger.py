"""Ledger: counting the memory of tensors, and playing work without numbers that holds what the work itself holds."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from scumble.adapters import Adapter, LoraSettings
from scumble.models import FAMILIES
from scumble.models.family import BaseModel, Frame
from scumble.models.ledger import Ledger, Theatre


def test_what_is_held_at_once_is_counted() -> None:
    known = torch.zeros(1000)
    with Ledger([known]) as ledger:
        view = known.view(10, 100) * 1  # 4000
        double = torch.cat([view, view])  # 8000
        del view
        tail = double[5:]  # a view: nothing
        alike = known.t()
        small = tail.sum()  # 4
    assert (ledger.held.peak, ledger.held.left) == (12000, 8004)
    del double, tail
    assert ledger.now == 4 and small is not None and alike is not None


def test_products_are_counted_and_the_heaviest_convolution() -> None:
    layers = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.Conv2d(8, 4, 1, bias=False))
    with Ledger() as ledger:
        layers(torch.zeros(1, 3, 5, 5))
    assert ledger.held.flops == 2 * 25 * (3 * 8 * 9 + 8 * 4)
    assert ledger.held.heaviest == 4 * 3 * 8 * 9


def step(base: BaseModel) -> None:
    latents = torch.zeros(2, base.latent_channels, 8, 8, dtype=base.dtype)
    t, frame = base.prediction.from_uniform(torch.tensor([0.4, 0.7])), Frame.plain(2, 16, 16)
    base.denoise(latents, t, base.encode_prompts(["a", "b"]), frame).square().mean().backward()


@pytest.mark.parametrize(("family", "recomputed"), [("sd1", False), ("sd3", True)])
def test_a_played_step_holds_what_a_real_one_holds(family: str, recomputed: bool) -> None:
    base = FAMILIES.get(family).tiny(0)
    with Adapter.inject(base.roots, "attention", LoraSettings(rank=2)) as adapter:
        base.train_memory(checkpointing=recomputed)
        tensors = [*base.denoiser.parameters(), *(t for m in base.modules().values() for t in m.parameters())]
        buffers = [b for m in base.modules().values() for b in m.buffers()]
        before = [p.data_ptr() for p in tensors]
        played = Theatre(base.modules().values(), torch.device("cpu")).play(lambda: step(base))
        assert [p.data_ptr() for p in tensors] == before, "the modules have their own tensors again"
        assert all(p.grad is None for p in adapter.parameters())
        with Ledger([*tensors, *buffers]) as ledger:
            step(base)
    assert played.peak == pytest.approx(ledger.held.peak, rel=0.01)
    assert played.flops == ledger.held.flops > 0
    assert played.left == sum(p.numel() * 4 for p in adapter.parameters())


def test_blocks_are_told_apart() -> None:
    base = FAMILIES.get("sd1").tiny(0)
    with Adapter.inject(base.roots, "attention", LoraSettings(rank=2)):
        theatre = Theatre(base.modules().values(), torch.device("cpu"))
        held, inside = theatre.play_blocks(lambda: step(base), base.recomputable)
        kept = {path: one.kept for path, one in inside.items() if path.startswith("unet.")}
        assert 0 < sum(kept.values()) < held.peak
        heavy = max(kept, key=lambda path: kept[path])
        base.train_memory(checkpointing=(heavy,))
        less = theatre.play(lambda: step(base))
    again = less.flops - held.flops  # which ends where the last thing that is needed is there
    assert 0.5 * inside[heavy].flops < again <= inside[heavy].flops
    assert 0 < held.peak - less.peak <= kept[heavy]


def test_attention_is_what_the_device_computes() -> None:
    """Fused attention keeps no matrix of all pairs; the tiny bases' plain attention does."""
    base = FAMILIES.get("sd1").tiny(0)
    peaks = {}
    for kind in ("plain", "sdpa"):
        base.set_attention(kind)  # type: ignore[attr-defined]
        with Adapter.inject(base.roots, "attention", LoraSettings(rank=2)):
            peaks[kind] = Theatre(base.modules().values(), torch.device("cpu")).play(lambda: step(base)).peak
    assert peaks["sdpa"] < peaks["plain"]
