"""Blank modules: they are what torch's own constructor makes."""

import torch
from torch import nn

from scumble.adapters.blank import blank_dict, set_up


class Plain(nn.Module):
    """Set up by us."""

    def __init__(self) -> None:
        set_up(self)


def attributes(module: nn.Module) -> dict[str, tuple[type, object]]:
    """Names of what is set, in order, with type and value."""
    return {name: (type(value), value) for name, value in vars(module).items()}


def test_a_blank_module_is_as_torch_makes_it() -> None:
    assert attributes(Plain()) == attributes(nn.Module())
    assert attributes(blank_dict()) == attributes(nn.ModuleDict())
    assert type(blank_dict()) is nn.ModuleDict


def test_no_two_modules_share_a_container() -> None:
    one, other = Plain(), Plain()
    shared = [n for n, v in vars(one).items() if isinstance(v, dict | set) and v is vars(other)[n]]
    assert not shared


def test_it_works_as_a_module() -> None:
    module, called = Plain(), []
    module.inner = nn.Linear(2, 3)
    module.register_buffer("numbers", torch.ones(2))
    module.register_forward_hook(lambda *_: called.append(1))
    module.forward = lambda x: module.inner(x) + 1  # type: ignore[method-assign]
    assert module(torch.ones(1, 2)).shape == (1, 3) and called == [1]
    assert set(module.state_dict()) == {"inner.weight", "inner.bias", "numbers"}
    assert not module.eval().inner.training
