"""The laws of bases held in few bits: every code in the table runs through all of them.

1. A weight comes back within `step` of its block's largest number; zeros stay zeros; the size is as said.
2. A quantised layer gives the output and the gradients of the plain layer whose weight is what it reads.
3. For the backward pass it keeps its code and nothing else; the plain layer's weight is nowhere in the graph.
4. Every adapter family acts and trains on it as on that plain layer; ejecting leaves every bit.
5. What others do to a model leaves the code: casts, moves, copies, state dictionaries.
"""

from __future__ import annotations

import copy
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from scumble.adapters import FAMILIES, Adapter, Layer, layers_of, merge
from scumble.adapters.operate import device_of, operate, shape_of
from scumble.errors import AdapterError, ModelError
from scumble.models.codes import BLOCK, CODES, Code
from scumble.models.quantized import Quantized, layers_held, quantize

LAYERS: dict[str, tuple[Layer, tuple[int, ...]]] = {
    "linear": (nn.Linear(48, 96), (2, 5, 48)),
    "linear without bias": (nn.Linear(97, 50, bias=False), (3, 97)),
    "conv 3x3 stride 2": (nn.Conv2d(32, 24, 3, stride=2, padding=1), (2, 32, 9, 8)),
    "conv 1x1": (nn.Conv2d(70, 70, 1), (2, 70, 4, 4)),
    "conv in groups": (nn.Conv2d(48, 96, 3, padding=1, groups=4), (2, 48, 5, 5)),
}


@pytest.fixture(params=list(CODES))
def code(request: pytest.FixtureRequest) -> Code:
    """Every code there is."""
    return CODES[request.param]


class Blocks(nn.Module):
    """A layer in a list of blocks, one before it and a norm."""

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.before = nn.Linear(80, 80)
        self.norm = nn.LayerNorm(8)
        self.blocks = nn.ModuleList([nn.Sequential(layer)])

    def forward(self, x: Tensor) -> Tensor:
        """The layer alone."""
        return cast(Tensor, self.blocks[0](x))


def pair(name: str, code: Code, dtype: torch.dtype = torch.float32) -> tuple[Blocks, Blocks, tuple[int, ...]]:
    """(a model held in `code`, the plain model with the weights that it reads, the input's shape)."""
    layer, shape = LAYERS[name]
    torch.manual_seed(0)
    held = Blocks(copy.deepcopy(layer)).to(dtype).requires_grad_(False)
    plain = copy.deepcopy(held)
    quantize(held, code.name, dtype)
    inner = cast("nn.Sequential", held.blocks[0])[0]
    assert isinstance(inner, Quantized) and isinstance(inner, type(layer))
    with torch.no_grad():
        cast(Any, plain.blocks[0])[0].weight.copy_(inner.weight)
    return held, plain, shape


def test_a_weight_comes_back_within_the_codes_step(code: Code) -> None:
    weight = (
        torch.randn(7, 150, generator=torch.Generator().manual_seed(1)) * torch.logspace(-6, 3, 7)[:, None]
    )
    weight[3] = 0
    codes, scales = code.encode(weight)
    again = code.decode(codes, scales, weight.shape, torch.float32)
    blocks = nn.functional.pad((again - weight).flatten(), (0, -weight.numel() % BLOCK)).view(-1, BLOCK)
    most = nn.functional.pad(weight.flatten(), (0, -weight.numel() % BLOCK)).view(-1, BLOCK).abs().amax(1)
    assert (blocks.abs().amax(1) <= code.step * most).all()
    assert (again[3] == 0).all() and (again[:, :5][weight[:, :5] > 0].sign() >= 0).all()
    assert codes.nbytes + scales.nbytes == code.size(weight.numel())


