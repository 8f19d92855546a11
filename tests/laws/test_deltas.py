"""The laws of adapter families: every family in the registry runs through all of them.

1. The two views agree: output_delta(x, base(x), base) == operate(base, x, weight_delta(W)); `forward` is
   base(x) + strength times that, for numbers and per-sample strengths.
2. Strength is linear, and 0 is the base, bit for bit.
3. A fresh delta changes nothing. state -> from_state and state -> load_state give every bit back.
4. Inject and eject leave the same module objects and bit-identical outputs.
5. Every parameter trains: gradients agree with differences, and reach every tensor.
6. Parameters are fp32 whatever the base's dtype.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from scumble.adapters import FAMILIES, Adapted, Adapter, Delta, Layer, Metadata, layers_of, merge, operate
from scumble.errors import AdapterError

LAYERS: dict[str, tuple[Layer, tuple[int, ...]]] = {
    "linear": (nn.Linear(12, 10), (4, 5, 12)),
    "linear rows": (nn.Linear(12, 10, bias=False), (4, 12)),
    "conv 3x3 stride 2": (nn.Conv2d(6, 8, 3, stride=2, padding=1), (4, 6, 9, 9)),
    "conv 1x1": (nn.Conv2d(6, 8, 1), (4, 6, 5, 5)),
}
STRENGTHS: dict[str, float | Tensor] = {
    "1": 1.0,
    "0.3": 0.3,
    "-2": -2.0,
    "per sample": torch.tensor([0.0, 1.0, -0.5, 2.0]),
    "per sample, batch repeated": torch.tensor([0.25, 1.0]),
}


@pytest.fixture(params=list(FAMILIES))
def family(request: pytest.FixtureRequest) -> type[Delta]:
    """Every family there is."""
    return FAMILIES.get(request.param)


@pytest.fixture(params=list(LAYERS))
def layer(request: pytest.FixtureRequest) -> Layer:
    """A frozen layer, in fp64 so that the laws can be told from rounding."""
    return copy.deepcopy(LAYERS[request.param][0]).double().requires_grad_(False)


@pytest.fixture
def x(layer: Layer, request: pytest.FixtureRequest) -> Tensor:
    """Four samples for the layer."""
    shape = LAYERS[request.node.callspec.params["layer"]][1]
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(7))


def fresh(family: type[Delta], layer: Layer, rank: int = 3, alpha: float = 2.0) -> Delta:
    """An untrained delta."""
    generator = torch.Generator().manual_seed(0)
    return family.fresh(layer, family.settings(), rank=rank, alpha=alpha, generator=generator)


def trained(family: type[Delta], layer: Layer, **options: float) -> Delta:
    """A delta with values as if trained, in fp64 and eval mode."""
    delta = fresh(family, layer, **options).double().eval()
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


def test_the_registry_and_the_class_agree_on_the_name(family: type[Delta]) -> None:
    assert FAMILIES.get(family.family) is family
    assert family.settings().family == family.family


def test_both_views_agree(family: type[Delta], layer: Layer, x: Tensor) -> None:
    delta = trained(family, layer)
    weight_delta = delta.weight_delta(layer.weight)
    assert weight_delta.shape == layer.weight.shape and weight_delta.abs().max() > 0.01
    torch.testing.assert_close(
        delta.output_delta(x, layer(x), layer), operate(layer, x, weight_delta), rtol=1e-10, atol=1e-10
    )


@pytest.mark.parametrize("strength", STRENGTHS)
def test_the_adapted_layer_is_base_plus_strength_times_change(
    family: type[Delta], layer: Layer, x: Tensor, strength: str
) -> None:
    value, delta = STRENGTHS[strength], trained(family, layer)
    adapted = Adapted(layer)
    adapted.add("one", delta, value)
    change = operate(layer, x, delta.weight_delta(layer.weight))
    if isinstance(value, Tensor):
        value = value.repeat(x.shape[0] // len(value)).view(-1, *(1 for _ in x.shape[1:])).double()
    expected = layer(x) + value * change
    for context in (torch.enable_grad, torch.no_grad):
        with context():
            torch.testing.assert_close(adapted(x), expected, rtol=1e-6, atol=1e-6)


def test_strength_zero_is_the_base(family: type[Delta], layer: Layer, x: Tensor) -> None:
    adapted = Adapted(layer)
    adapted.add("one", trained(family, layer), 0.0)
    assert torch.equal(adapted(x), layer(x))


def test_a_fresh_delta_changes_nothing(family: type[Delta], layer: Layer, x: Tensor) -> None:
    delta = fresh(family, layer)
    assert not delta.weight_delta(layer.weight).any()
    torch.testing.assert_close(delta.eval()(x, layer), layer(x), rtol=0, atol=0)


@pytest.mark.parametrize("rank_stabilized", [False, True])
def test_state_gives_every_bit_back(family: type[Delta], layer: Layer, rank_stabilized: bool) -> None:
    delta = trained(family, layer).float()
    delta = family.from_state(
        layer, type(delta.state())(**{**vars(delta.state()), "rank_stabilized": rank_stabilized})
    )
    state = delta.state()
    again = family.from_state(layer, state)
    other = family.from_state(layer, state)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    other.load_state(state)
    for copied in (again, other):
        assert torch.equal(copied.weight_delta(layer.weight), delta.weight_delta(layer.weight))
        assert vars(copied.state()) | {"tensors": None} == vars(state) | {"tensors": None}
        assert all(
            torch.equal(copied.state().tensors[name], tensor) for name, tensor in state.tensors.items()
        )
    assert set(state.tensors) == {name for name, _ in delta.named_parameters()}


def test_tensors_that_do_not_fit_are_refused(family: type[Delta], layer: Layer) -> None:
    state = fresh(family, layer).state()
    for name in state.tensors:
        tensors = {**state.tensors, name: torch.cat([state.tensors[name]] * 2)}
        with pytest.raises(AdapterError, match=name):
            family.from_state(layer, type(state)(**{**vars(state), "tensors": tensors}))


def test_inject_and_eject_leave_no_trace(family: type[Delta], layer: Layer, x: Tensor) -> None:
    roots = model(layer)
    y, modules = roots["root"](x), list(roots["root"].modules())
    adapter = Adapter.inject(roots, "root.*", family.settings())
    adapter.eject()
    with stir(adapter).attach():
        assert not torch.equal(roots["root"](x), y)
    assert torch.equal(roots["root"](x), y)
    assert all(a is b for a, b in zip(modules, roots["root"].modules(), strict=True))


def test_load_acts_like_the_one_that_was_saved(family: type[Delta], layer: Layer, x: Tensor) -> None:
    roots = model(layer)
    adapter = stir(Adapter.inject(roots, "root.*", family.settings(rank=2, alpha=3.0)))
    y, state = roots["root"](x), adapter.state(Metadata(base_name="picturebook"))
    assert state.metadata.base_name == "picturebook"
    adapter.eject()
    with Adapter.load(roots, state) as loaded:
        assert torch.equal(roots["root"](x), y) and loaded.state(state.metadata).equal(state)


def test_merged_acts_like_attached(family: type[Delta], layer: Layer, x: Tensor) -> None:
    roots = model(layer)
    adapter = stir(Adapter.inject(roots, "root.*", family.settings(), strength=0.7))
    y = roots["root"](x)
    weight = layers_of(roots)["root.0"].weight
    with merge(adapter, roots):
        torch.testing.assert_close(roots["root"](x), y, rtol=1e-10, atol=1e-10)
    assert layers_of(roots)["root.0"].weight is weight and torch.equal(roots["root"](x), y)


def test_gradients_agree_with_differences(family: type[Delta], layer: Layer, x: Tensor) -> None:
    delta = trained(family, layer, rank=2)
    names = [name for name, _ in delta.named_parameters()]
    strength = torch.tensor([1.0, 0.5]).double().repeat(2).view(-1, *(1 for _ in x.shape[1:]))

    def forward(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(delta, dict(zip(names, values, strict=True)), (x, layer, strength))

    x = x[..., :5, :5] if isinstance(layer, nn.Conv2d) else x
    assert torch.autograd.gradcheck(forward, (x.requires_grad_(), *delta.parameters()))


def test_every_parameter_trains(family: type[Delta], layer: Layer, x: Tensor) -> None:
    delta = fresh(family, layer).double()
    optimizer = torch.optim.SGD(delta.parameters(), lr=0.1)
    before = {name: parameter.detach().clone() for name, parameter in delta.named_parameters()}
    for _ in range(3):
        optimizer.zero_grad()
        delta(x, layer).square().mean().backward()
        optimizer.step()
    assert not any(torch.equal(parameter, before[name]) for name, parameter in delta.named_parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parameters_are_fp32_whatever_the_base_is(
    family: type[Delta], layer: Layer, x: Tensor, dtype: torch.dtype
) -> None:
    layer, x = layer.to(dtype), x.to(dtype)
    delta = fresh(family, layer)
    with torch.no_grad():
        for parameter in delta.parameters():
            parameter.add_(0.1)
    assert all(parameter.dtype == torch.float32 for parameter in delta.to(dtype).parameters())
    assert delta.weight_delta(layer.weight).dtype == torch.float32
    y = delta(x, layer)
    assert y.dtype == dtype
    y.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in delta.parameters())
