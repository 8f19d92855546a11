"""LoRA's maths: scale, start, shapes, precision, and the gradients of its own autograd node."""

import itertools
import math

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from scumble.adapters import Layer, LayerState, Lora, LoraSettings
from scumble.adapters.operate import operate
from scumble.errors import AdapterError


def lora(base: Layer, rank: int = 2, alpha: float = 3.0, seed: int = 0, **options: object) -> Lora:
    """A LoRA with random values."""
    rng = torch.Generator().manual_seed(seed)
    tensors = {name: torch.randn(shape, generator=rng) for name, shape in Lora.shapes(base, rank).items()}
    return Lora(tensors, rank=rank, alpha=alpha, **options)


def test_starts_at_zero_with_the_papers_spread() -> None:
    base = nn.Linear(400, 20)
    delta = Lora.fresh(base, LoraSettings(), rank=50, alpha=50, generator=torch.Generator().manual_seed(0))
    assert not delta.up.any() and not delta.weight_delta(base.weight).any()
    bound = 1 / math.sqrt(400)
    assert delta.down.abs().max() <= bound
    assert delta.down.detach().std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)


def test_the_start_does_not_use_the_global_generator() -> None:
    base = nn.Linear(4, 4)
    before = torch.random.get_rng_state()
    Lora.fresh(base, LoraSettings(), rank=2, alpha=2, generator=torch.Generator().manual_seed(0))
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(("stabilized", "scale"), [(False, 3 / 4), (True, 3 / 2)])
def test_scale(stabilized: bool, scale: float) -> None:
    base = nn.Linear(5, 6)
    delta = lora(base, rank=4, alpha=3, rank_stabilized=stabilized)
    assert delta.scale == scale
    torch.testing.assert_close(delta.weight_delta(base.weight), scale * delta.up @ delta.down)


def test_convolution_has_the_bases_kernel_below_and_a_product_above() -> None:
    shapes = Lora.shapes(nn.Conv2d(4, 6, (3, 5), stride=2), 2)
    assert shapes == {"down": (2, 4, 3, 5), "up": (6, 2, 1, 1)}
    assert Lora.shapes(nn.Conv2d(4, 6, 3, groups=2), 2)["down"] == (2, 2, 3, 3)


@pytest.mark.parametrize(
    "base",
    [
        nn.Conv2d(4, 6, 3, groups=2, padding=1),
        nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"),
        nn.Conv2d(4, 6, 3, dilation=2),
    ],
)
def test_unusual_convolutions_agree_with_their_weight_delta(base: nn.Conv2d) -> None:
    delta, x = lora(base), torch.randn(2, 4, 8, 8)
    torch.testing.assert_close(
        delta.output_delta(x, base(x), base),
        operate(base, x, delta.weight_delta(base.weight)),
        rtol=1e-4,
        atol=1e-5,
    )


def reference(delta: Lora, x: Tensor, base: nn.Linear, strength: float | Tensor) -> Tensor:
    """The same in plain operations, differentiated by torch."""
    return base(x) + strength * delta.scale * (x @ delta.down.t() @ delta.up.t())


@pytest.mark.parametrize(
    ("bias", "shape", "strength", "x_wants"),
    [
        *itertools.product(
            (True, False), ((7,), (5, 7), (4, 3, 7), (2, 3, 5, 7)), (1.0, -0.7), (True, False)
        ),
        *itertools.product(
            (True, False), ((4, 3, 7), (2, 3, 5, 7)), (torch.tensor([0.0, 0.5]),), (True, False)
        ),
    ],
)
def test_gradients_are_exact(
    bias: bool, shape: tuple[int, ...], strength: float | Tensor, x_wants: bool
) -> None:
    if isinstance(strength, Tensor):
        strength = strength.double().repeat(shape[0] // 2).view(-1, *(1 for _ in shape[1:]))
    base = nn.Linear(7, 6, bias=bias).double().requires_grad_(False)
    delta = lora(base).double()
    x = torch.randn(shape, dtype=torch.float64, requires_grad=x_wants)
    wanted = [delta.down, delta.up, *([x] if x_wants else [])]
    y = delta(x, base, strength)
    expected = reference(delta, x, base, strength)
    assert y.grad_fn is not None and "LowRankLinear" in y.grad_fn.name()
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    grad_y = torch.randn_like(y)
    for mine, theirs in zip(
        torch.autograd.grad(y, wanted, grad_y), torch.autograd.grad(expected, wanted, grad_y), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)


def test_gradcheck() -> None:
    base = nn.Linear(3, 4).double().requires_grad_(False)
    delta = lora(base).double()
    x = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)

    def function(x: Tensor, down: Tensor, up: Tensor) -> Tensor:
        return torch.func.functional_call(delta, {"down": down, "up": up}, (x, base, 0.7))

    assert torch.autograd.gradcheck(function, (x, delta.down, delta.up))


def test_input_that_is_not_contiguous() -> None:
    base = nn.Linear(7, 6).requires_grad_(False)
    delta, x = lora(base), torch.randn(7, 3, 4).permute(2, 1, 0)
    torch.testing.assert_close(delta(x, base), reference(delta, x, base, 1.0))