def test_long_weights_are_the_same_piece_by_piece(code: Code, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(300, 65, generator=torch.Generator().manual_seed(2))
    whole = code.encode(weight)
    monkeypatch.setattr("scumble.models.codes.PIECE", 7)
    for one, other in zip(whole, code.encode(weight), strict=True):
        assert torch.equal(one, other)
    pieces = code.decode(*whole, weight.shape, torch.bfloat16)
    monkeypatch.undo()
    assert torch.equal(pieces, code.decode(*whole, weight.shape, torch.bfloat16))


def test_numbers_are_rounded_once(code: Code) -> None:
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(3))
    kept = code.encode(weight)
    exact = code.decode(*kept, weight.shape, torch.float32)
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(code.decode(*kept, weight.shape, dtype), exact.to(dtype))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_number_is_refused(code: Code, value: float) -> None:
    weight = torch.zeros(10, 64)
    weight[7, 3] = value
    with pytest.raises(ModelError, match=f"infinite or NaN.*{code.name}"):
        code.encode(weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", LAYERS)
def test_output_and_gradient_are_those_of_the_plain_layer(code: Code, name: str, dtype: torch.dtype) -> None:
    held, plain, shape = pair(name, code, dtype)
    results = []
    for model in (held, plain):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(5)).to(dtype).requires_grad_()
        y = model(x)
        y.square().sum().backward()
        results.append((y.detach(), x.grad))
    for mine, theirs in zip(*results, strict=True):
        assert mine is not None and theirs is not None and mine.dtype == theirs.dtype == dtype
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("name", ["linear", "conv 3x3 stride 2"])
def test_autocast_computes_in_its_dtype(code: Code, name: str) -> None:
    held, plain, shape = pair(name, code)
    x = torch.randn(shape, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mine, theirs = held(x), plain(x)
    assert mine.dtype == theirs.dtype == torch.bfloat16
    torch.testing.assert_close(mine, theirs)
    (gradient,) = torch.autograd.grad(mine.float().sum(), x)
    assert gradient.dtype == torch.float32


@pytest.mark.parametrize("name", LAYERS)
def test_the_graph_keeps_the_code_and_nothing_else(code: Code, name: str) -> None:
    held, plain, shape = pair(name, code)
    kept: dict[str, list[Tensor]] = {"held": [], "plain": []}
    for what, model in {"held": held, "plain": plain}.items():

        def keep(tensor: Tensor, into: list[Tensor] = kept[what]) -> Tensor:
            into.append(tensor)
            return tensor

        x = torch.randn(shape, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model(x)
    inner = cast(Any, held.blocks[0])[0]
    places = {tensor.data_ptr() for tensor in kept["held"]}
    assert places == {inner.codes.data_ptr(), inner.scales.data_ptr()}, (
        "nothing that the model has not anyway"
    )
    weight = inner.shape.numel()
    assert sum(tensor.nbytes for tensor in kept["held"]) == code.size(weight)
    assert any(tensor.numel() == weight for tensor in kept["plain"]), (
        "the plain layer's weight is its model's own"
    )


@pytest.mark.parametrize("family", list(FAMILIES))
@pytest.mark.parametrize("name", ["linear", "conv 3x3 stride 2"])
def test_adapters_act_and_train_as_on_the_plain_layer(code: Code, name: str, family: str) -> None:
    held, plain, shape = pair(name, code)
    settings = FAMILIES.get(family).settings(rank=4)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(6))
    bare = held(x)
    results = []
    for model in (held, plain):
        adapter = Adapter.inject({"net": model}, ("net.blocks.0.0",), settings)
        torch.manual_seed(7)
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape))
        y = model(x)
        y.square().sum().backward()
        results.append([y.detach(), *(parameter.grad for parameter in adapter.parameters())])
        with torch.no_grad():
            assert not torch.equal(model(x), bare)
        adapter.eject()
    for mine, theirs in zip(*results, strict=True):
        assert mine is not None and theirs is not None
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
    assert torch.equal(held(x), bare)


def test_a_merge_is_refused_and_changes_nothing(code: Code) -> None:
    held, _, _ = pair("linear", code)
    adapter = Adapter.inject({"net": held}, ("net.blocks.0.0",), FAMILIES.get("lora").settings())
    before = {name: tensor.clone() for name, tensor in held.state_dict().items()}
    with pytest.raises(AdapterError, match=rf"held in {code.name}.*Leave the adapter attached"):
        merge(adapter, {"net": held})
    assert adapter.attached
    assert all(torch.equal(tensor, before[name]) for name, tensor in held.state_dict().items())


def test_casts_copies_and_state_dictionaries_leave_the_code(code: Code) -> None:
    held, _, shape = pair("linear", code)
    inner = cast(Any, held.blocks[0])[0]
    kept = inner.codes.clone(), inner.scales.clone()
    held.to(torch.bfloat16)
    assert inner.weight.dtype == torch.bfloat16 and inner.bias.dtype == torch.bfloat16
    held.float()
    for one in (inner, cast(Any, copy.deepcopy(held).blocks[0])[0]):
        assert torch.equal(one.codes, kept[0]) and torch.equal(one.scales, kept[1])
        assert one.weight.dtype == torch.float32
    other, _, _ = pair("linear", code)
    cast(Any, other.blocks[0])[0].codes.data.zero_()
    other.load_state_dict(held.state_dict())
    x = torch.randn(shape)
    assert torch.equal(other(x), held(x))
    assert code.name in repr(held)


def test_it_is_the_layer_that_it_was_to_those_who_ask(code: Code) -> None:
    held, plain, _ = pair("conv in groups", code)
    mine, theirs = (layers_of({"net": model}) for model in (held, plain))
    assert mine.keys() == theirs.keys()
    path = "net.blocks.0.0"
    layer: Any = mine[path]
    assert (layer.in_channels, layer.groups, layer.stride) == (48, 4, (1, 1))
    assert shape_of(layer) == theirs[path].weight.shape == layer.weight.shape
    assert device_of(layer) == torch.device("cpu")
    x = torch.randn(1, 48, 4, 4)
    assert torch.equal(operate(layer, x, layer.weight), operate(theirs[path], x, theirs[path].weight))


def test_what_stands_outside_of_lists_and_what_is_small_stays() -> None:
    model = Blocks(nn.Linear(64, 64))
    cast("nn.Sequential", model.blocks[0]).append(nn.Linear(8, 8))
    assert list(layers_held(model)) == ["blocks.0.0"]
    assert quantize(model, "int8", torch.float32) == 64 * 64
    assert type(model.before) is nn.Linear and type(cast(Any, model.blocks[0])[1]) is nn.Linear


def test_a_model_with_nothing_to_hold_is_refused() -> None:
    with pytest.raises(ModelError, match=r'"nf4" would change nothing.*Leave quantization out'):
        quantize(nn.Sequential(nn.Linear(100, 100)), "nf4", torch.float32)
