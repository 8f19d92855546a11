"""OFT and BOFT: turns are orthogonal, limits hold, and the inputs' forms are peft's and OneTrainer's."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from scumble.adapters import LayerState
from scumble.adapters.boft import Boft, BoftSettings
from scumble.adapters.names import triangle_size
from scumble.adapters.oft import Oft, OftSettings, block_size, cayley


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("family", ["oft", "boft"])
@pytest.mark.parametrize("layer", [nn.Linear(6, 24), nn.Conv2d(4, 24, 3)])
def test_a_turn_keeps_lengths_and_angles(family: str, layer: nn.Linear | nn.Conv2d) -> None:
    settings = {"oft": OftSettings(), "boft": BoftSettings(rank=6)}[family]
    kind = {"oft": Oft, "boft": Boft}[family]
    delta = kind.fresh(layer, settings, rank=settings.rank, alpha=1.0, generator=torch.Generator()).double()
    with torch.no_grad():
        delta.get_parameter("blocks").copy_(randn(*delta.get_parameter("blocks").shape))
    weight = layer.weight.detach().double()
    turned = (weight + delta.weight_delta(weight)).flatten(1)
    flat = weight.flatten(1)
    assert (turned - flat).norm() > 0.1 * flat.norm()
    torch.testing.assert_close(turned.T @ turned, flat.T @ flat, rtol=1e-9, atol=1e-9)
    assert delta.alpha == 0.0 and delta.rank == delta.get_parameter("blocks").shape[-1]


def test_alpha_limits_the_turn_of_all_blocks_together() -> None:
    layer, blocks = nn.Linear(6, 8), randn(2, 4, 4)
    skew = blocks - blocks.transpose(1, 2)
    limit = 0.25 * skew.norm()
    delta = Oft.from_state(layer, LayerState("oft", 4, float(limit) / 8, {"blocks": blocks}))
    scaled = skew * 0.25
    torch.testing.assert_close(delta.turned(8), scaled, rtol=1e-7, atol=1e-9)
    one = torch.eye(4, dtype=torch.float64)
    torch.testing.assert_close(cayley(scaled) + one, (one + scaled) @ torch.linalg.inv(one - scaled))


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("form", ["triangles", "series", "weight_series"])
def test_inputs_turn_as_the_tools_that_write_them_turn_them(form: str, shared: bool) -> None:
    numbers = 0.1 * randn(1 if shared else 3, 6)
    rows, columns = torch.triu_indices(4, 4, 1)
    skew = torch.zeros(len(numbers), 4, 4, dtype=torch.float64)
    skew[:, rows, columns] = numbers
    skew = skew - skew.transpose(1, 2)
    one = torch.eye(4, dtype=torch.float64).expand_as(skew)
    if form == "triangles":
        turn = torch.linalg.solve(one + skew, one - skew, left=False)
    else:
        turn = one + 2 * skew + 2 * skew @ skew + 2 * skew @ skew @ skew + skew @ skew @ skew @ skew
    whole = torch.block_diag(*(turn.expand(3, -1, -1)))
    for layer in (nn.Linear(12, 5), nn.Conv2d(3, 5, 2)):
        weight = layer.weight.detach().double()
        # peft turns the input, x R, and OneTrainer that of linear layers; of a convolution it turns the weight
        by = whole if form == "weight_series" and weight.dim() == 4 else whole.T
        delta = Oft.from_state(layer, LayerState("oft", 4, 0.0, {form: numbers}))
        expected = (weight.flatten(1) @ by).view(weight.shape) - weight
        torch.testing.assert_close(delta.weight_delta(weight), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("width", "rank", "size"), [(320, 4, 4), (320, 6, 5), (10, 3, 2), (7, 4, 7), (9, 2, 3)]
)
def test_blocks_fill_the_width(width: int, rank: int, size: int) -> None:
    assert block_size(width, rank) == size


def test_numbers_above_a_diagonal_tell_its_size() -> None:
    assert [triangle_size(n * (n - 1) // 2) for n in range(2, 40)] == list(range(2, 40))
    assert triangle_size(4) == 0 and all(math.isqrt(1 + 8 * n) for n in range(1, 9))
