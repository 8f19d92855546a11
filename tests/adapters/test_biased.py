"""Changes of biases and normalisations: what they add up to, and that no trace of them stays."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from scumble.adapters import Adapter, AdapterState, LayerState, layers_of, merge
from scumble.adapters.biased import changes_bias, delta_of
from scumble.adapters.factors import Keep
from scumble.adapters.mix import Part, mix
from scumble.adapters.resize import resize
from scumble.errors import AdapterError

G = torch.Generator().manual_seed(0)


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=G)


def model() -> nn.Module:
    """A convolution, its normalisation, a layer without a bias, and its normalisation."""
    torch.manual_seed(1)
    return (
        nn.Sequential(
            nn.Conv2d(4, 8, 3, padding=1),
            nn.GroupNorm(2, 8),
            nn.SiLU(),
            nn.Flatten(2),
            nn.Linear(25, 6, bias=False),
            nn.LayerNorm(6),
        )
        .double()
        .requires_grad_(False)
    )


STATE = AdapterState(
    {
        "m.0": LayerState(
            "lora",
            2,
            3.0,
            {"down": randn(2, 4, 3, 3), "up": randn(8, 2, 1, 1), "bias": randn(8), "up_bias": randn(8)},
        ),
        "m.1": LayerState("full", 1, 1.0, {"diff": randn(8), "bias": randn(8)}),
        "m.4": LayerState("full", 1, 1.0, {"bias": randn(6)}),
        "m.5": LayerState("full", 1, 1.0, {"diff": randn(6)}),
    }
)


def changed(base: nn.Module, strength: float) -> nn.Module:
    """The model with the change written into its parameters by hand."""
    found, parts = copy.deepcopy(base), {path: layer.tensors for path, layer in STATE.layers.items()}
    conv = parts["m.0"]
    weight = 1.5 * (conv["up"].flatten(1).double() @ conv["down"].flatten(1).double())
    found[0].weight += strength * weight.view(8, 4, 3, 3)
    found[0].bias += strength * (conv["bias"] + 1.5 * conv["up_bias"])
    found[1].weight += strength * parts["m.1"]["diff"]
    found[1].bias += strength * parts["m.1"]["bias"]
    found[4].bias = nn.Parameter(strength * parts["m.4"]["bias"].double())
    found[5].weight += strength * parts["m.5"]["diff"]
    return found


@pytest.mark.parametrize("strength", [1.0, -0.5])
@pytest.mark.parametrize("gradients", [True, False])
def test_outputs_are_those_of_changed_parameters_and_leave_no_trace(strength: float, gradients: bool) -> None:
    base, x = model(), randn(3, 4, 5, 5).double()
    before, modules = base(x), list(base.modules())
    with torch.set_grad_enabled(gradients), Adapter.load({"m": base}, STATE, strength=strength) as adapter:
        torch.testing.assert_close(base(x), changed(base_of(base), strength)(x), rtol=1e-6, atol=1e-6)
        assert adapter.state().equal(STATE) and not adapter.idle_layers()
    assert torch.equal(base(x), before)
    assert all(one is other for one, other in zip(modules, base.modules(), strict=True))


def base_of(adapted: nn.Module) -> nn.Module:
    """A fresh one with the same parameters."""
    return model()


def test_every_sample_has_its_own_strength() -> None:
    base, x = model(), randn(2, 4, 5, 5).double()
    whole = changed(base, 1.0)(x)
    with torch.no_grad(), Adapter.load({"m": base}, STATE, strength=torch.tensor([0.0, 1.0])):
        found = base(x)
    assert torch.equal(found[0], base(x)[0])
    torch.testing.assert_close(found[1], whole[1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_merging_changes_biases_and_is_undone_bit_for_bit(dtype: torch.dtype) -> None:
    base, x = model().to(dtype), randn(3, 4, 5, 5).to(dtype)
    adapter = Adapter.load({"m": base}, STATE)
    y, parameters = base(x), dict(base_of(base).named_parameters())
    with merge(adapter, {"m": base}):
        torch.testing.assert_close(base(x), y, rtol=1e-2, atol=2e-2 if dtype == torch.float16 else 1e-6)
        assert base[4].bias is not None
    adapter.eject()
    assert base[4].bias is None
    assert all(torch.equal(p, parameters[name].to(dtype)) for name, p in base.named_parameters())


def test_a_normalisation_is_a_layer_only_where_it_is_asked_for() -> None:
    roots = {"m": model()}
    assert list(layers_of(roots)) == ["m.0", "m.4"]
    assert list(layers_of(roots, norms=True)) == ["m.0", "m.1", "m.4", "m.5"]
    lora = AdapterState({"m.1": LayerState("lora", 1, 1.0, {"down": randn(1, 8), "up": randn(8, 1)})})
    with pytest.raises(AdapterError, match=r"m\.1"):
        Adapter.load(roots, lora)


def test_what_is_no_change_of_a_weight_is_not_mixed_nor_resized() -> None:
    for path, word in (("m.0", "bias"), ("m.4", "bias"), ("m.5", "normalisation")):
        state = AdapterState({path: STATE.layers[path]})
        for work in (lambda s=state: resize(s, Keep(rank=1)), lambda s=state: mix([Part(s)])):
            with pytest.raises(AdapterError, match=f"changed in its {word}"):
                work()
    assert [changes_bias(layer) for layer in STATE.layers.values()] == [True, True, True, False]


def test_a_bias_of_another_length_is_refused() -> None:
    with pytest.raises(AdapterError, match=r"bias has shape \(7,\) on a layer of 6 outputs"):
        delta_of(nn.Linear(25, 6), LayerState("full", 1, 1.0, {"bias": randn(7)}))
