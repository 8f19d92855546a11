"""The laws of convolutions whose weights lie in the order of a CPU's kernels.

1. Outputs and gradients are those of the plain layer, to rounding.
2. They are the same bits whatever is kept: at the first call and later, at another size, with no memory to spare.
3. A changed weight is noticed, however it was changed.
4. `unpack` is the inverse of `prepack`, and what others do to a model (copies, casts, files) sees the plain layer.
5. Every adapter family acts and trains on it as on the plain layer.
"""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from scumble.adapters import FAMILIES, Adapter, merge
from scumble.adapters.lora import LoraSettings
from scumble.models import FAMILIES as BASES
from scumble.models import prepacked
from scumble.models.ledger import Theatre
from scumble.models.prepacked import Prepacked, forget, pays, prepack, size_packed, unpack, works
from scumble.models.quantized import Quantized, quantize

KINDS: dict[str, dict[str, Any]] = {
    "3x3": {"kernel_size": 3, "padding": 1},
    "1x1": {"kernel_size": 1},
    "in groups": {"kernel_size": 3, "padding": 1, "groups": 4},
    "without padding or bias": {"kernel_size": 3, "bias": False},
    "in steps of two": {"kernel_size": 3, "stride": 2, "padding": 1},
    "spread": {"kernel_size": 3, "padding": 2, "dilation": 2},
    "padded more than its kernel": {"kernel_size": 3, "padding": 3},
    "not square": {"kernel_size": (5, 1), "padding": (2, 0)},
}
NEAR = {torch.float32: 2e-5, torch.bfloat16: 2e-2}
AMPLE = 2**50

