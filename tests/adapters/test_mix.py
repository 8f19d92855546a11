"""Mixing: what the words promise, measured on the full changes."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from scumble.adapters import AdapterState, LayerState, LoraSettings, Metadata, TokenState
from scumble.adapters.factors import Keep, change_of
from scumble.adapters.families import FAMILIES
from scumble.adapters.mix import METHODS, MixSettings, Part, mix, subtract
from scumble.adapters.shapes import is_whole
from scumble.errors import AdapterError, ConfigError, NoLayerMatches, UnknownName, WrongBase

Q, K, CONV = "unet.down_blocks.0.attn1.to_q", "unet.up_blocks.1.attn2.to_k", "unet.mid_block.conv1"
SHAPES = {Q: (24, 20), K: (24, 32), CONV: (12, 10, 3, 3)}


def lora(path: str, rank: int = 3, seed: int = 0, alpha: float = 2.0) -> LayerState:
    """A random LoRA on a layer of SHAPES."""
    out, *inner = SHAPES[path]
    rng = torch.Generator().manual_seed(seed)
    tensors = {
        "down": torch.randn(rank, *inner, generator=rng),
        "up": torch.randn(out, rank, *(1 for _ in inner[1:]), generator=rng),
    }
    return LayerState("lora", rank, alpha, tensors)


def adapter(seed: int, rank: int = 3, paths: Iterable[str] = SHAPES, **said: str) -> AdapterState:
    """A random LoRA on `paths`."""
    layers = {path: lora(path, rank, seed + number) for number, path in enumerate(paths)}
    return AdapterState(layers, metadata=Metadata(**said))


def change(state: AdapterState, path: str) -> Tensor:
    """The full change of one layer, zero where there is none; fp64."""
    if path not in state.layers:
        return torch.zeros(SHAPES[path], dtype=torch.float64)
    return change_of(path, state.layers[path]).double()


@pytest.mark.parametrize("strengths", [(1.0, 1.0), (0.7, -1.3), (0.0, 2.0)])
def test_concat_is_the_sum_of_the_changes(strengths: tuple[float, float]) -> None:
    a, b = adapter(0), adapter(10, rank=5, paths=(K, CONV))
    mixed = mix([Part(a, strengths[0]), Part(b, strengths[1])])
    for path in SHAPES:
        expected = strengths[0] * change(a, path) + strengths[1] * change(b, path)
        torch.testing.assert_close(change(mixed.state, path), expected, rtol=1e-6, atol=1e-5)
    assert set(mixed.kept.values()) == {1.0} and mixed.vanished == ()
    assert mixed.state.layers[K].rank == (8 if strengths[0] else 5)


def test_one_adapter_at_strength_one_is_itself() -> None:
    a = adapter(0)
    for path in SHAPES:
        torch.testing.assert_close(change(mix([Part(a)]).state, path), change(a, path))


def test_strengths_by_block() -> None:
    a, b = adapter(0), adapter(10)
    blocks = {"unet.up_blocks.*": 0.25, "unet.*.to_q": 0.0}
    mixed = mix([Part(a, 1.0, blocks, "a"), Part(b, 0.5)]).state
    for path, strength in ((Q, 0.0), (K, 0.25), (CONV, 1.0)):
        expected = strength * change(a, path) + 0.5 * change(b, path)
        torch.testing.assert_close(change(mixed, path), expected, rtol=1e-6, atol=1e-5)
    with pytest.raises(NoLayerMatches, match=r"strengths of a.*unet\.nowhere"):
        mix([Part(a, blocks={"unet.nowhere.*": 1.0}, name="a")])


def test_svd_is_the_nearest_of_its_rank() -> None:
    a, b = adapter(0), adapter(10)
    mixed = mix([Part(a), Part(b)], MixSettings(method="svd", rank=4))
    for path in SHAPES:
        whole = (change(a, path) + change(b, path)).flatten(1)
        values = torch.linalg.svdvals(whole)
        left = (whole - change(mixed.state, path).flatten(1)).norm() ** 2
        assert left == pytest.approx(float(values[4:].square().sum()), rel=1e-4)
        assert mixed.kept[path] == pytest.approx(float(values[:4].square().sum() / values.square().sum()))
        assert mixed.state.layers[path].rank == 4


def test_svd_without_a_rank_takes_the_largest() -> None:
    mixed = mix([Part(adapter(0, rank=2)), Part(adapter(10, rank=5))], MixSettings(method="svd"))
    assert {layer.rank for layer in mixed.state.layers.values()} == {5}


class OneLayer(nn.Module):
    """For peft."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q = nn.Linear(20, 24, bias=False)