def test_the_graph_holds_x_once_and_no_more() -> None:
    """What training costs in memory: x and h, besides weights; the output is not kept."""
    base = nn.Linear(64, 64).requires_grad_(False)
    delta, x = lora(base), torch.randn(4, 50, 64, requires_grad=True)
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        delta(x, base)
    weights = {t.untyped_storage().data_ptr() for t in (base.weight, delta.down, delta.up)}
    assert sum(size for place, size in kept.items() if place not in weights) == 4 * (x.numel() + 4 * 50 * 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("make", [lambda: nn.Linear(16, 8), lambda: nn.Conv2d(16, 8, 1)])
def test_low_precision_base(dtype: torch.dtype, make: object) -> None:
    """The sum stays in the base's dtype, the trainable weights and their gradients in fp32."""
    base = make().to(dtype).requires_grad_(False)
    delta = lora(base)
    x = torch.randn(
        (2, 5, 16) if isinstance(base, nn.Linear) else (2, 16, 5, 5), dtype=dtype, requires_grad=True
    )
    y = delta(x, base)
    assert y.dtype == dtype and delta.down.dtype == torch.float32
    wide = type(base)(16, 8, *(() if isinstance(base, nn.Linear) else (1,)))
    wide.load_state_dict(base.state_dict())
    expected = delta(x.detach().float(), wide.requires_grad_(False))
    torch.testing.assert_close(y.float(), expected, rtol=0.02, atol=0.02 * expected.abs().max().item())
    y.float().sum().backward()
    assert delta.up.grad is not None and delta.up.grad.dtype == torch.float32
    assert x.grad is not None and x.grad.dtype == dtype


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
def test_autocast(x_dtype: torch.dtype) -> None:
    """Under autocast everything is computed in its dtype, whatever base and input are in."""
    base = nn.Linear(16, 8).requires_grad_(False)
    delta, x = lora(base), torch.randn(2, 5, 16, dtype=x_dtype, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = delta(x, base)
        theirs = reference(delta, x, base, 1.0)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), theirs.float(), rtol=0.03, atol=0.1)
    y.float().square().sum().backward()
    assert x.grad is not None and x.grad.dtype == x_dtype
    assert delta.down.grad is not None and delta.down.grad.dtype == torch.float32 and delta.down.grad.any()


def test_casting_the_model_does_not_round_the_trainable_weights() -> None:
    delta = lora(nn.Linear(4, 4))
    before = {name: parameter.detach().clone() for name, parameter in delta.named_parameters()}
    delta.half()
    delta.to("cpu", torch.bfloat16)
    assert all(parameter.equal(before[name]) for name, parameter in delta.named_parameters())
    assert delta.double().down.dtype == torch.float64
    assert delta.to("meta").down.is_meta


def test_dropout_acts_in_training_only() -> None:
    base = nn.Linear(64, 8).requires_grad_(False)
    delta, x = lora(base, dropout=0.5), torch.randn(3, 64)
    assert not torch.equal(delta(x, base), delta(x, base))
    delta.eval()
    torch.testing.assert_close(delta(x, base), reference(delta, x, base, 1.0))
    # The mean over many draws is the change without dropout.
    delta.train()
    torch.manual_seed(0)
    mean = torch.stack([delta(x, base).detach() for _ in range(4000)]).mean(0)
    torch.testing.assert_close(mean, reference(delta, x, base, 1.0).detach(), rtol=0.1, atol=1.0)


def test_hooks_on_the_base_still_run() -> None:
    base = nn.Linear(4, 4).requires_grad_(False)
    seen: list[Tensor] = []
    base.register_forward_hook(lambda module, inputs, output: seen.append(output))
    delta, x = lora(base), torch.randn(2, 4)
    y = delta(x, base)
    torch.testing.assert_close(seen[0], nn.functional.linear(x, base.weight, base.bias))
    torch.testing.assert_close(y, reference(delta, x, base, 1.0))


def test_a_base_that_trains_too_gets_its_gradient() -> None:
    base = nn.Linear(4, 4)
    lora(base)(torch.randn(2, 4), base).sum().backward()
    assert base.weight.grad is not None and base.weight.grad.any()


def test_tensors_for_another_layer_are_refused_with_both_shapes() -> None:
    state = LayerState("lora", 2, 2.0, {"down": torch.zeros(2, 768), "up": torch.zeros(4, 2)})
    with pytest.raises(
        AdapterError, match=r"down 2x768, up 4x2 don't fit a layer that takes down 2x1024, up 4x2"
    ):
        Lora.from_state(nn.Linear(1024, 4), state)


def test_a_half_precision_file_is_widened_exactly() -> None:
    half = {"down": torch.randn(2, 4).half(), "up": torch.randn(4, 2).half()}
    delta = Lora.from_state(nn.Linear(4, 4), LayerState("lora", 2, 1.0, half))
    assert delta.down.dtype == torch.float32 and delta.down.half().equal(half["down"])


def test_state_is_contiguous_whatever_the_memory_format() -> None:
    delta = lora(nn.Conv2d(4, 6, 3)).to(memory_format=torch.channels_last)
    assert not delta.down.is_contiguous()
    assert delta.state().tensors["down"].is_contiguous()


@pytest.mark.parametrize(
    "bad", [{"rank": 0}, {"dropout": 1.0}, {"alpha": 0.0}, {"family": "dora"}, {"rnak": 3}]
)
def test_settings_refuse_nonsense(bad: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        LoraSettings(**bad)