needs_blocks = pytest.mark.skipif(
    not (works(torch.float32) and works(torch.bfloat16)),
    reason="this processor or torch multiplies by no blocks",
)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small layers count as large here, and memory as ample."""
    monkeypatch.setattr(prepacked, "SMALLEST", 1)
    monkeypatch.setattr(prepacked, "free_memory", lambda: AMPLE)


@pytest.fixture(params=list(KINDS))
def kind(request: pytest.FixtureRequest) -> str:
    """Every kind of convolution."""
    return cast(str, request.param)


def layer(kind: str = "3x3", dtype: torch.dtype = torch.float32) -> nn.Conv2d:
    """A frozen convolution, 24 channels to 40."""
    torch.manual_seed(0)
    return nn.Conv2d(24, 40, **KINDS[kind]).to(dtype).requires_grad_(False)


def pictures(batch: int = 2, height: int = 12, width: int = 9, dtype: torch.dtype = torch.float32) -> Tensor:
    """Something to be convolved."""
    generator = torch.Generator().manual_seed(batch + height)
    return torch.randn(batch, 24, height, width, generator=generator).to(dtype)


def answers(module: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """(output, gradient of the input)."""
    x = x.detach().clone().requires_grad_()
    out = module(x)
    (gradient,) = torch.autograd.grad(out, x, torch.linspace(-1, 1, out.numel()).view(out.shape).to(out))
    return out.detach(), gradient


def kept(module: nn.Module) -> int:
    """How many directions are in blocks."""
    packed = [part for part in module.modules() if isinstance(part, Prepacked)]
    return sum(blocks._packed is not None for part in packed for blocks in (part._forth, part._back))


def starve(module: nn.Module) -> None:
    """Leave no memory for its blocks."""
    for part in module.modules():
        if isinstance(part, Prepacked):
            part._room = prepacked.Room(AMPLE)


@needs_blocks
@pytest.mark.parametrize("dtype", NEAR)
def test_outputs_and_gradients_are_the_plain_layers(kind: str, dtype: torch.dtype) -> None:
    plain = layer(kind, dtype)
    packed = copy.deepcopy(plain)
    prepack(packed)
    assert type(packed) is Prepacked and isinstance(packed, nn.Conv2d)
    for x in (pictures(dtype=dtype), pictures(dtype=dtype), pictures(1, 16, 16, dtype)):
        for one, other in zip(answers(packed, x), answers(plain, x), strict=True):
            assert one.dtype == dtype and one.shape == other.shape
            assert (one - other).abs().max() <= NEAR[dtype] * other.abs().max()
    # what has other bits from blocks goes without them: so rare a kind in bf16, and on other processors more
    assert kept(packed) == 2 or kind == "padded more than its kernel" or not pays()


@needs_blocks
@pytest.mark.parametrize("dtype", NEAR)
def test_whatever_is_kept_the_bits_are_the_same(kind: str, dtype: torch.dtype) -> None:
    keeps, spares = layer(kind, dtype), layer(kind, dtype)
    prepack(keeps)
    prepack(spares)
    starve(spares)
    turns = [pictures(dtype=dtype)] * 3 + [pictures(1, 16, 16, dtype), pictures(dtype=dtype)] * 2
    first = answers(keeps, turns[0])
    for x in [*turns, pictures(1, 16, 16, dtype), pictures(1, 16, 16, dtype)]:
        for one, other in zip(answers(keeps, x), answers(spares, x), strict=True):
            assert torch.equal(one, other)
    assert kept(keeps) and not kept(spares)
    for one, other in zip(first, answers(keeps, turns[0]), strict=True):
        assert torch.equal(one, other)


@needs_blocks
def test_what_computes_once_keeps_nothing_and_little_memory_keeps_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    once = layer()
    prepack(once)
    answers(once, pictures())
    assert kept(once) == 0
    answers(once, pictures())
    assert kept(once) == 2
    poor = layer()
    prepack(poor)
    assert size_packed(poor) == 2 * poor.weight.nbytes == 2 * size_packed(poor, directions=1)
    monkeypatch.setattr(prepacked, "free_memory", lambda: prepacked.AMPLE * size_packed(poor) - 1)
    for _ in range(3):
        answers(poor, pictures())
    assert kept(poor) == 0


@needs_blocks
@pytest.mark.parametrize("how", ["in place", "other memory", "another parameter", "same memory again"])
def test_a_changed_weight_is_noticed(how: str) -> None:
    packed = layer()
    prepack(packed)
    before = [answers(packed, pictures()) for _ in range(3)][-1]
    changed = torch.randn_like(packed.weight)
    with torch.no_grad():
        if how == "in place":
            packed.weight.copy_(changed)
        elif how == "other memory":
            packed.weight.data = changed
        elif how == "another parameter":
            packed.weight = nn.Parameter(changed, requires_grad=False)
        else:
            packed.weight.data = torch.empty(0)  # the allocator may give its memory to the next
            packed.weight.data = changed
    plain = layer()
    plain.weight = nn.Parameter(changed, requires_grad=False)
    for _ in range(3):
        after = answers(packed, pictures())
        for one, other, old in zip(after, answers(plain, pictures()), before, strict=True):
            assert torch.allclose(one, other, atol=1e-4)
            assert not torch.allclose(one, old, atol=1e-2)


@needs_blocks
def test_unpack_is_the_inverse() -> None:
    plain = layer()
    packed = copy.deepcopy(plain)
    prepack(packed)
    for _ in range(3):
        answers(packed, pictures())
    unpack(packed)
    assert type(packed) is nn.Conv2d
    assert packed.__dict__.keys() == plain.__dict__.keys()
    for one, other in zip(answers(packed, pictures()), answers(plain, pictures()), strict=True):
        assert torch.equal(one, other)


@needs_blocks
def test_copies_files_and_casts_see_the_plain_layer() -> None:
    packed = nn.Sequential(layer())
    prepack(packed)
    expected = [answers(packed, pictures()) for _ in range(3)][-1][0]
    assert kept(packed) == 2
    pickled = pickle.loads(pickle.dumps(packed))
    saved = io.BytesIO()
    torch.save(packed, saved)
    saved.seek(0)
    loaded = torch.load(saved, weights_only=False)
    for copied in (copy.deepcopy(packed), pickled, loaded):
        assert kept(copied) == 0, "a copy makes its own"
        assert torch.equal(copied(pictures()), expected)
    assert list(packed.state_dict()) == list(nn.Sequential(layer()).state_dict())
    packed.to(torch.bfloat16)
    x = pictures(dtype=torch.bfloat16)
    plain = nn.Sequential(layer(dtype=torch.bfloat16))
    assert torch.allclose(packed(x).float(), plain(x).float(), atol=2e-2)
    packed.double()
    assert torch.equal(
        packed(x.double()), nn.Sequential(layer("3x3").to(torch.bfloat16)).double()(x.double())
    )
    forget(packed)
    assert kept(packed) == 0


@needs_blocks
def test_what_trains_or_is_cast_by_autocast_is_left_to_torch() -> None:
    packed, plain = layer(), layer()
    prepack(packed)
    packed.weight.requires_grad_()
    plain.weight.requires_grad_()
    for module in (packed, plain):
        module(pictures()).square().sum().backward()
    assert packed.weight.grad is not None and plain.weight.grad is not None
    assert torch.equal(packed.weight.grad, plain.weight.grad)
    narrow, plain = layer(dtype=torch.bfloat16), layer(dtype=torch.bfloat16)
    prepack(narrow)
    for x in (pictures(), pictures(dtype=torch.bfloat16)):
        for _ in range(3):
            with torch.autocast("cpu", torch.bfloat16):
                one, other = narrow(x), plain(x)
            assert one.dtype == other.dtype == torch.bfloat16
            assert torch.allclose(one.float(), other.float(), atol=2e-2)
    assert kept(narrow) == 1
    with pytest.raises(RuntimeError, match="channels"):
        narrow(pictures(dtype=torch.bfloat16)[:, :5])
    unbatched = pictures(dtype=torch.bfloat16)[0]
    assert torch.equal(narrow(unbatched), plain(unbatched))
    assert narrow(pictures(dtype=torch.bfloat16)[:0]).shape == (0, 40, 12, 9)


@needs_blocks
def test_a_model_with_a_large_convolution_has_all_of_them_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(
        layer(),
        nn.Conv2d(40, 8, 1),
        nn.Conv2d(40, 40, 3, padding_mode="circular"),
        nn.Conv2d(40, 40, 3, padding="same"),
        nn.Linear(400, 400),
    )
    monkeypatch.setattr(prepacked, "SMALLEST", layer().weight.numel() + 1)
    prepack(model)
    assert not any(type(part) is Prepacked for part in model) and size_packed(model) == 0
    monkeypatch.setattr(prepacked, "SMALLEST", layer().weight.numel())
    prepack(model)
    assert [type(part) is Prepacked for part in model] == [True, True, False, False, False]


@needs_blocks
@pytest.mark.parametrize("name", list(FAMILIES))
def test_every_adapter_family_acts_and_trains_on_it(name: str) -> None:
    results = []
    packed = nn.Sequential(layer())
    prepack(packed)
    bare = [packed(pictures()) for _ in range(3)][-1]
    for model in (packed, nn.Sequential(layer())):
        adapter = Adapter.inject({"net": model}, ("net.0",), FAMILIES.get(name).settings(rank=4))
        torch.manual_seed(7)
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape))
        out, gradient = [answers(model, pictures()) for _ in range(3)][-1]
        model(pictures()).square().sum().backward()
        results.append([out, gradient, *(parameter.grad for parameter in adapter.parameters())])
        adapter.eject()
    for mine, theirs in zip(*results, strict=True):
        assert mine is not None and theirs is not None
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
    assert torch.equal(packed(pictures()), bare)


@needs_blocks
def test_a_merge_is_noticed_and_undone_to_the_bit() -> None:
    packed = nn.Sequential(layer())
    prepack(packed)
    bare = [packed(pictures()) for _ in range(3)][-1]
    adapter = Adapter.inject({"net": packed}, ("net.0",), LoraSettings(rank=4))
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.05)
    attached = packed(pictures())
    merged = merge(adapter, {"net": packed})
    for _ in range(3):
        assert torch.allclose(packed(pictures()), attached, atol=1e-4)
    merged.undo()
    adapter.eject()
    assert torch.equal(packed(pictures()), bare)


@needs_blocks
def test_a_packed_layer_is_held_in_few_bits_like_any_other() -> None:
    model = nn.Sequential(nn.ModuleList([layer()]))
    prepack(model)
    assert quantize(model, "int8", torch.float32) == layer().weight.numel()
    inner = cast(Any, model[0])[0]
    assert isinstance(inner, Quantized) and not isinstance(inner, Prepacked)
    assert not {"_room", "_forth"} & inner.__dict__.keys()


@needs_blocks
def test_a_step_without_numbers_is_played_and_keeps_no_input() -> None:
    with torch.device("meta"):
        packed, plain = nn.Conv2d(24, 40, 3, padding=1), nn.Conv2d(24, 40, 3, padding=1)
    prepack(packed)
    x = pictures(4, 64, 64)
    flops, held = [], []
    for module in (packed.requires_grad_(False), plain.requires_grad_(False)):

        def work(module: nn.Module = module) -> Tensor:
            given = torch.zeros(x.shape, requires_grad=True)
            out: Tensor = module(given * 2) * 1.5
            out = out.square().square()
            out.sum().backward()
            return out

        played = Theatre([module], torch.device("cpu")).play(work)
        flops.append(played.flops)
        held.append(played.peak)
    assert flops[0] == flops[1] > 0
    assert held[0] < held[1], "the plain layer keeps what it was given"


@pytest.mark.parametrize("amx", [True, False])
def test_a_base_is_prepacked_where_it_pays(monkeypatch: pytest.MonkeyPatch, amx: bool) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_tile": amx}, raising=False)
    prepacked.pays.cache_clear()
    try:
        denoiser = BASES.get("sd1").tiny().denoiser
        assert any(type(part) is Prepacked for part in denoiser.modules()) == amx
        assert (size_packed(denoiser) > 0) == amx
    finally:
        prepacked.pays.cache_clear()