def by_peft(layers: list[LayerState], strengths: list[float], kind: str, **how: float) -> Tensor:
    """What peft makes of them, (24, 20)."""
    peft = pytest.importorskip("peft")
    model = None
    names = [f"a{n}" for n in range(len(layers))]
    for name, layer in zip(names, layers, strict=True):
        config = peft.LoraConfig(r=layer.rank, lora_alpha=layer.alpha, target_modules=["to_q"])
        if model is None:
            model = peft.get_peft_model(OneLayer(), config, adapter_name=name)
        else:
            model.add_adapter(name, config)
        module = model.base_model.model.to_q
        with torch.no_grad():
            module.lora_A[name].weight.copy_(layer.tensors["down"])
            module.lora_B[name].weight.copy_(layer.tensors["up"])
    assert model is not None
    model.add_weighted_adapter(names, strengths, "mixed", combination_type=kind, **how)
    return model.base_model.model.to_q.get_delta_weight("mixed").detach().double()


@pytest.mark.parametrize(
    ("method", "kind", "how"),
    [
        ("concat", "cat", {}),
        ("linear", "linear", {}),
        ("svd", "svd", {"svd_rank": 3}),
        ("ties", "ties_svd", {"svd_rank": 3, "density": 0.4}),
    ],
)
def test_it_is_what_peft_makes_of_them(method: str, kind: str, how: dict[str, float]) -> None:
    layers = [lora(Q, 3, seed) for seed in (0, 1, 2)]
    # peft's ties elects signs before strengths are counted: they must be equal to compare
    strengths = [0.8, 0.8, 0.8] if method == "ties" else [0.8, -0.6, 1.2]
    parts = [Part(AdapterState({Q: layer}), s) for layer, s in zip(layers, strengths, strict=True)]
    settings = MixSettings(method=method, density=float(how.get("density", 0.5)))
    mine = change(mix(parts, settings).state, Q)
    torch.testing.assert_close(mine, by_peft(layers, strengths, kind, **how), rtol=1e-3, atol=2e-4)


def test_linear_needs_equal_ranks() -> None:
    with pytest.raises(AdapterError, match=r"equal ranks.*\[2, 3\]"):
        mix([Part(adapter(0, 2)), Part(adapter(1, 3))], MixSettings(method="linear"))


def test_dare_keeps_the_change_on_average_and_its_seed() -> None:
    a, b = adapter(0), adapter(10)
    parts = [Part(a, 0.5), Part(b)]
    full = {path: 0.5 * change(a, path) + change(b, path) for path in SHAPES}
    runs = [
        mix(parts, MixSettings(method="dare", seed=seed, rank=24, density=0.7)).state for seed in range(60)
    ]
    for path, expected in full.items():
        mean = torch.stack([change(run, path) for run in runs]).mean(0)
        assert (mean - expected).norm() / expected.norm() < 0.2
        assert (change(runs[0], path) - expected).norm() / expected.norm() > 0.3
    again = mix(
        [Part(replace(p.state, layers=dict(reversed(p.state.layers.items()))), p.strength) for p in parts],
        MixSettings(method="dare", seed=0, rank=24, density=0.7),
    )
    assert all(torch.equal(change(again.state, path), change(runs[0], path)) for path in SHAPES)
    whole = mix(parts, MixSettings(method="dare", density=1.0, rank=24)).state
    torch.testing.assert_close(change(whole, Q), full[Q], rtol=1e-4, atol=1e-4)


