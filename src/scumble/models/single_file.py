"""Single checkpoints: the diffusers configs that the tensors of one .safetensors file imply.

Such a file (CompVis' names: "model.diffusion_model.", "first_stage_model.", "cond_stage_model.", SDXL's
"conditioner.") holds
weights and no configs. diffusers' loader would fetch the configs of a well-known base from the Hub; here they
are told from the shapes, so that a local file needs no network and a base of unusual size loads too. Weights
are read by diffusers.

Families whose files name their components otherwise say how (see `file_layout`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scumble.errors import ModelError
from scumble.models.configs import Configs, read_header
from scumble.models.file_layout import layout_of, phrases
from scumble.models.shapes import Shapes, clip_config, clip_sizes, counted, within
from scumble.models.shapes import vae_config as vae_sizes
from scumble.tensor_files.header import Header

UNET, VAE = "model.diffusion_model.", "first_stage_model."
CLIP, OPEN_CLIP = "cond_stage_model.transformer.text_model.", "cond_stage_model.model."
XL = "conditioner.embedders."
XL_CLIP, XL_OPEN_CLIP = f"{XL}0.transformer.text_model.", f"{XL}1.model."
REFINER_OPEN_CLIP = f"{XL}0.model."

SIGNS = (
    ("double_stream_modulation_img.", "Flux2Pipeline"),
    ("distilled_guidance_layer.", "ChromaPipeline"),
)
"""Beginning of a tensor's name (after "model.diffusion_model.", where it has that) -> the pipeline it belongs
to, of those that no family reads."""

ADAPTER_SIGNS = (
    "lora_up",
    "lora_down",
    "lora_A",
    "lora_B",
    "lora.up",
    "lora.down",
    "hada_w1",
    "lokr_w",
    "_lora.",
    "_lora1.",
    "_lora2.",
)

XL_TIME_WIDTH = 256
"""Numbers by which SDXL is told each number of the picture's geometry: from the published configs, since shapes don't
tell it."""

PARTS = (
    "down_blocks.",
    "encoder.",
    "text_model.",
    "decoder.",
    "transformer_blocks.",
    "single_transformer_blocks.",
)
"""Beginnings of names in the files of single components in diffusers' layout."""


def read_checkpoint(path: Path, name: str) -> Configs:
    """The configs of a single-file checkpoint, from its header alone.

    Raises:
        ModelError: the file is no checkpoint of a base (says what it is instead, where that can be told).
    """
    if path.suffix != ".safetensors":
        raise ModelError(
            f"{name} is not a .safetensors file. Pickles (.ckpt, .pt, .bin) are never opened here: they "
            f"could run code. Convert it to .safetensors first."
        )
    header = read_header(path)
    shapes = header.shapes
    if any(sign in key for key in shapes for sign in ADAPTER_SIGNS):
        raise ModelError(
            f"{name} is not a checkpoint of a base model. It is an adapter: name its base here, and the adapter where "
            "adapters go."
        )
    bare = {key.removeprefix(UNET): key for key in shapes}
    for sign, pipeline in SIGNS:
        if any(key.startswith(sign) for key in bare):
            return Configs(name, pipeline, {}, weights_dtype=header.dtype)
    layout = layout_of(shapes)
    if layout is not None:
        return layout.configs(header, name)
    if not any(key.startswith(UNET) for key in shapes):
        raise ModelError(f"{name} is not a checkpoint of a base model. {_what_file(shapes)}")
    has_vae = any(key.startswith(VAE) for key in shapes)
    is_xl = any(key.startswith(XL) for key in shapes)
    try:
        unet, vae, texts = unet_config(shapes), vae_config(shapes) if has_vae else {}, text_configs(shapes)
    except (KeyError, IndexError) as error:
        raise not_laid_out(name, error) from error
    stated, notes = _stated(header)
    lacking = {} if has_vae else {"vae": f"the VAE ({VAE}...) in the file"}
    parts: dict[str, Mapping[str, Any]] = {
        "unet": unet,
        "vae": vae or {"_class_name": "AutoencoderKL"},
        "scheduler": scheduler_config(stated, zero_snr="ztsnr" in shapes, xl=is_xl),
    }
    prefixes: dict[str, str] = {}
    for part, (prefix, text) in texts.items():
        prefixes[part] = prefix
        if text is None:
            lacking[part] = f"the {part.replace('_', ' ')} ({prefix}...) in the file"
        parts[part] = text or {"_class_name": _text_class(part)}
        # OpenCLIP fills a prompt up with token 0, which is "!"; CLIP with its end token, the tokenizer's own
        # default
        parts[part.replace("text_encoder", "tokenizer")] = {
            "_class_name": "CLIPTokenizer",
            "pad_token": "!" if f"{prefix}positional_embedding" in shapes else None,
        }
    if sum(key.startswith("model_ema.") for key in shapes) > 100:
        notes.append(
            "The checkpoint holds averaged weights (model_ema.) as well; the plain ones are used, as usual."
        )
    unet["sample_size"] = default_side(unet, stated)
    count = {
        part: sum(math.prod(shape) for key, shape in shapes.items() if key.startswith(beginning))
        for part, beginning in (("unet", UNET), ("vae", VAE), *prefixes.items())
    }
    return Configs(
        name,
        "StableDiffusionXLPipeline" if is_xl else "StableDiffusionPipeline",
        parts,
        phrases(lacking),
        tuple(notes),
        count,
        header.dtype,
        probe=stated is None,
        lacking=lacking,
    )


