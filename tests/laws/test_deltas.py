"""The laws of adapter families: every family in the registry runs through all of them.

1. The two views agree: output_delta(x, base(x), base) == operate(base, x, weight_delta(W)); `forward` is
   base(x) + strength times that, for numbers and per-sample strengths.
2. Strength is linear, and 0 is the base, bit for bit.
3. A fresh delta changes nothing. state -> from_state and state -> load_state give every bit back.
4. Inject and eject leave the same module objects and bit-identical outputs.
5. Every parameter trains: gradients agree with differences (what a family holds constant held), and reach
   every tensor.
6. Parameters are fp32 whatever the base's dtype.
7. A merge is undone bit for bit, in any dtype.

A family with options runs through them once for each of `OPTIONS`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from scumble.adapters import FAMILIES, Adapted, Adapter, Delta, Layer, Metadata, layers_of, merge
from scumble.adapters.delta import DeltaSettings
from scumble.adapters.operate import operate
from scumble.errors import AdapterError

LAYERS: dict[str, tuple[Layer, tuple[int, ...]]] = {
    "linear": (nn.Linear(12, 10), (4, 5, 12)),
    "linear rows": (nn.Linear(12, 10, bias=False), (4, 12)),
    "conv 3x3 stride 2": (nn.Conv2d(6, 8, 3, stride=2, padding=1), (4, 6, 9, 9)),
    "conv 1x1": (nn.Conv2d(6, 8, 1), (4, 6, 5, 5)),
}
OPTIONS: tuple[dict[str, Any], ...] = (
    {"tucker": True, "magnitude": True},
    {"factor": 2, "rank": 1, "tucker": True},
    {"decompose_both": True, "factor": 4, "rank": 1},
    {"inputs": True},
)
"""Changes to a family's default settings; each is used by the families that have those settings."""
STRENGTHS: dict[str, float | Tensor] = {
    "1": 1.0,
    "0.3": 0.3,
    "-2": -2.0,
    "per sample": torch.tensor([0.0, 1.0, -0.5, 2.0]),
    "per sample, batch repeated": torch.tensor([0.25, 1.0]),
}


def cases() -> Iterator[Any]:
    """Every family there is, by its default settings and by its options."""
    for name in FAMILIES:
        settings = FAMILIES.get(name).settings
        yield pytest.param(settings(), id=name)
        for options in OPTIONS:
            if set(options) <= set(settings.model_fields):
                words = ", ".join(f"{key} {value}" for key, value in options.items())
                yield pytest.param(settings(**options), id=f"{name} {words}")


@pytest.fixture(params=list(cases()))
def settings(request: pytest.FixtureRequest) -> DeltaSettings:
    """Settings of every family there is."""
    return cast(DeltaSettings, request.param)


def family(settings: DeltaSettings) -> type[Delta]:
    """The family of the settings."""
    return FAMILIES.get(settings.family)


@pytest.fixture(params=list(LAYERS))
def layer(request: pytest.FixtureRequest) -> Layer:
    """A frozen layer, in fp64 so that the laws can be told from rounding."""
    return copy.deepcopy(LAYERS[request.param][0]).double().requires_grad_(False)


@pytest.fixture
def x(layer: Layer, request: pytest.FixtureRequest) -> Tensor:
    """Four samples for the layer."""
    shape = LAYERS[request.node.callspec.params["layer"]][1]
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(7))


def fresh(settings: DeltaSettings, layer: Layer, rank: int = 3, alpha: float = 2.0) -> Delta:
    """An untrained delta."""
    generator = torch.Generator().manual_seed(0)
    rank = settings.rank if "rank" in settings.model_fields_set else rank
    return family(settings).fresh(layer, settings, rank=rank, alpha=alpha, generator=generator)


def trained(settings: DeltaSettings, layer: Layer, **options: Any) -> Delta:
    """A delta with values as if trained, in fp64 and eval mode."""
    delta = fresh(settings, layer, **options).double().eval()
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in delta.parameters():
            parameter.add_(0.5 * torch.randn(parameter.shape, generator=rng, dtype=torch.float64))
    return delta


