"""Adapter: into the model, out of it, and nothing left behind."""

import gc
import hashlib
import random
import weakref
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from scumble.adapters import (
    Adapted,
    Adapter,
    AdapterState,
    LayerState,
    Lora,
    LoraSettings,
    TokenState,
    layers_of,
)
from scumble.errors import AdapterError, NoLayerMatches, NotFinite, UnknownName
from scumble.rng import Streams

Roots = dict[str, nn.Module]
Run = Callable[[], Tensor]
Stir = Callable[..., Adapter]


def fingerprint(roots: Roots) -> str:
    """sha256 over every name and bit of the model, and over which module objects it holds."""
    digest = hashlib.sha256()
    for root in roots.values():
        for name, module in root.named_modules(remove_duplicate=False):
            digest.update(f"{name} {id(module)} {module.training} {sorted(module.__dict__)}".encode())
        for name, tensor in root.state_dict().items():
            digest.update(name.encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def test_injecting_changes_no_output_and_ejecting_leaves_nothing(roots: Roots, run: Run, stir: Stir) -> None:
    before, y = fingerprint(roots), run()
    adapter = Adapter.inject(roots, ["attention+mlp", "conv"])
    assert torch.equal(run(), y) and adapter.attached
    assert adapter.idle_layers() == list(adapter.deltas)
    stir(adapter)
    assert not torch.allclose(run(), y) and not adapter.idle_layers()
    adapter.eject()
    assert fingerprint(roots) == before and torch.equal(run(), y) and not adapter.attached


def test_strength_zero_and_disabled_are_the_base_bit_for_bit(roots: Roots, run: Run, stir: Stir) -> None:
    y = run()
    adapter = stir(Adapter.inject(roots, ["attention+mlp", "conv"]))
    changed = run()
    with adapter.disabled():
        assert torch.equal(run(), y)
    assert torch.equal(run(), changed)
    adapter.strength = 0
    assert torch.equal(run(), y) and adapter.strength == 0.0
    adapter.strength = 1.0
    assert torch.equal(run(), changed)
    with pytest.raises(ZeroDivisionError), adapter.disabled():
        1 / 0  # noqa: B018
    assert torch.equal(run(), changed)


def test_several_adapters_ejected_in_any_order(roots: Roots, run: Run, stir: Stir) -> None:
    before, y = fingerprint(roots), run()
    targets = {"a": "attention", "b": "all-linear", "c": ["conv", "*.attn1.*"]}
    for order in ("abc", "cba", "bac"):
        adapters = {
            name: stir(Adapter.inject(roots, targets[name], name=name), seed)
            for seed, name in enumerate("abc")
        }
        for name in order[:2]:
            adapters[name].eject()
        alone = run()
        assert not torch.allclose(alone, y)
        adapters[order[2]].eject()
        assert fingerprint(roots) == before
        with adapters[order[2]].attach():
            assert torch.equal(run(), alone)
        assert fingerprint(roots) == before


def test_two_hundred_random_cycles_leave_no_trace(roots: Roots, run: Run, stir: Stir) -> None:
    before, y, choose = fingerprint(roots), run(), random.Random(0)
    living: list[Adapter] = []
    for cycle in range(200):
        act = choose.choice(("inject", "inject", "strength", "eject", "eject", "fail"))
        if act == "inject" and len(living) < 4:
            targets = choose.choice(
                ("attention", "mlp", "conv", "all-linear", ["*.to_q", "text_encoder.attention"])
            )
            living.append(
                stir(Adapter.inject(roots, targets, name=f"adapter {cycle}.{choose.random()}"), cycle)
            )
        elif act == "strength" and living:
            choose.choice(living).strength = choose.choice((0.0, 1.0, -2.0, torch.rand(2)))
        elif act == "eject" and living:
            living.pop(choose.randrange(len(living))).eject()
        elif act == "fail" and living:
            with pytest.raises(AdapterError):
                Adapter.inject(roots, "conv", name=living[0].name)
        if cycle % 20 == 0:
            run()
    choose.shuffle(living)
    for adapter in living:
        adapter.eject()
    assert fingerprint(roots) == before and torch.equal(run(), y)


def test_ejected_adapters_are_freed(roots: Roots) -> None:
    adapter = Adapter.inject(roots, "attention")
    watched = [weakref.ref(delta) for delta in adapter.deltas.values()]
    adapter.eject()
    del adapter
    gc.collect()
    assert not any(ref() for ref in watched)


def test_the_start_depends_on_the_seed_and_the_layer_alone(roots: Roots) -> None:
    def values(targets: str, seed: int) -> dict[str, Tensor]:
        torch.rand(seed + 3)  # the global generator has no say
        with Adapter.inject(roots, targets, streams=Streams(seed)) as adapter:
            return {name: parameter.detach().clone() for name, parameter in adapter.named_parameters()}

    few, many, other = values("attention", 5), values("all-linear", 5), values("attention", 6)
    assert all(torch.equal(few[name], many[name]) for name in few)
    downs = [name for name in few if name.endswith(".down")]
    assert not any(torch.equal(few[name], other[name]) for name in downs)
    assert len({few[name].sum().item() for name in downs}) == len(downs)


def test_rank_and_alpha_per_pattern(roots: Roots) -> None:
    settings = LoraSettings(
        rank=4,
        rank_pattern={"*.attn2.*": 2, "*.to_q": 8},
        alpha_pattern={"*.to_v": 6.0},
        rank_stabilized=False,
    )
    adapter = Adapter.inject(roots, "attention", settings)
    assert adapter.deltas["unet.blocks.0.attn1.to_q"].rank == 8
    two = adapter.deltas["unet.blocks.0.attn2.to_q"]
    assert (two.rank, two.alpha, two.scale) == (2, 2.0, 1.0)  # no alpha said: each layer's rank
    assert adapter.deltas["unet.blocks.0.attn1.to_v"].scale == 6 / 4
    assert adapter.parameter_count == sum(p.numel() for p in adapter.parameters())


def test_one_alpha_for_all_ranks(roots: Roots) -> None:
    adapter = Adapter.inject(roots, "attention", LoraSettings(rank=4, alpha=8, rank_pattern={"*.attn2.*": 2}))
    assert {(d.rank, d.scale) for d in adapter.deltas.values()} == {(4, 2.0), (2, 4.0)}


def test_state_and_load(roots: Roots, run: Run, stir: Stir) -> None:
    settings = LoraSettings(rank=3, alpha=2, rank_stabilized=True, rank_pattern={"*.attn2.*": 5})
    adapter = stir(Adapter.inject(roots, ["attention", "conv", "text_encoder.mlp"], settings))
    y, state = run(), adapter.state()
    adapter.eject()
    shuffled = AdapterState(dict(reversed(state.layers.items())))  # the order of keys has no meaning
    loaded = Adapter.load(roots, shuffled, name="again")
    assert torch.equal(run(), y) and loaded.state().equal(state)
    assert list(loaded.deltas) == list(adapter.deltas)
    assert not any(p.requires_grad for p in loaded.parameters()) and not any(
        d.training for d in loaded.deltas.values()
    )
    loaded.eject()
    assert all(p.requires_grad for p in Adapter.load(roots, state, trainable=True).parameters())


@pytest.mark.parametrize("shift", [0, 1])
def test_a_fresh_state_is_taken_where_it_lies_well(shift: int, roots: Roots, run: Run, stir: Stir) -> None:
    with stir(Adapter.inject(roots, "attention", LoraSettings(rank=16))) as adapter:
        y, state = run(), adapter.state()
    count = sum(tensor.numel() for layer in state.layers.values() for tensor in layer.tensors.values())
    memory, end = torch.empty(count + shift), shift  # as a file's tensors lie, or one number further

    def laid(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal end
        end += tensor.numel()
        return memory[end - tensor.numel() : end].view(tensor.shape).copy_(tensor)

    layers = {
        path: replace(layer, tensors={name: laid(tensor) for name, tensor in layer.tensors.items()})
        for path, layer in state.layers.items()
    }
    with Adapter.load(roots, AdapterState(layers), fresh=True) as loaded:
        assert torch.equal(run(), y)
        for path, delta in loaded.deltas.items():
            for name, parameter in delta.named_parameters():
                given = layers[path].tensors[name]
                assert parameter.data_ptr() % 64 == 0
                assert (parameter.data_ptr() == given.data_ptr()) == (given.data_ptr() % 64 == 0)
    with Adapter.load(roots, AdapterState(layers)) as loaded:
        memory.zero_()  # nobody's but the caller's
        assert torch.equal(run(), y)


def test_state_is_a_copy(roots: Roots, stir: Stir) -> None:
    adapter = stir(Adapter.inject(roots, "attention"))
    state = adapter.state()
    values = next(iter(state.layers.values())).tensors["up"].clone()
    stir(adapter, 1)
    assert torch.equal(next(iter(state.layers.values())).tensors["up"], values)


def test_load_state_keeps_the_parameters(roots: Roots, run: Run, stir: Stir) -> None:
    adapter = stir(Adapter.inject(roots, ["attention", "conv"]))
    state, y, parameters = adapter.state(), run(), list(adapter.parameters())
    stir(adapter, 1)
    assert not torch.equal(run(), y)
    adapter.load_state(state)
    assert torch.equal(run(), y)
    assert all(a is b for a, b in zip(parameters, adapter.parameters(), strict=True))


@pytest.mark.parametrize(
    ("settings", "targets", "said"),
    [
        (LoraSettings(rank=4), "all-linear", "4 of its layers are not here"),
        (LoraSettings(rank=8), "attention", "rank 4 here, 8 there"),
        (LoraSettings(rank=4, alpha=8), "attention", "alpha 4.0 here, 8.0 there"),
        (LoraSettings(rank=4, rank_stabilized=True), "attention", "rank_stabilized False here, True there"),
    ],
)
def test_a_state_of_another_adapter_is_refused_whole(
    roots: Roots, stir: Stir, settings: LoraSettings, targets: str, said: str
) -> None:
    with Adapter.inject(roots, targets, settings) as other:
        state = stir(other, 1).state()
    adapter = stir(Adapter.inject(roots, "attention"))
    before = adapter.state()
    with pytest.raises(AdapterError, match=said):
        adapter.load_state(state)
    assert adapter.state().equal(before)


def broken(state: AdapterState, **change: object) -> AdapterState:
    """`state` with the last layer changed."""
    path = list(state.layers)[-1]
    facts = {**vars(state.layers[path]), **change}
    return AdapterState({**state.layers, path: LayerState(**facts)})


def test_an_error_leaves_the_model_untouched(
    roots: Roots, stir: Stir, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Adapter.inject(roots, "attention") as adapter:
        state = stir(adapter).state()
    before = fingerprint(roots)
    up, down = torch.randn(8, 4), torch.randn(4, 8)
    for bad, error, said in (
        (
            broken(state, tensors={"up": up, "down": torch.randn(4, 7)}),
            AdapterError,
            r"unet.*to_out.0: .*down 4x7",
        ),
        (broken(state, tensors={"up": up.T, "down": down.T}), AdapterError, "down 8x4"),
        (broken(state, tensors={"up": up}), AdapterError, "up 8x4 don't fit"),
        (broken(state, tensors={"up": up, "down": down, "mid": up}), AdapterError, "mid 8x4"),
        (
            broken(state, tensors={"up": up * torch.nan, "down": down}),
            NotFinite,
            r"1 tensors hold NaN .*to_out.0.up",
        ),
        (broken(state, family="nonesuch"), UnknownName, "adapter family 'nonesuch'"),
        (
            AdapterState({**state.layers, "unet.no.such": state.layers[next(iter(state.layers))]}),
            AdapterError,
            "1 of",
        ),
        (AdapterState({}), AdapterError, "changes no layer"),
        (AdapterState(state.layers, {"<dog>": TokenState({})}), AdapterError, "<dog>"),
    ):
        with pytest.raises(error, match=said):
            Adapter.load(roots, bad)
        assert fingerprint(roots) == before

    for targets, settings in (
        (["attention", "nothing.here"], LoraSettings()),
        ("conv", LoraSettings(rank_pattern={"x": 2})),
    ):
        with pytest.raises(NoLayerMatches):
            Adapter.inject(roots, targets, settings)
        assert fingerprint(roots) == before

    # Even when it happens half way.
    calls, add = [], Adapted.add

    def failing(self: Adapted, *args: object) -> None:
        calls.append(1)
        if len(calls) == 7:
            raise MemoryError
        add(self, *args)

    first = Adapter.inject(roots, "*.attn1.*", name="first")
    during = fingerprint(roots)
    monkeypatch.setattr(Adapted, "add", failing)
    with pytest.raises(MemoryError):
        Adapter.load(roots, state)
    assert len(calls) == 7 and fingerprint(roots) == during
    first.eject()
    assert fingerprint(roots) == before


def test_names_are_unique_in_a_model(roots: Roots) -> None:
    Adapter.inject(roots, "attention", name="style")
    with pytest.raises(AdapterError, match="already has an adapter 'style'"):
        Adapter.inject(roots, "conv", name="style")
    with pytest.raises(AdapterError, match="not empty"):
        Adapter.inject(roots, "conv", name="")


def test_in_and_out_twice(roots: Roots) -> None:
    adapter = Adapter.inject(roots, "attention")
    with pytest.raises(AdapterError, match="already in the model"):
        adapter.attach()
    with adapter:
        adapter.eject()
    with pytest.raises(AdapterError, match="not in the model"):
        adapter.eject()


def test_a_layer_that_somebody_replaced_is_not_ejected_in_silence(roots: Roots) -> None:
    adapter = Adapter.inject(roots, "*.attn1.to_q")
    during = roots["unet"].blocks[1].attn1.to_q
    roots["unet"].blocks[1].attn1.to_q = nn.Identity()
    with pytest.raises(AdapterError, match=r"blocks.1.attn1.to_q' was replaced by a Identity"):
        adapter.eject()
    assert isinstance(roots["unet"].blocks[0].attn1.to_q, Adapted)
    roots["unet"].blocks[1].attn1.to_q = during
    adapter.eject()


def test_a_strength_that_is_none_changes_nothing(roots: Roots, run: Run, stir: Stir) -> None:
    adapter = stir(Adapter.inject(roots, "attention", strength=0.5))
    y = run()
    with pytest.raises(AdapterError, match="finite"):
        adapter.strength = float("nan")
    assert adapter.strength == 0.5 and torch.equal(run(), y)


def test_one_batch_serves_many_strengths(roots: Roots, run: Run, stir: Stir) -> None:
    adapter = stir(Adapter.inject(roots, ["attention+mlp", "conv"]))
    each = []
    for strength in (0.0, 0.3):
        adapter.strength = strength
        each.append(run())
    adapter.strength = torch.tensor([0.0, 0.3])
    mixed = run()  # four samples: the two strengths, twice
    for row in range(4):
        torch.testing.assert_close(mixed[row], each[row % 2][row], rtol=1e-4, atol=1e-5)


def test_training_moves_the_adapter_and_nothing_else(roots: Roots, run: Run) -> None:
    before = {path: layer.weight.clone() for path, layer in layers_of(roots).items()}
    adapter = Adapter.inject(roots, ["attention+mlp", "conv"])
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2)
    losses = []
    for _ in range(8):
        loss = (run() - 1).square().mean()
        loss.backward()
        if losses:  # at the first step `up` is zero, and so is the gradient of `down`
            assert all(p.grad is not None and p.grad.any() for p in adapter.parameters())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0] and not adapter.idle_layers()
    assert all(torch.equal(layer.weight, before[path]) for path, layer in layers_of(roots).items())


def test_gradient_checkpointing_gives_the_same_gradients(roots: Roots, run: Run, stir: Stir) -> None:
    adapter = stir(Adapter.inject(roots, ["attention+mlp", "conv"]))

    def gradients() -> list[Tensor]:
        return list(torch.autograd.grad(run().square().sum(), list(adapter.parameters())))

    plain = gradients()
    forwards = [block.forward for block in roots["unet"].blocks]
    for block, forward in zip(roots["unet"].blocks, forwards, strict=True):
        block.forward = lambda *x, forward=forward: checkpoint(forward, *x, use_reentrant=False)
    assert all(map(torch.equal, plain, gradients()))


def test_inside_autocast_checkpointed(roots: Roots, run: Run, stir: Stir) -> None:
    adapter = stir(Adapter.inject(roots, "all-linear"))
    block = roots["unet"].blocks[0]
    forward = block.forward
    block.forward = lambda *x: checkpoint(forward, *x, use_reentrant=False)
    with torch.autocast("cpu", torch.bfloat16):
        loss = run().float().square().sum()
    loss.backward()
    assert all(
        p.grad is not None and p.grad.dtype == torch.float32 and p.grad.any() for p in adapter.parameters()
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_casting_the_model_leaves_the_adapter_in_fp32(
    roots: Roots, run: Run, stir: Stir, dtype: torch.dtype
) -> None:
    adapter = stir(Adapter.inject(roots, "attention"))
    state = adapter.state()
    roots["unet"].to(dtype)
    assert next(iter(layers_of(roots).values())).weight.dtype == dtype
    assert adapter.state().equal(state)


@pytest.mark.slow
def test_compiled(roots: Roots, run: Run, stir: Stir) -> None:
    """torch.compile sees one graph, with the same outputs and gradients."""
    adapter = stir(Adapter.inject(roots, ["*.attn1.to_q", "unet.conv_in"]))
    parameters = list(adapter.parameters())
    y = run()
    expected = torch.autograd.grad(y.square().mean(), parameters)
    denoiser = roots["unet"]
    torch._dynamo.reset()
    roots["unet"] = torch.compile(denoiser, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(run(), y, rtol=1e-4, atol=1e-5)
    actual = torch.autograd.grad(run().square().mean(), parameters)
    for mine, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    adapter.strength = torch.tensor([0.5, 1.0])
    mixed = run()
    roots["unet"] = denoiser
    torch.testing.assert_close(mixed, run(), rtol=1e-4, atol=1e-5)


def test_the_modes_of_the_base_are_kept(roots: Roots) -> None:
    roots["unet"].eval()
    adapter = Adapter.inject(roots, "attention", LoraSettings(dropout=0.1))
    wrapper = roots["unet"].blocks[0].attn1.to_q
    assert not wrapper.training and all(delta.training for delta in adapter.deltas.values())
    adapter.train(False)
    assert not any(delta.training for delta in adapter.deltas.values())
    assert isinstance(next(iter(adapter.deltas.values())), Lora)


def test_says_what_it_is(roots: Roots) -> None:
    adapter = Adapter.inject(roots, "attention")
    assert repr(adapter) == "<Adapter 'default': lora, 16 layers, 992 parameters, attached>"
    assert adapter.matched is not None and adapter.matched.counts == {"attention": 16}
