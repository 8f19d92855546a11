"""Shapes: what the shapes of one component's tensors tell of its config.

Names are those within the component, without what a file puts before them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

Shapes = Mapping[str, tuple[int, ...]]
"""Tensor name -> shape."""


def counted(names: Iterable[str], pattern: str) -> int:
    """One more than the largest number that `pattern` finds at the beginning of a name."""
    found = [int(match[1]) for name in names if (match := re.match(pattern, name))]
    return max(found, default=-1) + 1


def within(shapes: Shapes, prefix: str) -> dict[str, tuple[int, ...]]:
    """Those whose names begin with `prefix`, without it."""
    return {key.removeprefix(prefix): shape for key, shape in shapes.items() if key.startswith(prefix)}


def clip_config(s: Shapes, kind: str, *, activation: str = "quick_gelu") -> dict[str, Any]:
    """transformers' config of a CLIP text model in transformers' own names, after "text_model.".

    Raises:
        KeyError: a tensor of CLIP's text model is not there.
    """
    rows, width = s["embeddings.token_embedding.weight"]
    return clip_sizes(
        kind,
        rows=rows,
        width=width,
        inner=s["encoder.layers.0.mlp.fc1.weight"][0],
        layers=counted(s, r"encoder\.layers\.(\d+)\."),
        window=s["embeddings.position_embedding.weight"][0],
        activation=activation,
    )


def clip_sizes(
    kind: str,
    *,
    rows: int,
    width: int,
    inner: int,
    layers: int,
    window: int,
    activation: str,
    projection: int | None = None,
) -> dict[str, Any]:
    """transformers' config of a CLIP text model of these sizes; heads of 64, as all published have."""
    return {
        "_class_name": kind,
        "architectures": [kind],
        "model_type": "clip_text_model",
        "vocab_size": rows,
        # the last two rows of CLIP's vocabulary: <|startoftext|>, <|endoftext|>
        "bos_token_id": rows - 2,
        "eos_token_id": rows - 1,
        "pad_token_id": rows - 1,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": max(1, width // 64),
        "max_position_embeddings": window,
        "hidden_act": activation,
        "projection_dim": projection or width,
    }


def t5_config(s: Shapes) -> dict[str, Any]:
    """transformers' config of T5's encoder in transformers' own names; what shapes don't tell is as in T5 v1.1.

    Raises:
        KeyError: a tensor of T5's encoder is not there.
    """
    rows, width = s["shared.weight"]
    buckets, heads = s["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"]
    gated = "encoder.block.0.layer.1.DenseReluDense.wi_0.weight" in s
    into = "wi_0" if gated else "wi"
    return {
        "_class_name": "T5EncoderModel",
        "architectures": ["T5EncoderModel"],
        "model_type": "t5",
        "vocab_size": rows,
        "d_model": width,
        "d_kv": s["encoder.block.0.layer.0.SelfAttention.q.weight"][0] // heads,
        "d_ff": s[f"encoder.block.0.layer.1.DenseReluDense.{into}.weight"][0],
        "num_layers": counted(s, r"encoder\.block\.(\d+)\."),
        "num_heads": heads,
        "relative_attention_num_buckets": buckets,
        "relative_attention_max_distance": 128,
        "feed_forward_proj": "gated-gelu" if gated else "relu",
        "layer_norm_epsilon": 1e-6,
        "tie_word_embeddings": False,
        "pad_token_id": 0,
        "eos_token_id": 1,
    }


def vae_config(s: Shapes, **constants: Any) -> dict[str, Any]:
    """diffusers' config of a VAE in CompVis' names; `constants` are what shapes don't tell: its scale, its shift.

    Raises:
        KeyError: a tensor of the VAE is not there.
    """
    levels = counted(s, r"encoder\.down\.(\d+)\.")
    return {
        "_class_name": "AutoencoderKL",
        "in_channels": s["encoder.conv_in.weight"][1],
        "out_channels": s["decoder.conv_out.weight"][0],
        "block_out_channels": [s[f"encoder.down.{level}.block.0.conv1.weight"][0] for level in range(levels)],
        "layers_per_block": counted(s, r"encoder\.down\.0\.block\.(\d+)\."),
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "latent_channels": s["decoder.conv_in.weight"][1],
        **constants,
    }
