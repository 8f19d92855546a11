"""set_attention: three ways to the same numbers, and the rule that chooses between two of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from scumble.errors import UnknownName
from scumble.models import FAMILIES
from scumble.models.attention import PLAIN_KEYS, FasterAttention, plain_is_faster
from scumble.models.family import Frame


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_every_kind_gives_the_same_outputs_and_gradients(family: str) -> None:
    base: Any = FAMILIES.get(family).tiny()
    found = {}
    for kind in ("sdpa", "plain", "auto"):
        base.set_attention(kind)
        x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
        out = base.denoise(
            x, torch.tensor([10, 900]), base.encode_prompts(["a", "b"]), Frame.plain(2, 16, 16)
        )
        out.square().mean().backward()
        found[kind] = (out.detach(), x.grad)
    for kind in ("plain", "auto"):
        for mine, same in zip(found[kind], found["sdpa"], strict=True):
            torch.testing.assert_close(mine, same, atol=1e-5, rtol=1e-5)


def test_plain_products_train_in_bf16_on_a_cpu_with_few_keys() -> None:
    few, many = torch.zeros(1, PLAIN_KEYS, 8), torch.zeros(1, PLAIN_KEYS + 1, 8)
    assert not plain_is_faster(few)
    assert plain_is_faster(few.bfloat16()) and not plain_is_faster(many.bfloat16())
    assert plain_is_faster(many.bfloat16(), few.bfloat16())
    assert plain_is_faster(torch.zeros(1, 8, 16, 16).bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        assert plain_is_faster(few)
    with torch.no_grad():
        assert not plain_is_faster(few.bfloat16())
    assert not plain_is_faster(torch.zeros(1, 4, 8, device="meta").bfloat16())


def test_auto_uses_what_the_rule_says(monkeypatch: pytest.MonkeyPatch) -> None:
    base: Any = FAMILIES.get("sd1").tiny()
    base.set_attention("auto")
    processors = list(base.unet.attn_processors.values())
    assert all(isinstance(processor, FasterAttention) for processor in processors)
    used = []
    for processor in set(processors):
        for kind in ("plain", "fused"):
            original = getattr(processor, kind)
            monkeypatch.setattr(
                processor, kind, lambda *a, k=kind, f=original, **o: (used.append(k), f(*a, **o))[1]
            )
    words, x = base.encode_prompts(["a"]), torch.zeros(1, 4, 8, 8)
    base.denoise(x, torch.tensor([10]), words, Frame.plain(1, 16, 16))
    assert set(used) == {"fused"}
    used.clear()
    with torch.autocast("cpu", torch.bfloat16):
        base.denoise(x, torch.tensor([10]), words, Frame.plain(1, 16, 16))
    assert set(used) == {"plain"}


def test_unknown_kinds_are_named() -> None:
    base: Any = FAMILIES.get("sd1").tiny()
    with pytest.raises(UnknownName, match="auto, plain, sdpa"):
        base.set_attention("xformers")
