"""Blank: modules as torch's constructor sets them up, by the hundred.

`nn.Module.__init__` sets its attributes one by one, which for hundreds of modules takes a good part of a load's time.
"""

from __future__ import annotations

from torch import nn

_BLANK = vars(nn.Module())
"""What torch sets up in a module: switches, and containers that are still empty."""
_SWITCHES = {name: value for name, value in _BLANK.items() if not isinstance(value, dict | set)}
_CONTAINERS = tuple((name, type(value)) for name, value in _BLANK.items() if name not in _SWITCHES)


def set_up(module: nn.Module) -> None:
    """What `nn.Module.__init__(module)` does."""
    attributes = module.__dict__
    attributes.update(_SWITCHES)
    for name, container in _CONTAINERS:
        attributes[name] = container()


def blank_dict() -> nn.ModuleDict:
    """`nn.ModuleDict()`."""
    made = nn.ModuleDict.__new__(nn.ModuleDict)
    set_up(made)
    return made