def stir(adapter: Adapter) -> Adapter:
    """Gives an adapter values as if trained, in fp64 and eval mode."""
    rng = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for delta in adapter.train(False).deltas.values():
            for parameter in delta.double().parameters():
                parameter.add_(torch.randn(parameter.shape, generator=rng, dtype=torch.float64))
    return adapter


def model(layer: Layer) -> dict[str, nn.Module]:
    """The layer in a model."""
    return {"root": nn.Sequential(layer)}


def test_the_registry_and_the_class_agree_on_the_name(settings: DeltaSettings) -> None:
    one = family(settings)
    assert FAMILIES.get(one.family) is one
    assert type(settings) is one.settings and one.settings().family == one.family


def test_both_views_agree(settings: DeltaSettings, layer: Layer, x: Tensor) -> None:
    delta = trained(settings, layer)
    weight_delta = delta.weight_delta(layer.weight)
    assert weight_delta.shape == layer.weight.shape and weight_delta.abs().max() > 0.01
    torch.testing.assert_close(
        delta.output_delta(x, layer(x), layer), operate(layer, x, weight_delta), rtol=1e-10, atol=1e-10
    )


def test_no_change_is_larger_than_the_family_says(settings: DeltaSettings, layer: Layer) -> None:
    delta = trained(settings, layer)
    assert delta.weight_delta(layer.weight).detach().abs().max() <= delta.largest()


