"""Adapted: what a layer with deltas gives out, and what it lets others read."""

import copy

import pytest
import torch
from torch import Tensor, nn

from scumble.adapters import Adapted, Delta, Layer, Lora
from scumble.adapters.adapted import check_strength, module_key
from scumble.errors import AdapterError


def lora(base: Layer, seed: int) -> Lora:
    """A LoRA with random values."""
    rng = torch.Generator().manual_seed(seed)
    return Lora({n: torch.randn(s, generator=rng) for n, s in Lora.shapes(base, 2).items()}, rank=2, alpha=1)


CASES = {
    "linear rows": (nn.Linear(6, 5), (4, 6)),
    "linear tokens": (nn.Linear(6, 5), (4, 3, 6)),
    "conv": (nn.Conv2d(3, 5, 3, stride=2, padding=1), (4, 3, 8, 8)),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[Adapted, Tensor]:
    """A layer with two adapters, and an input of four samples."""
    base, shape = CASES[request.param]
    layer = Adapted(copy.deepcopy(base).requires_grad_(False))
    layer.add("one", lora(layer.base, 1))
    layer.add("two", lora(layer.base, 2), 0.0)
    return layer, torch.randn(shape, generator=torch.Generator().manual_seed(3))


def delta(layer: Adapted, name: str) -> Delta:
    """The delta called `name`."""
    found = layer.deltas[module_key(name)]
    assert isinstance(found, Delta)
    return found


def test_strength_zero_is_the_base_bit_for_bit(case: tuple[Adapted, Tensor]) -> None:
    layer, x = case
    assert not torch.equal(layer(x), layer.base(x))
    layer.set_strength("one", 0.0)
    assert torch.equal(layer(x), layer.base(x))
    layer.set_strength("one", -0.0)
    assert torch.equal(layer(x), layer.base(x))


def test_an_adapter_at_strength_zero_is_not_computed(case: tuple[Adapted, Tensor]) -> None:
    layer, x = case
    delta(layer, "one").get_parameter("up").data.fill_(torch.nan)
    layer.set_strength("one", 0.0)
    assert torch.isfinite(layer(x)).all()


def test_strength_is_linear_in_the_change(case: tuple[Adapted, Tensor]) -> None:
    layer, x = case
    y = layer.base(x)
    whole = layer(x) - y
    layer.set_strength("one", -2.5)
    torch.testing.assert_close(layer(x) - y, -2.5 * whole, rtol=1e-4, atol=1e-4)


def test_adapters_add_up_in_any_order(case: tuple[Adapted, Tensor]) -> None:
    layer, x = case
    layer.set_strength("two", 0.5)
    y = layer.base(x)
    expected = y + delta(layer, "one").output_delta(x, y, layer.base)
    expected = expected + 0.5 * delta(layer, "two").output_delta(x, y, layer.base)
    torch.testing.assert_close(layer(x), expected)
    other = Adapted(layer.base)
    other.add("two", delta(layer, "two"), 0.5)
    other.add("one", delta(layer, "one"), 1.0)
    torch.testing.assert_close(other(x), expected)


@pytest.mark.parametrize("second", [0.0, 0.7])
def test_each_sample_has_its_own_strength(case: tuple[Adapted, Tensor], second: float) -> None:
    layer, x = case
    layer.set_strength("two", second)
    strengths = [0.0, 1.0, -0.5, 2.0]
    layer.set_strength("one", torch.tensor(strengths))
    mixed = layer(x)
    for row, strength in enumerate(strengths):
        layer.set_strength("one", strength)
        torch.testing.assert_close(mixed[row : row + 1], layer(x[row : row + 1]), rtol=1e-4, atol=1e-5)


def test_guidance_repeats_the_batch_as_a_block(case: tuple[Adapted, Tensor]) -> None:
    layer, x = case
    layer.set_strength("one", torch.tensor([0.25, 1.0]))
    short = layer(x)
    layer.set_strength("one", torch.tensor([0.25, 1.0, 0.25, 1.0]))
    assert torch.equal(short, layer(x))
    assert not torch.allclose(short[:1], short[2:3])


def test_strengths_that_cannot_be_shared_out(case: tuple[Adapted, Tensor]) -> None:
    layer, x = case
    layer.set_strength("one", torch.ones(3))
    with pytest.raises(AdapterError, match="3 per-sample strengths"):
        layer(x)


def test_a_single_row_has_no_samples() -> None:
    layer = Adapted(nn.Linear(6, 5))
    layer.add("one", lora(layer.base, 1), torch.ones(2))
    with pytest.raises(AdapterError, match="per-sample"):
        layer(torch.randn(6))


def test_reads_like_the_layer(case: tuple[Adapted, Tensor]) -> None:
    layer, _ = case
    names = {
        nn.Linear: ("in_features", "out_features"),
        nn.Conv2d: (
            *("in_channels", "out_channels", "kernel_size", "stride", "padding"),
            *("padding_mode", "dilation", "groups"),
        ),
    }
    mine, others = (
        names[type(layer.base)],
        names[nn.Conv2d if isinstance(layer.base, nn.Linear) else nn.Linear],
    )
    assert layer.weight is layer.base.weight and layer.bias is layer.base.bias
    assert all(getattr(layer, name) == getattr(layer.base, name) for name in mine)
    assert not any(hasattr(layer, name) for name in others)


def test_is_seen_by_print_and_state_dict(case: tuple[Adapted, Tensor]) -> None:
    layer, _ = case
    assert "one=1, two=0" in repr(layer) and "rank=2, alpha=1" in repr(layer)
    assert {"base.weight", "deltas.one.down", "deltas.two.up"} <= set(layer.state_dict())


def test_two_adapters_of_one_name() -> None:
    layer = Adapted(nn.Linear(6, 5))
    layer.add("one", lora(layer.base, 1))
    with pytest.raises(AdapterError, match="already has an adapter 'one'"):
        layer.add("one", lora(layer.base, 2))


@pytest.mark.parametrize("name", ["detail_v1.1", "pop", "keys", "training", "forward", "a%2Eb", "ä ö/ü", "%"])
def test_any_name_will_do(name: str) -> None:
    layer = Adapted(nn.Linear(6, 5))
    layer.add(name, lora(layer.base, 1))
    assert name in layer and "other" not in layer
    layer.remove(name)
    assert name not in layer and not layer.strengths


def test_no_two_names_share_a_key() -> None:
    names = ["a.b", "a%2Eb", "pop", "%70op", "%2570op", "a%252Eb"]
    assert len({module_key(name) for name in names}) == len(names)


@pytest.mark.parametrize(
    "bad", [float("nan"), float("inf"), torch.tensor([1.0, torch.nan]), torch.ones(2, 2), torch.ones(0)]
)
def test_strengths_that_are_none(bad: float | Tensor) -> None:
    with pytest.raises(AdapterError, match="strength"):
        check_strength(bad)


def test_strengths_are_kept_as_they_were_given() -> None:
    given = torch.tensor([1, 2])
    kept = check_strength(given)
    given[0] = 5
    assert isinstance(kept, Tensor) and kept.tolist() == [1.0, 2.0]
    assert check_strength(torch.tensor(0.5)) == 0.5
