"""compiling: what a compiler may not build into its code, because the next adapter has another one.

torch.compile takes a Python number for a constant and a parameter's shape for fixed. Here strengths and scales become
tensors, and ranks become sizes that may change; all else stays fixed, so that its kernels are as fast as before.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from scumble.adapters.adapted import Adapted
from scumble.adapters.delta import Delta
from scumble.adapters.dial import Dial
from scumble.adapters.operate import device_of


@contextmanager
def adaptable(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Inside, code compiled from `modules` serves other strengths, and other adapters of the same layers with another
    rank and alpha, where the family can (LoRA). Afterwards nothing of it is left on them.

    Call it again for an adapter that is injected inside. Sizes of 1 are compiled apart, as torch does with all sizes.
    Outputs change by no more than rounding.
    """
    marked: list[tuple[Tensor, set[str]]] = []
    """Tensors, with the attributes that they had before."""
    deltas: list[Delta] = []
    dials: list[Dial] = []
    seen = dict.fromkeys(part for module in modules for part in module.modules())
    try:
        for part in seen:
            if isinstance(part, Adapted):
                device = device_of(part.base)
                for dial in part.dials.values():
                    dial.follow(device)
                    dials.append(dial)
            sides = part.rank_sides if isinstance(part, Delta) else {}
            if isinstance(part, Delta):
                part.gain = torch.tensor(part.scale, device=next(part.parameters()).device)
                deltas.append(part)
            tensors = {**part._parameters, **part._buffers}
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                marked.append((tensor, set(vars(tensor))))
                for side in range(tensor.dim()):
                    if side != sides.get(name):
                        torch._dynamo.mark_static(tensor, side)
        yield
    finally:
        for tensor, before in reversed(marked):
            for name in set(vars(tensor)) - before:
                if "dynamo" in name:
                    delattr(tensor, name)
        for delta in deltas:
            delta.gain = None
        for dial in dials:
            dial.gain = None