def _text_class(part: str) -> str:
    return "CLIPTextModelWithProjection" if part == "text_encoder_2" else "CLIPTextModel"


def not_laid_out(name: str, error: Exception) -> ModelError:
    """The refusal of a file in which the tensor that `error` names is not in its place."""
    return ModelError(
        f"{name} is not laid out as Stable Diffusion's checkpoints are: {error} is not where it belongs. "
        "If diffusers can load it, save it as a folder with save_pretrained and name that folder."
    )


def _what_file(shapes: Shapes) -> str:
    if any(key.startswith(PARTS) for key in shapes):
        return (
            "It is one component of a base in diffusers' layout: name the folder that holds model_index.json."
        )
    return f"Its {len(shapes)} tensors are called {', '.join(sorted(shapes)[:3])}, ..."


def _stated(header: Header) -> tuple[str | None, list[str]]:
    """(the prediction type that the file states, notes)."""
    words = {"epsilon": "epsilon", "eps": "epsilon", "v": "v_prediction", "v_prediction": "v_prediction"}
    said = header.metadata.get("modelspec.prediction_type", "").lower()
    if said in words:
        return words[said], [f"The file's header says that it predicts {said} (modelspec.prediction_type)."]
    if "v_pred" in header.entries:
        return "v_prediction", ['The file holds the mark "v_pred": it predicts velocity.']
    return None, []


def unet_config(shapes: Shapes) -> dict[str, Any]:
    """diffusers' config of the UNet under "model.diffusion_model.".

    Raises:
        KeyError: a tensor of Stable Diffusion's UNet is not there.
    """
    s = within(shapes, UNET)
    levels: list[list[int]] = [[]]
    """Output channels of the residual blocks of each level."""
    attended: dict[int, int] = {}
    """Level -> index of an input block with a transformer."""
    for index in range(1, counted(s, r"input_blocks\.(\d+)\.")):
        if f"input_blocks.{index}.0.op.weight" in s:
            levels.append([])
            continue
        levels[-1].append(s[f"input_blocks.{index}.0.out_layers.3.weight"][0])
        if f"input_blocks.{index}.1.proj_in.weight" in s:
            attended[len(levels) - 1] = index
    channels = [level[-1] for level in levels]
    projection = s["middle_block.1.proj_in.weight"]
    linear = len(projection) == 2
    # SD 1 has 8 heads on every level, SD 2 heads of 64 channels; shapes don't tell, the two published configs
    # do
    heads: Any = [count // 64 for count in channels] if linear else 8
    if linear and any(count % 64 for count in channels):
        raise KeyError(f"a multiple of 64 in the channels {channels}")
    told = [key for key in shapes if key.startswith(XL)]
    depth: Any = counted(s, r"middle_block\.1\.transformer_blocks\.(\d+)\.")
    if told:  # SDXL's transformers grow deeper with the level; on one without any, 1 means nothing
        blocks = (rf"input_blocks\.{attended.get(level)}\.1" for level in range(len(levels)))
        depth = [counted(s, rf"{block}\.transformer_blocks\.(\d+)\.") or 1 for block in blocks]
    crossing = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"
    plain = "DownBlock2D", "UpBlock2D"
    kinds = [crossing if level in attended else plain for level in range(len(levels))]
    config = {
        "_class_name": "UNet2DConditionModel",
        "sample_size": 64,
        "in_channels": s["input_blocks.0.0.weight"][1],
        "out_channels": s["out.2.weight"][0],
        "block_out_channels": channels,
        "layers_per_block": len(levels[0]),
        "down_block_types": [down for down, _ in kinds],
        "up_block_types": [up for _, up in reversed(kinds)],
        "cross_attention_dim": s["middle_block.1.transformer_blocks.0.attn2.to_k.weight"][1],
        "attention_head_dim": heads,
        "transformer_layers_per_block": depth,
        "use_linear_projection": linear,
        # SD 2.1 overflows in fp16 attention without it; the file does not say which 2.x it is
        "upcast_attention": linear and not told,
    }
    if told:
        config |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": XL_TIME_WIDTH,
            "projection_class_embeddings_input_dim": s["label_emb.0.0.weight"][1],
        }
    elif "label_emb.0.0.weight" in s:
        config |= {
            "class_embed_type": "projection",
            "projection_class_embeddings_input_dim": s["label_emb.0.0.weight"][1],
        }
    return config


