"""operate does what the layer does, with the weight it is given."""

import pytest
import torch
from torch import nn

from scumble.adapters.operate import compute_dtype, is_layer, operate

LAYERS = {
    "linear": (nn.Linear(6, 5, bias=False), (2, 3, 6)),
    "3x3 stride 2": (nn.Conv2d(4, 6, 3, stride=2, padding=1, bias=False), (2, 4, 9, 7)),
    "1x1": (nn.Conv2d(4, 6, 1, bias=False), (2, 4, 5, 5)),
    "dilated": (nn.Conv2d(4, 6, 3, dilation=2, padding="same", bias=False), (2, 4, 9, 9)),
    "groups": (nn.Conv2d(4, 6, 3, groups=2, bias=False), (2, 4, 5, 5)),
    "circular": (nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular", bias=False), (2, 4, 5, 5)),
    "reflect, same": (
        nn.Conv2d(4, 6, (3, 5), padding="same", padding_mode="reflect", bias=False),
        (2, 4, 7, 7),
    ),
}


@pytest.mark.parametrize("name", LAYERS)
def test_with_its_own_weight_it_is_the_layer(name: str) -> None:
    layer, shape = LAYERS[name]
    x = torch.randn(shape)
    assert torch.equal(operate(layer, x, layer.weight), layer(x))


def test_the_kernel_and_the_output_channels_may_differ() -> None:
    layer = nn.Conv2d(4, 6, 3, stride=2, padding=1)
    assert operate(layer, torch.randn(2, 4, 8, 8), torch.randn(3, 4, 3, 3)).shape == (2, 3, 4, 4)


def test_a_layer_that_torch_never_calls_is_no_layer() -> None:
    attention = nn.MultiheadAttention(8, 2)
    assert not is_layer(attention.out_proj)
    assert is_layer(nn.Linear(2, 2)) and is_layer(nn.Conv2d(2, 2, 1))
    assert not is_layer(nn.Conv1d(2, 2, 1))


def test_compute_dtype_follows_autocast() -> None:
    x = torch.randn(2, 2)
    assert compute_dtype(x) == torch.float32
    assert compute_dtype(x.half()) == torch.float16
    assert compute_dtype(x.to("meta")) == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert compute_dtype(x) == torch.bfloat16
        assert (
            compute_dtype(x.double())
            == torch.float64
            == torch.nn.functional.linear(x.double(), x.double()).dtype
        )
