"""Attention in a UNet: by PyTorch's fused kernel, by plain matrix products, or by whichever is faster
here."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from scumble.errors import UnknownName

PLAIN_KEYS = 256
"""Up to this many keys plain products are the faster way to train in bf16 on a CPU (AMX, torch 2.13): 1.3 to
4.9 times at 16 to 256 positions, 1.3 to 1.6 times in cross-attention (77 keys) at SD 1.5's shapes; 0.5 to 0.9
times at 1024 keys and more."""


class FasterAttention:
    """An attention processor that chooses at every call: plain products or the fused kernel.

    The fused kernel's backward pass is the slow one on a CPU in bf16 where keys are few (see `PLAIN_KEYS`);
    everywhere else the fused kernel is the faster way, and the one that needs less memory.
    """

    def __init__(self) -> None:
        from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

        self.plain: Any = AttnProcessor()
        self.fused: Any = AttnProcessor2_0()

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        chosen = self.plain if plain_is_faster(hidden_states, encoder_hidden_states) else self.fused
        result: Tensor = chosen(
            attn, hidden_states, encoder_hidden_states, attention_mask, temb, *args, **kwargs
        )
        return result


def plain_is_faster(queries: Tensor, keys: Tensor | None = None) -> bool:
    """Whether plain products beat the fused kernel: (B, positions, C) or (B, C, h, w); no `keys` is
    self-attention."""
    if queries.device.type != "cpu" or not torch.is_grad_enabled():
        return False
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else queries.dtype
    seen = queries if keys is None else keys
    count = seen.shape[1] if seen.ndim == 3 else seen.shape[2:].numel()
    return dtype == torch.bfloat16 and count <= PLAIN_KEYS


def set_attention(unet: nn.Module, kind: str) -> None:
    """Give every attention layer of a diffusers UNet one processor: "sdpa", "plain" or "auto".

    Raises:
        UnknownName: no kind is called so.
    """
    from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

    kinds: dict[str, Any] = {"auto": FasterAttention, "sdpa": AttnProcessor2_0, "plain": AttnProcessor}
    if kind not in kinds:
        raise UnknownName("attention", kind, kinds)
    model: Any = unet
    model.set_attn_processor(kinds[kind]())