def default_side(unet: Mapping[str, Any], prediction: str | None) -> int:
    """Default side in latents: 128 for SDXL (1024 pixels), 96 for SD 2 with velocity prediction (768 pixels), else 64
    (512 pixels)."""
    if unet.get("addition_embed_type") is not None:
        return 128
    return 96 if unet["use_linear_projection"] and prediction == "v_prediction" else 64


def vae_config(shapes: Shapes) -> dict[str, Any]:
    """diffusers' config of the VAE under "first_stage_model."."""
    s = within(shapes, VAE)
    return vae_sizes(
        s,
        latent_channels=s["post_quant_conv.weight"][0],
        sample_size=512,
        # the constants of all releases; a file without configs can't say another
        scaling_factor=0.13025 if any(key.startswith(XL) for key in shapes) else 0.18215,
    )


def text_configs(shapes: Shapes) -> dict[str, tuple[str, dict[str, Any] | None]]:
    """Text encoder -> (the beginning of its tensors' names, transformers' config of it, or None when the file holds
    none). A refiner has SDXL's second alone."""
    if f"{REFINER_OPEN_CLIP}token_embedding.weight" in shapes:
        return {"text_encoder_2": (REFINER_OPEN_CLIP, text_config(shapes, REFINER_OPEN_CLIP, pooled=True))}
    if any(key.startswith(XL) for key in shapes):
        return {
            "text_encoder": (XL_CLIP, text_config(shapes, XL_CLIP)),
            "text_encoder_2": (XL_OPEN_CLIP, text_config(shapes, XL_OPEN_CLIP, pooled=True)),
        }
    prefix = OPEN_CLIP if f"{OPEN_CLIP}token_embedding.weight" in shapes else CLIP
    return {"text_encoder": (prefix, text_config(shapes, prefix))}


def text_config(shapes: Shapes, prefix: str, *, pooled: bool = False) -> dict[str, Any] | None:
    """transformers' config of the text encoder whose tensors begin with `prefix`, or None when the file holds none.

    `pooled`: with the projection of its pooled embedding. SD 2 takes the last layer but one of OpenCLIP ViT-H, so that
    its config has one layer less than the file.
    """
    kind = "CLIPTextModelWithProjection" if pooled else "CLIPTextModel"
    s = within(shapes, prefix)
    if "embeddings.token_embedding.weight" in s:
        return clip_config(s, kind)
    if "token_embedding.weight" not in s:
        return None
    rows, width = s["token_embedding.weight"]
    layers = counted(s, r"transformer\.resblocks\.(\d+)\.")
    # the last of ViT-H's 24 is there, and is not used; diffusers drops it by its number
    layers -= layers == 24
    return clip_sizes(
        kind,
        rows=rows,
        width=width,
        inner=s["transformer.resblocks.0.mlp.c_fc.weight"][0],
        layers=layers,
        window=s["positional_embedding"][0],
        activation="gelu",
        projection=s["text_projection"][1] if pooled else None,
    )


def scheduler_config(prediction: str | None, *, zero_snr: bool = False, xl: bool = False) -> dict[str, Any]:
    """The noise schedule of every SD 1, SD 2 and SDXL release; no `prediction` leaves it open."""
    config: dict[str, Any] = {
        "_class_name": "DDIMScheduler",
        "num_train_timesteps": 1000,
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "clip_sample": False,
        "set_alpha_to_one": False,
        "steps_offset": 1,
        "rescale_betas_zero_snr": zero_snr,
    }
    if xl:
        config |= {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "leading"}
        del config["clip_sample"], config["set_alpha_to_one"]
    return config if prediction is None else config | {"prediction_type": prediction}


def write_configs(configs: Configs, folder: Path) -> None:
    """Write the configs as the diffusers folder that `from_single_file(config=...)` takes (without a
    tokenizer)."""
    index: dict[str, Any] = {"_class_name": configs.pipeline, **configs.options}
    for part, config in configs.parts.items():
        library = "transformers" if part.startswith(("text_encoder", "tokenizer")) else "diffusers"
        index[part] = [library, config["_class_name"]]
        directory = folder / part
        directory.mkdir(parents=True)
        file = "scheduler_config.json" if part == "scheduler" else "config.json"
        (directory / file).write_text(json.dumps(dict(config)), encoding="utf-8")
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
