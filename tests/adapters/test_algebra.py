"""Merging, and the exact way back: same parameter object, same bits, in any dtype and order."""

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from scumble.adapters import Adapter, LoraSettings, layers_of, merge
from scumble.errors import AdapterError

Roots = dict[str, nn.Module]
TARGETS = {"a": "attention", "b": "all-linear", "c": ["conv", "*.attn1.*"]}


def weights(roots: Roots) -> dict[str, tuple[int, Tensor]]:
    """Which parameter object each layer holds, and its bits."""
    return {
        path: (id(layer.weight), layer.weight.detach().clone()) for path, layer in layers_of(roots).items()
    }


def same(one: dict[str, tuple[int, Tensor]], two: dict[str, tuple[int, Tensor]]) -> bool:
    """The same objects with the same bits."""
    return all(one[p][0] == two[p][0] and one[p][1].equal(two[p][1]) for p in one)


def inject(roots: Roots, stir: Callable[..., Adapter]) -> dict[str, Adapter]:
    """Three adapters with different values and strengths, not attached."""
    made = {}
    for seed, (name, targets) in enumerate(TARGETS.items()):
        made[name] = stir(Adapter.inject(roots, targets, LoraSettings(rank=3, alpha=2), name=name), seed)
        made[name].strength = 0.4 + 0.3 * seed
        made[name].eject()
    return made


def test_merged_acts_like_attached(
    roots: Roots, run: Callable[[], Tensor], stir: Callable[..., Adapter]
) -> None:
    made = inject(roots, stir)
    y, before = run(), weights(roots)
    for adapter in made.values():
        adapter.attach()
    expected = run()
    modules = [type(m).__name__ for m in roots["unet"].modules()]
    with merge(list(made.values()), roots) as merged:
        torch.testing.assert_close(run(), expected, rtol=1e-4, atol=1e-5)
        assert not any(adapter.attached for adapter in made.values())
        assert "Adapted" not in [type(m).__name__ for m in roots["unet"].modules()]
        assert set(merged.layers) == {path for adapter in made.values() for path in adapter.deltas}
    assert [type(m).__name__ for m in roots["unet"].modules()] == modules
    assert torch.equal(run(), expected) and same(weights(roots), before)
    for adapter in made.values():
        adapter.eject()
    assert torch.equal(run(), y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_undone_in_any_order(roots: Roots, stir: Callable[..., Adapter], dtype: torch.dtype) -> None:
    roots["unet"].to(dtype)
    made = inject(roots, stir)
    before = weights(roots)
    for up, down in itertools.product(("abc", "cab"), itertools.permutations("abc")):
        merged = {name: merge(made[name], roots) for name in up}
        for name in down[:2]:
            merged[name].undo()
        left = {path: layer.weight.detach().clone() for path, layer in layers_of(roots).items()}
        merged[down[2]].undo()
        assert same(weights(roots), before)
        # What was left in the middle is what merging it alone gives, bit for bit: no trace of those that
        # went.
        with merge(made[down[2]], roots):
            assert all(layer.weight.equal(left[path]) for path, layer in layers_of(roots).items())
        assert same(weights(roots), before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sums_are_rounded_once(roots: Roots, stir: Callable[..., Adapter], dtype: torch.dtype) -> None:
    roots["unet"].to(dtype)
    made = inject(roots, stir)
    path = "unet.blocks.0.attn1.to_q"
    original = layers_of(roots)[path].weight.detach().clone()
    with merge([made["a"], made["b"]], roots):
        total = original.float()
        for name in "ab":
            total = total + made[name].strength * made[name].deltas[path].weight_delta(original).detach()
        assert layers_of(roots)[path].weight.equal(total.to(dtype))


def test_later_training_does_not_reach_a_merge(roots: Roots, stir: Callable[..., Adapter]) -> None:
    made = inject(roots, stir)
    first, second = merge(made["a"], roots), merge(made["b"], roots)
    stir(made["a"], 9)
    second.undo()
    after = {path: layer.weight.detach().clone() for path, layer in layers_of(roots).items()}
    first.undo()
    stir(made["a"], 0)
    with merge(made["a"], roots):
        assert all(layer.weight.equal(after[path]) for path, layer in layers_of(roots).items())


def test_into_another_model_of_the_same_shape(
    roots: Roots, run: Callable[[], Tensor], stir: Callable[..., Adapter]
) -> None:
    import copy

    fresh = copy.deepcopy(roots)
    adapter = stir(Adapter.inject(roots, "attention"))
    expected = run()
    merge(adapter, fresh)
    assert adapter.attached and torch.equal(run(), expected)
    roots["unet"] = fresh["unet"]
    torch.testing.assert_close(run(), expected, rtol=1e-4, atol=1e-5)


def test_the_model_was_moved_in_the_meantime(roots: Roots, stir: Callable[..., Adapter]) -> None:
    made = inject(roots, stir)
    before = weights(roots)
    merged = merge([made["a"], made["c"]], roots)
    roots["unet"].half()
    merged.undo()
    for path, layer in layers_of({"unet": roots["unet"]}).items():
        assert id(layer.weight) == before[path][0] and layer.weight.equal(before[path][1].half())


def test_strength_zero_changes_no_weight(roots: Roots, stir: Callable[..., Adapter]) -> None:
    made = inject(roots, stir)
    before = weights(roots)
    made["a"].strength = 0.0
    with merge(made["a"], roots) as merged:
        assert merged.layers == () and same(weights(roots), before)


def test_refusals_change_nothing(roots: Roots, stir: Callable[..., Adapter]) -> None:
    roots["unet"].half()
    made = inject(roots, stir)
    before = weights(roots)
    made["a"].strength = 1e8
    with pytest.raises(AdapterError, match="infinite or NaN in float16"):
        merge([made["b"], made["a"]], roots)
    made["a"].strength = torch.ones(2)
    with pytest.raises(AdapterError, match="one strength per sample"):
        merge([made["b"], made["a"]], roots)
    with pytest.raises(AdapterError, match="not in this model"):
        merge(made["b"], {"text_encoder": roots["text_encoder"]})
    assert same(weights(roots), before)
    merged = merge(made["b"], roots)
    merged.undo()
    with pytest.raises(AdapterError, match="undone before"):
        merged.undo()