def test_what_a_cut_costs_is_said() -> None:
    mixed = mix([Part(adapter(0)), Part(adapter(10))], MixSettings(method="ties"))
    for path, kept in mixed.kept.items():
        assert 0.1 < kept < 0.999 and mixed.state.layers[path].rank == 3


def test_families_mix_by_their_weight_delta() -> None:
    weights = {Q: torch.randn(SHAPES[Q][0], SHAPES[Q][1], generator=torch.Generator().manual_seed(3))}
    base = nn.Linear(20, 24, bias=False)
    base.weight = nn.Parameter(weights[Q])
    one = AdapterState({Q: lora(Q)})
    for name in FAMILIES:
        family = FAMILIES.get(name)
        rng = torch.Generator().manual_seed(1)
        delta = family.fresh(base, family.settings(rank=2), rank=2, alpha=2.0, generator=rng)
        with torch.no_grad():
            for parameter in delta.parameters():
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=rng))
        other = AdapterState({Q: delta.state()})
        mixed = mix([Part(one, 0.5), Part(other, -2.0)], weights=weights).state
        expected = 0.5 * change(one, Q) - 2.0 * delta.weight_delta(weights[Q]).detach().double()
        torch.testing.assert_close(change(mixed, Q), expected, rtol=1e-4, atol=1e-4)
        assert mixed.layers[Q].family == "lora"
        if family.thin(delta.state()) is not None or is_whole(delta.state()):
            assert torch.equal(change(mix([Part(one, 0.5), Part(other, -2.0)]).state, Q), change(mixed, Q)), (
                "the base says nothing that the tensors don't"
            )
            continue
        with pytest.raises(AdapterError, match=f"{name}.*Name the base"):
            mix([Part(one), Part(other)])


def test_a_kernel_that_the_tensors_do_not_tell_is_asked_of_the_base() -> None:
    flat = LayerState(
        "loha",
        1,
        1.0,
        {
            "w1_a": torch.ones(4, 1),
            "w1_b": torch.ones(1, 9),
            "w2_a": torch.ones(4, 1),
            "w2_b": torch.ones(1, 9),
        },
    )
    for name in ("conv1", "proj_in"):
        with pytest.raises(AdapterError, match=r"don't tell a convolution's kernel.*Name the base"):
            mix([Part(AdapterState({f"unet.{name}": flat}))])
    assert mix([Part(AdapterState({"unet.to_q": flat}))]).state.layers["unet.to_q"].rank == 1


def test_shapes_of_every_family_are_compared() -> None:
    small = LayerState("full", 1, 1.0, {"diff": torch.ones(3, 5)})
    with pytest.raises(WrongBase, match=r"\(24, 20\) in one and \(3, 5\) in two"):
        mix([Part(AdapterState({Q: lora(Q)}), name="one"), Part(AdapterState({Q: small}), name="two")])


@pytest.mark.parametrize("strength", [math.nan, math.inf, -math.inf])
def test_a_strength_that_is_not_finite_is_refused(strength: float) -> None:
    said = f"must be finite; that of fox is {strength}"
    with pytest.raises(AdapterError, match=said):
        Part(adapter(0), strength, name="fox")
    with pytest.raises(AdapterError, match=said):
        Part(adapter(0), 1.0, {"*": strength}, name="fox")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16, torch.float64])
def test_any_dtype_is_mixed_in_a_wide_one(dtype: torch.dtype) -> None:
    a, b = adapter(0), adapter(10)
    narrow = {
        path: replace(layer, tensors={name: t.to(dtype) for name, t in layer.tensors.items()})
        for path, layer in a.layers.items()
    }
    stored = {
        path: replace(layer, tensors={name: t.double() for name, t in layer.tensors.items()})
        for path, layer in narrow.items()
    }
    mixed = mix([Part(AdapterState(narrow)), Part(b)]).state
    for path in SHAPES:
        expected = change(AdapterState(stored), path) + change(b, path)
        torch.testing.assert_close(change(mixed, path), expected, rtol=1e-6, atol=1e-5)