@pytest.mark.parametrize("strength", STRENGTHS)
def test_the_adapted_layer_is_base_plus_strength_times_change(
    settings: DeltaSettings, layer: Layer, x: Tensor, strength: str
) -> None:
    value, delta = STRENGTHS[strength], trained(settings, layer)
    adapted = Adapted(layer)
    adapted.add("one", delta, value)
    change = operate(layer, x, delta.weight_delta(layer.weight))
    if isinstance(value, Tensor):
        value = value.repeat(x.shape[0] // len(value)).view(-1, *(1 for _ in x.shape[1:])).double()
    expected = layer(x) + value * change
    for context in (torch.enable_grad, torch.no_grad):
        with context():
            torch.testing.assert_close(adapted(x), expected, rtol=1e-6, atol=1e-6)


def test_strength_zero_is_the_base(settings: DeltaSettings, layer: Layer, x: Tensor) -> None:
    adapted = Adapted(layer)
    adapted.add("one", trained(settings, layer), 0.0)
    assert torch.equal(adapted(x), layer(x))


def test_a_fresh_delta_changes_nothing(settings: DeltaSettings, layer: Layer, x: Tensor) -> None:
    delta = fresh(settings, layer)
    assert not delta.weight_delta(layer.weight).any()
    torch.testing.assert_close(delta.eval()(x, layer), layer(x), rtol=0, atol=0)


@pytest.mark.parametrize("rank_stabilized", [False, True])
def test_state_gives_every_bit_back(settings: DeltaSettings, layer: Layer, rank_stabilized: bool) -> None:
    delta = trained(settings, layer).float()
    delta = family(settings).from_state(
        layer, type(delta.state())(**{**vars(delta.state()), "rank_stabilized": rank_stabilized})
    )
    state = delta.state()
    again = family(settings).from_state(layer, state)
    other = family(settings).from_state(layer, state)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    with torch.no_grad():
        for parameter, value in other.pairs(state):
            parameter.copy_(value)
    for copied in (again, other):
        assert torch.equal(copied.weight_delta(layer.weight), delta.weight_delta(layer.weight))
        assert vars(copied.state()) | {"tensors": None} == vars(state) | {"tensors": None}
        assert all(
            torch.equal(copied.state().tensors[name], tensor) for name, tensor in state.tensors.items()
        )
    assert set(state.tensors) == {name for name, _ in delta.named_parameters()}


def test_tensors_that_do_not_fit_are_refused(settings: DeltaSettings, layer: Layer) -> None:
    state = fresh(settings, layer).state()
    for name in state.tensors:
        tensors = {**state.tensors, name: torch.cat([state.tensors[name]] * 2)}
        with pytest.raises(AdapterError, match=name):
            family(settings).from_state(layer, type(state)(**{**vars(state), "tensors": tensors}))


def test_inject_and_eject_leave_no_trace(settings: DeltaSettings, layer: Layer, x: Tensor) -> None:
    roots = model(layer)
    y, modules = roots["root"](x), list(roots["root"].modules())
    adapter = Adapter.inject(roots, "root.*", settings)
    adapter.eject()
    with stir(adapter).attach():
        assert not torch.equal(roots["root"](x), y)
    assert torch.equal(roots["root"](x), y)
    assert all(a is b for a, b in zip(modules, roots["root"].modules(), strict=True))


def test_load_acts_like_the_one_that_was_saved(settings: DeltaSettings, layer: Layer, x: Tensor) -> None:
    roots = model(layer)
    adapter = stir(Adapter.inject(roots, "root.*", settings.model_copy(update={"rank": 2, "alpha": 3.0})))
    y, state = roots["root"](x), adapter.state(Metadata(base_name="picturebook"))
    assert state.metadata.base_name == "picturebook"
    adapter.eject()
    with Adapter.load(roots, state) as loaded:
        assert torch.equal(roots["root"](x), y) and loaded.state(state.metadata).equal(state)


def test_merged_acts_like_attached(settings: DeltaSettings, layer: Layer, x: Tensor) -> None:
    roots = model(layer)
    adapter = stir(Adapter.inject(roots, "root.*", settings, strength=0.7))
    y = roots["root"](x)
    weight = layers_of(roots)["root.0"].weight
    with merge(adapter, roots):
        torch.testing.assert_close(roots["root"](x), y, rtol=1e-10, atol=1e-10)
    assert layers_of(roots)["root.0"].weight is weight and torch.equal(roots["root"](x), y)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_a_merge_is_undone_bit_for_bit(settings: DeltaSettings, layer: Layer, dtype: torch.dtype) -> None:
    roots = model(layer.to(dtype))
    weight, bits = layer.weight, layer.weight.detach().clone()
    one = stir(Adapter.inject(roots, "root.*", settings, name="one"))
    two = stir(Adapter.inject(roots, "root.*", settings, name="two", strength=-0.3))
    first, second = merge(one, roots), merge(two, roots)
    assert not torch.equal(layer.weight, bits)
    first.undo()
    second.undo()
    assert layer.weight is weight and torch.equal(weight, bits)
    assert one.attached and two.attached


def test_gradients_agree_with_differences(
    settings: DeltaSettings, layer: Layer, x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    delta = trained(settings, layer, rank=2)
    held = delta.constants(layer.weight)
    monkeypatch.setattr(delta, "constants", lambda weight: held)
    names = [name for name, _ in delta.named_parameters()]
    strength = torch.tensor([1.0, 0.5]).double().repeat(2).view(-1, *(1 for _ in x.shape[1:]))

    def forward(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(delta, dict(zip(names, values, strict=True)), (x, layer, strength))

    x = x[..., :5, :5] if isinstance(layer, nn.Conv2d) else x
    assert torch.autograd.gradcheck(forward, (x.requires_grad_(), *delta.parameters()))


def test_every_parameter_trains(settings: DeltaSettings, layer: Layer, x: Tensor) -> None:
    delta = fresh(settings, layer).double()
    optimizer = torch.optim.SGD(delta.parameters(), lr=0.1)
    before = {name: parameter.detach().clone() for name, parameter in delta.named_parameters()}
    for _ in range(3):
        optimizer.zero_grad()
        delta(x, layer).square().mean().backward()
        optimizer.step()
    assert not any(torch.equal(parameter, before[name]) for name, parameter in delta.named_parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parameters_are_fp32_whatever_the_base_is(
    settings: DeltaSettings, layer: Layer, x: Tensor, dtype: torch.dtype
) -> None:
    layer, x = layer.to(dtype), x.to(dtype)
    delta = fresh(settings, layer)
    with torch.no_grad():
        for parameter in delta.parameters():
            parameter.add_(0.1)
    assert all(parameter.dtype == torch.float32 for parameter in delta.to(dtype).parameters())
    assert delta.weight_delta(layer.weight).dtype == torch.float32
    y = delta(x, layer)
    assert y.dtype == dtype
    y.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in delta.parameters())
