"""Stack: the LoRAs that act on one linear layer, side by side, so that they cost two products however many they are.

Legend: N samples, M rows of x in all of them, R the sum of the ranks (of the samples' own: the largest sum).

    shared     all samples with the same adapters:    y += (x downᵀ * gain) up      down (R, in), up (R, out), gain (R,)
    own        each sample with its own:              the same, batched             down (N, R, in), up (N, R, out)

The stacks are copies, as large as what acts, made by the first forward after a selection; strengths are in `gain`
alone, so that another strength copies nothing of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from scumble.adapters.delta import Delta
from scumble.adapters.dial import Dial, check_samples
from scumble.adapters.lora import Lora
from scumble.adapters.operate import Layer, compute_dtype

PADDING = 1.25
"""In fp32 on a CPU, samples of different ranks are padded to the largest up to this share of more numbers; beyond,
sample by sample is faster (benchmarks/many_adapters.py --products)."""

Acting = Sequence[tuple[Delta, Dial]]


@dataclass
class Stack:
    """See the module."""

    of: tuple[object, ...]
    """What it is made of: while that stays, it does."""
    turned: int
    """`Dial.turned` when `gain` was made."""
    down: Tensor
    up: Tensor
    gain: Tensor

    def add_to(self, y: Tensor, x: Tensor) -> Tensor:
        """y += the changes, in place; x (N, ..., in), y (N, ..., out)."""
        x = x.to(self.down.dtype)
        if self.down.dim() == 2:
            h = (x.reshape(-1, x.shape[-1]) @ self.down.t()).mul_(self.gain)
            y.view(-1, y.shape[-1]).addmm_(h, self.up)
        else:
            h = x.reshape(len(x), -1, x.shape[-1]).bmm(self.down.transpose(1, 2)).mul_(self.gain)
            y.view(len(y), -1, y.shape[-1]).baddbmm_(h, self.up)
        return y


def stack_of(acting: Acting, x: Tensor, y: Tensor, base: Layer, known: Stack | None) -> Stack | None:
    """What adds the changes of `acting` to y = base(x): `known` as long as it does, or a new one.

    None where another way is better or the only one: a family or layer of another kind, parameters that train,
    ranks too different.

    Raises:
        AdapterError: strengths that don't fit the samples.
    """
    dtype = compute_dtype(x)
    if not isinstance(base, nn.Linear) or y.dtype != dtype or not y.is_contiguous():
        return None
    loras = [delta for delta, _ in acting if type(delta) is Lora and not delta.training]
    values = [dial.value for _, dial in acting]
    own = [value for value in values if isinstance(value, Tensor)]
    if len(loras) != len(acting):
        return None
    parts = []
    for lora in loras:
        for tensor in (lora.down, lora.up):
            if tensor.requires_grad or tensor.is_inference():
                return None
            parts.append((tensor._version, tensor.data_ptr()))
    samples = len(x) if own else 0
    of = (dtype, x.device, samples, *loras, *parts)
    if known is not None and known.turned == Dial.turned and known.of[: len(of)] == of:
        return known
    rows: list[list[float]] = [[float(value)] for value in values if not isinstance(value, Tensor)]
    if own:
        rows = []
        for value in values:
            if isinstance(value, Tensor):
                check_samples(value, x)
                rows.append(value.tolist() * (samples // len(value)))
            else:
                rows.append([value] * samples)
    who = [[n for n in range(len(loras)) if rows[n][sample] or not own] for sample in range(samples or 1)]
    ranks = [sum(loras[n].rank for n in mine) for mine in who]
    most = max(ranks)
    if own and dtype == torch.float32 and x.device.type == "cpu" and most * len(who) > PADDING * sum(ranks):
        return None
    gains = [
        [g for n in mine for g in [loras[n].scale * rows[n][s]] * loras[n].rank] for s, mine in enumerate(who)
    ]
    gain = torch.tensor([row + [0.0] * (most - len(row)) for row in gains]).to(x.device, dtype)
    gain = gain[:, None] if own else gain[0]
    of += (tuple(map(tuple, who)),)
    if known is not None and known.of == of:
        return Stack(of, Dial.turned, known.down, known.up, gain)
    down = torch.zeros(len(who), most, base.in_features, dtype=dtype, device=x.device)
    up = torch.zeros(len(who), most, base.out_features, dtype=dtype, device=x.device)
    for sample, mine in enumerate(who):
        start = 0
        for n in mine:
            stop = start + loras[n].rank
            down[sample, start:stop].copy_(loras[n].down)
            up[sample, start:stop].copy_(loras[n].up.t())
            start = stop
    return Stack(of, Dial.turned, *((down, up) if own else (down[0], up[0])), gain)
