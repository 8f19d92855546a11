"""Recompute: blocks whose insides are computed again in the backward pass instead of being kept: gradient
checkpointing, block by block.

Source: Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost". What leaves a block is kept; all between is
computed a second time, from the same numbers, so that gradients are the same bit for bit.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from scumble.adapters.targets import matches
from scumble.errors import ModelError, did_you_mean

LAYER = "GradientCheckpointingLayer"
"""The class of transformers whose instances can be recomputed one by one."""


def blocks_of(name: str, root: nn.Module, classes: Collection[str]) -> dict[str, nn.Module]:
    """The blocks of one part of a base that can be recomputed: path ("unet.mid_block.resnets.1") -> block, in the
    part's own order. `classes` names those of a diffusers module; transformers' are known by `LAYER`."""
    return {
        f"{name}.{path}": module
        for path, module in root.named_modules()
        if type(module).__name__ in classes or _is_layer(module)
    }


def selected(patterns: Sequence[str] | str, blocks: Mapping[str, nn.Module], base: str) -> tuple[str, ...]:
    """The paths among `blocks` that one of `patterns` fits, in their order. A pattern is written for the whole path:
    "unet.up_blocks.*", "*.resnets.?".

    Raises:
        ModelError: a pattern fits none, or `base` has no such blocks.
    """
    if isinstance(patterns, str):
        raise ModelError(
            f'gradient_checkpointing = "{patterns}" is settled when a run is put together (scumble.train); here, say '
            "true, false or which blocks."
        )
    if patterns and not blocks:
        raise ModelError(
            f"{base} names no blocks that could be recomputed one by one. Set train.gradient_checkpointing to true or "
            "false."
        )
    for pattern in patterns:
        if not any(matches(pattern, path) for path in blocks):
            raise ModelError(
                f"train.gradient_checkpointing: {pattern!r} fits none of the {len(blocks)} blocks of {base}."
                f"{did_you_mean(pattern, blocks)} They are called {next(iter(blocks))!r} to "
                f"{next(reversed(list(blocks)))!r}; a pattern such as '*.{next(iter(blocks)).partition('.')[2]}' is "
                "written for the whole path."
            )
    return tuple(path for path in blocks if any(matches(pattern, path) for pattern in patterns))


def recompute(root: nn.Module, chosen: Collection[nn.Module] | None) -> None:
    """Have `root` recompute these of its blocks and keep the rest; None is all that it can recompute."""
    its: Any = root
    if hasattr(root, "enable_gradient_checkpointing"):  # diffusers' modules
        if chosen is None:
            its.enable_gradient_checkpointing()
        elif not chosen:
            its.disable_gradient_checkpointing()
        else:
            again = frozenset(chosen)

            def compute(block: nn.Module, *given: Any) -> Any:
                if block not in again:
                    return block(*given)
                return torch.utils.checkpoint.checkpoint(block.__call__, *given, use_reentrant=False)

            its.enable_gradient_checkpointing(compute)
        return
    on = chosen is None or bool(chosen)
    word = "activation" if hasattr(root, "activation_checkpointing_enable") else "gradient"
    turned = f"{word}_checkpointing_{'enable' if on else 'disable'}"
    if not hasattr(root, turned):
        return
    getattr(root, turned)(*([{"use_reentrant": False}] if on else []))
    layers: Iterable[Any] = root.modules()
    for layer in layers:
        # transformers checkpoints only layers in training mode; the mode of the layer alone changes
        # nothing else, because attention and MLP inside it (dropout) stay in eval mode: T5's attention, which
        # has the switch too, drops by its own mode
        if hasattr(layer, "gradient_checkpointing") and not isinstance(
            getattr(layer, "dropout", None), float
        ):
            layer.training = on
            if on and chosen is not None and _is_layer(layer):
                layer.gradient_checkpointing = layer.training = layer in chosen


def _is_layer(module: nn.Module) -> bool:
    return LAYER in {kind.__name__ for kind in type(module).__mro__}
