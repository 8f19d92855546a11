"""Proofs: that gradients arrive, that weights change, that they stay fp32. "Succeeded" must mean something.

Legend: `parameters` maps names to what trains, e.g. "unet.down_blocks.….to_q.down".
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from scumble.data.together import Together
from scumble.errors import NothingTrained, TrainingError
from scumble.training.state import compare

if TYPE_CHECKING:
    from accelerate import Accelerator


class GradientWatch:
    """Sees that every trainable tensor gets a gradient, and that it is not zero.

    A gradient must be there at the first step. Zeros are forgiven until the weights have moved once: LoRA's
    `down` has a zero gradient as long as `up` is zero, and `up` is zero until a step is taken at a rate above
    zero.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self._waiting = dict(parameters)

    @property
    def satisfied(self) -> bool:
        return not self._waiting

    def see(self, step: int, moved: bool) -> None:
        """Look at the gradients of `step`; `moved`: an earlier step has already moved the weights.

        Raises:
            NothingTrained: lists what got no gradient.
        """
        absent = [name for name, parameter in self._waiting.items() if parameter.grad is None]
        if absent:
            raise NothingTrained(
                f"step {step}: {_some(absent)} got no gradient: the loss does not depend on them. "
                "Choose targets that the training reaches (a text encoder needs uncached captions), or "
                "remove these."
            )
        if not self._waiting:
            return
        norms = torch._foreach_norm([p.grad for p in self._waiting.values() if p.grad is not None])
        arrived = torch.stack([norm.float() for norm in norms]).ne(0).tolist()
        self._waiting = {
            name: p for (name, p), there in zip(self._waiting.items(), arrived, strict=True) if not there
        }
        if moved and self._waiting:
            raise NothingTrained(
                f"step {step}: the gradient of {_some(list(self._waiting))} is exactly zero, so they never "
                "train. A strength of 0, a weight of 0 or an underflow in fp16 can be the cause (try "
                "precision bf16 or no), or pictures so small that attention there has one place to look at."
            )


def check_reaches(losses: Tensor) -> Tensor:
    """`losses`, which must depend on something that trains.

    Raises:
        NothingTrained: they don't.
    """
    if not losses.requires_grad:
        raise NothingTrained(
            "The loss depends on nothing that trains. An adapter of the text encoder alone learns nothing "
            "from text embeddings that were computed before: train with captions, or choose "
            "targets in the denoiser."
        )
    return losses


def digest(tensor: Tensor) -> str:
    """sha256 hex of a tensor's bits."""
    flat = tensor.detach().to("cpu").contiguous().view(-1)
    return hashlib.sha256(flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"").hexdigest()


def digests(parameters: Mapping[str, Tensor]) -> dict[str, str]:
    """Name -> `digest`."""
    return {name: digest(parameter) for name, parameter in parameters.items()}


def check_changed(before: Mapping[str, str], parameters: Mapping[str, nn.Parameter]) -> None:
    """Every parameter must differ from its digest before the first step.

    Raises:
        NothingTrained: lists those that never changed.
    """
    same = [name for name, value in digests(parameters).items() if before.get(name) == value]
    if same:
        raise NothingTrained(
            f"After training, {_some(same)} are bit for bit what they were before it. "
            "Every step may have been skipped, or the learning rate is too small for fp32."
        )


def check_dtypes(parameters: Mapping[str, nn.Parameter], when: str) -> None:
    """Everything that trains must be fp32 and take gradients.

    Raises:
        TrainingError: names the parameter, its dtype and when it was found.
    """
    for name, parameter in parameters.items():
        if parameter.dtype is not torch.float32 or not parameter.requires_grad:
            raise TrainingError(
                f"{when}: {name} is {parameter.dtype}, requires_grad={parameter.requires_grad}; what trains "
                "must be torch.float32 and require gradients. Something cast or froze the live model; cast "
                "a copy instead."
            )


def check_same_run(identity: Mapping[str, Any], together: Together) -> None:
    """Before the first step, every process must be about to train the same: the same pictures, base and settings.

    Raises:
        TrainingError: names the processes that differ, and in what.
    """
    every = together.gather(json.loads(json.dumps(identity)))
    others = {rank: compare(every[0], other) for rank, other in enumerate(every) if other != every[0]}
    if others:
        rank, differences = next(iter(others.items()))
        raise TrainingError(
            f"Process(es) {', '.join(map(str, others))} would train something else than process 0. Process 0's value "
            f"-> process {rank}'s:\n" + "\n".join(f"  {line}" for line in differences) + "\n"
            "Give every machine the same pictures, base, settings and versions."
        )


def check_processes_agree(parameters: Iterable[nn.Parameter], accelerator: Accelerator) -> None:
    """After the first backward, every process must hold the same averaged gradient, bit for bit.

    Raises:
        TrainingError: names the ranks that differ.
    """
    if accelerator.num_processes == 1:
        return
    total = hashlib.sha256()
    for parameter in parameters:
        total.update(digest(parameter.grad if parameter.grad is not None else torch.zeros(1)).encode())
    mine = int.from_bytes(total.digest()[:8], "little") >> 1
    gathered = accelerator.gather(torch.tensor([mine], device=accelerator.device))
    ranks = [rank for rank, value in enumerate(gathered.tolist()) if value != gathered[0].item()]
    if ranks:
        raise TrainingError(
            f"The gradients of rank(s) {ranks} differ from those of rank 0 after averaging: the processes "
            "train apart. Check that all run the same versions and settings."
        )


def _some(names: list[str]) -> str:
    """ "3 trainable tensors (a, b, c)", at most five by name."""
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    noun = "tensor" if len(names) == 1 else "tensors"
    return f"{len(names)} trainable {noun} ({', '.join(names[:5])}{more})"
