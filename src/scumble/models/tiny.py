"""Tiny bases: the real classes in toy sizes, from a seed, without a file: for tests and for trying things
out.

Module names are those of the full-size families, so that targets, key tables and file formats meet what they
will meet in earnest; a base is built in a fraction of a second and draws 16x16 pixels of nothing.
"""

from __future__ import annotations

import string
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from scumble.models.family import Components
from scumble.models.text import byte_symbols

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

WINDOW = 77
"""Tokens of a prompt, as in CLIP."""

T5_WINDOW = 512
"""Tokens of a prompt, as in T5."""

START, END = "<|startoftext|>", "<|endoftext|>"


@dataclass(frozen=True)
class TinySizes:
    """What differs between the toy instances of the UNet families."""

    width: int
    """Of the text embeddings and the cross-attention."""
    heads: int | tuple[int, ...]
    """Attention heads of the UNet: on every level, or one number a level."""
    linear: bool
    """Whether the UNet's transformers project by linear layers."""
    prediction: str = "epsilon"
    activation: str = "quick_gelu"
    """Of the text encoder."""
    padding: str = END
    """The token that fills a prompt up."""
    channels: int = 4
    """Channels that the UNet takes."""


def tiny_tokenizer(padding: str = END) -> Any:
    """A CLIPTokenizer with a byte-level vocabulary of 520 tokens: encodes any string, with a few merges for
    English."""
    from transformers import CLIPTokenizer

    symbols = list(byte_symbols().values())
    merges = ["t h", "th e</w>", "a n", "an d</w>", "o f</w>", "o n</w>"]
    words = [merge.replace(" ", "") for merge in merges]
    vocabulary = [*symbols, *(symbol + "</w>" for symbol in symbols), *words, START, END]
    return CLIPTokenizer(
        vocab={word: index for index, word in enumerate(vocabulary)},
        merges=[tuple(merge.split()) for merge in merges],
        pad_token=padding,
        model_max_length=WINDOW,
    )


def tiny_vae(scaling_factor: float, *, channels: int = 4, shift_factor: float | None = None) -> Any:
    """A random AutoencoderKL of so many latent channels, 2 pixels per latent. Those with a shift have no layers between
    it and their latents, as at full size."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=channels,
        sample_size=16,
        scaling_factor=scaling_factor,
        shift_factor=shift_factor,
        use_quant_conv=shift_factor is None,
        use_post_quant_conv=shift_factor is None,
    )


def tiny_clip(tokenizer: Any, width: int, activation: str, **others: Any) -> Any:
    """The CLIPTextConfig of a text encoder of two layers that reads this tokenizer's words."""
    from transformers import CLIPTextConfig

    sizes = {
        "vocab_size": len(tokenizer),
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "projection_dim": width,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "hidden_act": activation,
        "max_position_embeddings": WINDOW,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    return CLIPTextConfig(**{**sizes, **others})


def tiny_t5_tokenizer() -> Any:
    """A T5Tokenizer of 104 pieces, ASCII's letters and a few words: other letters are unknown to it."""
    from transformers import T5Tokenizer

    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -20.0), ("\u2581", -2.0)]
    letters = [(letter, -4.0) for letter in string.printable[:94]]
    words = [(f"\u2581{word}", -3.0) for word in ("a", "the", "fox", "and", "in", "of")]
    return T5Tokenizer(vocab=[*special, *letters, *words], extra_ids=0, model_max_length=T5_WINDOW)


def tiny_t5(tokenizer: Any, width: int) -> Any:
    """The T5Config of a gated encoder of two layers, as T5 v1.1's, that reads this tokenizer's words."""
    from transformers import T5Config

    return T5Config(
        vocab_size=len(tokenizer),
        d_model=width,
        d_kv=width // 4,
        d_ff=2 * width,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        is_encoder_decoder=False,
        use_cache=False,
    )


def tiny_components(name: str, sizes: TinySizes, seed: int) -> Components:
    """Random parts of these sizes, the same for equal seeds. The global random state is left as it was."""
    from diffusers import DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPTextModel

    tokenizer = tiny_tokenizer(sizes.padding)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = UNet2DConditionModel(
            sample_size=8,
            in_channels=sizes.channels,
            block_out_channels=(32, 64),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=sizes.width,
            attention_head_dim=sizes.heads,
            use_linear_projection=sizes.linear,
        )
        vae = tiny_vae(0.18215)
        text_encoder = CLIPTextModel(tiny_clip(tokenizer, sizes.width, sizes.activation))
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=sizes.prediction,
    )
    return Components(
        name=name,
        modules={"unet": unet, "vae": vae, "text_encoder": text_encoder},
        tokenizers={"tokenizer": tokenizer},
        scheduler=scheduler,
    )


def tiny_pipeline(family: str, seed: int = 0) -> StableDiffusionPipeline:
    """The toy base of a family as a diffusers pipeline.

    Raises:
        UnknownName: no family is called so.
    """
    from scumble.models import FAMILIES

    pipeline: Any = FAMILIES.get(family).tiny(seed).pipeline()
    return pipeline  # type: ignore[no-any-return]


def save(family: str, folder: Path | str, seed: int = 0) -> Path:
    """Write the toy base of a family as a diffusers folder, as `load_base` reads it. Returns the folder.

    Raises:
        UnknownName: no family is called so.
    """
    tiny_pipeline(family, seed).save_pretrained(str(folder))
    return Path(folder)
