"""Law: whatever a base recomputes, gradients are those of keeping everything, bit for bit; what it is told to recompute
is computed twice, what not once."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import nn

from scumble.adapters import Adapter, LoraSettings
from scumble.models import FAMILIES
from scumble.models.family import BaseModel, Frame


@pytest.fixture(params=FAMILIES.names())
def base(request: pytest.FixtureRequest) -> BaseModel:
    return FAMILIES.get(request.param).tiny(seed=1)


def first_of(block: nn.Module) -> nn.Module:
    """The first module without children inside: what is counted, because hooks of a block may stand outside of what is
    done again."""
    return next(module for module in block.modules() if not list(module.children()))


def gradients(base: BaseModel, adapter: Adapter) -> list[torch.Tensor]:
    latents = torch.randn(2, base.latent_channels, 8, 8, generator=torch.Generator().manual_seed(0))
    t, frame = base.prediction.from_uniform(torch.tensor([0.4, 0.7])), Frame.plain(2, 16, 16)
    for parameter in adapter.parameters():
        parameter.grad = None
    torch.manual_seed(3)  # of dropout
    base.denoise(latents, t, base.encode_prompts(["a fox", "a hen"]), frame).square().mean().backward()
    return [p.grad.clone() for p in adapter.parameters() if p.grad is not None]


def test_gradients_are_the_same_whatever_is_recomputed(base: BaseModel) -> None:
    blocks = base.recomputable
    denoiser, text = next(iter(base.roots)), tuple(base.roots)[1]
    some = tuple(blocks)[::3]
    targets = ("all-linear", f"{text}.attention")
    with Adapter.inject(base.roots, targets, LoraSettings(rank=2, dropout=0.5)) as adapter:
        for name, parameter in adapter.named_parameters():
            if name.endswith(".up"):
                torch.nn.init.normal_(parameter, std=0.1)
        adapter.train()
        kept = gradients(base, adapter)
        assert any(grad.any() for grad in kept)
        for told in (True, some, (f"{denoiser}.*",), (f"{text}.*",), tuple(blocks)):
            base.train_memory(checkpointing=told)
            counts: Counter[str] = Counter()
            hooks = [
                first_of(block).register_forward_pre_hook(
                    lambda *_, path=path, seen=counts: seen.update([path])
                )
                for path, block in blocks.items()
            ]
            again = gradients(base, adapter)
            for hook in hooks:
                hook.remove()
            assert len(again) == len(kept)
            assert all(torch.equal(one, other) for one, other in zip(kept, again, strict=True)), told
            prefixes = tuple(one.removesuffix("*") for one in told) if isinstance(told, tuple) else ("",)
            # a block before everything that trains needs no gradient, and so nothing of it is kept or recomputed
            twice = {path for path, count in counts.items() if count == 2}
            assert set(counts.values()) <= {1, 2} and twice
            assert all(path.startswith(prefixes) for path in twice), told
            late = [path for path in blocks if path.startswith(prefixes) and path.startswith(denoiser)]
            assert not late or late[-1] in twice, "the last block that was told is recomputed"
        base.train_memory(checkpointing=False)
        assert not any(module.training for module in base.denoiser.modules() if module in blocks.values())


def test_every_block_that_is_named_can_be_recomputed(base: BaseModel) -> None:
    """With a gradient at the very beginning, each of them is."""
    blocks = {
        path: block for path, block in base.recomputable.items() if path.startswith(next(iter(base.roots)))
    }
    base.train_memory(checkpointing=tuple(blocks))
    counts: Counter[str] = Counter()
    for path, block in blocks.items():
        first_of(block).register_forward_pre_hook(lambda *_, path=path, seen=counts: seen.update([path]))
    latents = torch.randn(1, base.latent_channels, 8, 8, generator=torch.Generator().manual_seed(0))
    t, frame = base.prediction.from_uniform(torch.tensor([0.4])), Frame.plain(1, 16, 16)
    said = base.encode_prompts(["a fox"]).map(
        lambda one: one.detach().requires_grad_(one.is_floating_point())
    )
    base.denoise(latents.requires_grad_(), t, said, frame).square().mean().backward()
    assert blocks and set(counts) == set(blocks)
    assert set(counts.values()) == {2}