def test_subtracting_gives_the_difference_back() -> None:
    a, b = adapter(0), adapter(10, rank=2)
    both = mix([Part(a), Part(b)]).state
    mixed, resized = subtract(Part(both), Part(b))
    assert mixed.vanished == resized.vanished == ()
    for path in SHAPES:
        torch.testing.assert_close(change(resized.state, path), change(a, path), rtol=1e-4, atol=1e-4)
        assert resized.state.layers[path].rank == 3
    _, smaller = subtract(Part(both), Part(b), Keep(rank=1))
    assert {layer.rank for layer in smaller.state.layers.values()} == {1}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_subtracting_itself_is_refused(dtype: torch.dtype) -> None:
    a = adapter(0)
    layers = {
        path: replace(layer, tensors={name: t.to(dtype) for name, t in layer.tensors.items()})
        for path, layer in a.layers.items()
    }
    same = replace(a, layers=layers)
    with pytest.raises(AdapterError, match=r"Nothing is left: a \(0.8\), b \(-0.8\) cancel in all 3 layers"):
        subtract(Part(same, 0.8, name="a"), Part(same, 0.8, name="b"))


def test_layers_that_cancel_are_named() -> None:
    a = adapter(0)
    other = replace(a, layers={**a.layers, Q: lora(Q, seed=77)})
    mixed = mix([Part(a), Part(other, -1.0)])
    assert mixed.vanished == (K, CONV) and set(mixed.state.layers) == {Q}


def test_different_bases_are_refused() -> None:
    with pytest.raises(WrongBase, match=r"first\.safetensors for sd1, second\.safetensors for sd2"):
        mix(
            [
                Part(adapter(0, base_family="sd1"), name="first.safetensors"),
                Part(adapter(1, base_family="sd2"), name="second.safetensors"),
            ]
        )
    other = LayerState("lora", 1, 1.0, {"down": torch.ones(1, 99), "up": torch.ones(24, 1)})
    with pytest.raises(WrongBase, match=r"\(24, 20\) in x and \(24, 99\) in y"):
        mix([Part(adapter(0), name="x"), Part(AdapterState({Q: other}), name="y")])


def test_what_they_say_of_their_base_stays_where_they_agree() -> None:
    said = {"base_name": "picturebook", "base_family": "sd1"}
    mixed = mix([Part(adapter(0, **said, settings="a")), Part(adapter(1, **said | {"base_name": "other"}))])
    assert mixed.state.metadata.base_family == "sd1" and mixed.state.metadata.base_name == ""
    assert mixed.state.metadata.settings == ""


def test_tokens_are_kept_and_never_overwritten() -> None:
    token = TokenState({"text_encoder": torch.ones(2, 4)})
    fox = replace(adapter(0), tokens={"<fox>": token})
    assert mix([Part(fox), Part(adapter(1))]).state.tokens.keys() == {"<fox>"}
    assert mix([Part(fox), Part(fox)]).state.tokens.keys() == {"<fox>"}
    other = replace(adapter(1), tokens={"<fox>": TokenState({"text_encoder": torch.zeros(2, 4)})})
    with pytest.raises(AdapterError, match="x and y both learned a token '<fox>'"):
        mix([Part(fox, name="x"), Part(other, name="y")])


def test_what_makes_no_sense_is_said() -> None:
    with pytest.raises(UnknownName, match=r"way to mix 'tyes'.*ties"):
        mix([Part(adapter(0))], MixSettings(method="tyes"))
    with pytest.raises(ConfigError, match="no adapter"):
        mix([])
    with pytest.raises(AdapterError, match="at a strength other than 0"):
        mix([Part(adapter(0), 0.0)])
    assert set(METHODS) == {"concat", "svd", "linear", "ties", "dare"} and LoraSettings().family == "lora"
