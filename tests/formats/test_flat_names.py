"""Flat names: the tables are what diffusers and transformers build, and every name finds its one layer."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from scumble.adapters.state import AdapterState, Metadata
from scumble.errors import FormatError
from scumble.formats.flat_names import (
    PREFIXES,
    FlatNames,
    expand,
    flat,
    is_flat,
    is_sdxl,
    known_layers,
    of_lycoris,
    original_name,
    spell,
)
from scumble.formats.tables.modules import ANY_UNET, CLIP_DEPTHS, CLIP_TEXT, SD_UNET, SDXL_UNET
from tests.formats.adapters_of import BLOCK, adapter, layer

SDXL = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
SD2 = {"cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True}


def names_in(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}


@pytest.mark.parametrize(
    ("config", "table"), [({"cross_attention_dim": 768}, SD_UNET), (SD2, SD_UNET), (SDXL, SDXL_UNET)]
)
def test_the_tables_of_unets_are_what_diffusers_builds(
    config: dict[str, object], table: tuple[str, ...]
) -> None:
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        built = names_in(UNet2DConditionModel(**config))
    mine = list(expand(table))
    assert set(mine) == built and len(mine) == len(built)
    assert built <= set(expand(ANY_UNET))


@pytest.mark.parametrize("depth", [*CLIP_DEPTHS.values(), 32])
def test_the_table_of_text_encoders_is_what_transformers_builds(depth: int) -> None:
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    with torch.device("meta"):
        model = CLIPTextModelWithProjection(CLIPTextConfig(num_hidden_layers=depth, hidden_size=64))
    mine = {
        name
        for name in expand(CLIP_TEXT)
        if not name.startswith("text_model") or int(name.split(".")[3]) < depth
    }
    assert mine == names_in(model)


def test_braces_expand_in_order_and_nest() -> None:
    assert list(expand(["a.{0,1}.{x,y.{2,3}}", "b"])) == [
        *("a.0.x", "a.0.y.2", "a.0.y.3", "a.1.x", "a.1.y.2", "a.1.y.3"),
        "b",
    ]


@pytest.mark.parametrize("sdxl", [False, True])
@pytest.mark.parametrize("with_base", [False, True])
def test_every_known_layer_is_found_again_and_no_two_share_a_name(sdxl: bool, with_base: bool) -> None:
    table = SDXL_UNET if sdxl else SD_UNET
    texts = [f"text_encoder.{name}" for name in list(expand(CLIP_TEXT[:1]))[:24]]
    texts += [f"text_encoder_2.{name}" for name in list(expand(CLIP_TEXT))[-25:]] if sdxl else []
    layers = [*(f"unet.{name}" for name in expand(table)), *texts]
    names = {path: spell(path, sdxl) for path in layers}
    assert len(set(names.values())) == len(layers) and None not in names.values()
    found = FlatNames(layers if with_base else None)
    assert [found.resolve(name) for name in names.values()] == layers  # type: ignore[arg-type]
    # diffusers' names in a file for SDXL, as several tools write them
    for path in layers[:100]:
        assert found.resolve("lora_unet_" + flat(path.removeprefix("unet."))) == path


@pytest.mark.parametrize(
    ("original", "path"),
    [
        ("input_blocks.0.0", "conv_in"),
        ("input_blocks.1.0.in_layers.2", "down_blocks.0.resnets.0.conv1"),
        ("input_blocks.3.0.op", "down_blocks.0.downsamplers.0.conv"),
        ("input_blocks.4.1.proj_in", "down_blocks.1.attentions.0.proj_in"),
        ("input_blocks.8.0.out_layers.3", "down_blocks.2.resnets.1.conv2"),
        ("middle_block.0.emb_layers.1", "mid_block.resnets.0.time_emb_proj"),
        ("middle_block.1.proj_out", "mid_block.attentions.0.proj_out"),
        ("middle_block.2.in_layers.2", "mid_block.resnets.1.conv1"),
        ("output_blocks.2.0.skip_connection", "up_blocks.0.resnets.2.conv_shortcut"),
        ("output_blocks.2.2.conv", "up_blocks.0.upsamplers.0.conv"),
        ("output_blocks.2.1.conv", "up_blocks.0.upsamplers.0.conv"),  # where the block has no attention
        (
            "output_blocks.5.1.transformer_blocks.1.attn2.to_out.0",
            "up_blocks.1.attentions.2.transformer_blocks.1.attn2.to_out.0",
        ),
        ("time_embed.2", "time_embedding.linear_2"),
        ("label_emb.0.0", "add_embedding.linear_1"),
        ("out.2", "conv_out"),
    ],
)
def test_names_of_the_original_code(original: str, path: str) -> None:
    for layers in (None, [f"unet.{path}"]):
        assert FlatNames(layers).resolve("lora_unet_" + flat(original)) == f"unet.{path}"
    if original != "output_blocks.2.1.conv":
        assert original_name(path) == original


def test_levels_of_one_resnet_are_counted_where_the_whole_base_is_at_hand() -> None:
    attention = "unet.down_blocks.1.attentions.0.proj_in"
    part = [attention, "unet.down_blocks.0.resnets.0.conv1"]
    whole = [*part, "unet.conv_in", "unet.conv_out"]
    assert FlatNames(part).resolve("lora_unet_input_blocks_4_1_proj_in") == attention
    assert FlatNames(whole).resolve("lora_unet_input_blocks_3_1_proj_in") == attention
    assert FlatNames(whole).resolve("lora_unet_input_blocks_4_1_proj_in") is None


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("lora_te_text_model_encoder_layers_1_mlp_fc1", "text_encoder.encoder.layers.1.mlp.fc1"),
        ("lora_te1_text_model_encoder_layers_1_mlp_fc1", "text_encoder.encoder.layers.1.mlp.fc1"),
        ("lora_te1_encoder_layers_1_mlp_fc1", "text_encoder.encoder.layers.1.mlp.fc1"),
        (
            "lora_te2_text_model_encoder_layers_10_mlp_fc1",
            "text_encoder_2.text_model.encoder.layers.10.mlp.fc1",
        ),
        ("lora_te2_text_projection", "text_encoder_2.text_projection"),
        ("lycoris_text_model_encoder_layers_1_mlp_fc1", "text_encoder.encoder.layers.1.mlp.fc1"),
        ("lora_te_text_model_encoder_layers_11_mlp_fc1", None),
        ("lora_te2_text_model_encoder_layers_1_mlp_fc1", None),
        ("lora_unet_text_model_encoder_layers_1_mlp_fc1", None),
        ("text_encoder_encoder_layers_1_mlp_fc1", None),
    ],
)
def test_text_encoders(name: str, path: str | None) -> None:
    layers = [
        "text_encoder.encoder.layers.1.mlp.fc1",
        "text_encoder_2.text_model.encoder.layers.10.mlp.fc1",
        "text_encoder_2.text_projection",
    ]
    assert FlatNames(layers).resolve(name) == path


def test_two_layers_with_one_flat_name_can_not_be_told_apart() -> None:
    names = FlatNames(["unet.a.b_c", "unet.a_b.c", "unet.d"])
    with pytest.raises(FormatError, match=r"may mean unet.a.b_c or unet.a_b.c"):
        names.resolve("lora_unet_a_b_c")
    assert names.resolve("lora_unet_d") == "unet.d"


def test_no_prefix_begins_as_another() -> None:
    assert not any(one != other and one.startswith(other) for one in PREFIXES for other in PREFIXES)
    assert is_flat("lora_te1_x") and not is_flat("unet.x") and not is_flat("lora_te3_x")
    assert of_lycoris("lora_unet_x.hada_w1_a") and not of_lycoris("lora_unet_x.lora_down.weight")
    assert not of_lycoris("lora_unet_x.alpha")


def test_an_adapter_for_sdxl_is_known_by_its_width_its_second_encoder_or_its_word() -> None:
    one = f"{BLOCK}.attn2.to_k"
    wide = AdapterState({one: layer(one)})
    assert not is_sdxl(wide)
    assert is_sdxl(adapter(["text_encoder_2.text_model.encoder.layers.1.mlp.fc1"]))
    assert is_sdxl(adapter([one], Metadata(base_family="sdxl")))
    tensors = {"down": torch.zeros(4, 2048), "up": torch.zeros(32, 4)}
    assert is_sdxl(AdapterState({one: type(layer(one))("lora", 4, 4.0, tensors)}))
    factors = {"w1": torch.zeros(4, 4), "w2": torch.zeros(8, 512)}  # a Kronecker product of 32 x 2048
    assert is_sdxl(AdapterState({one: type(layer(one))("lokr", 4, 4.0, factors)}))
    deep = one.replace("transformer_blocks.0", "transformer_blocks.3")
    assert deep != one and is_sdxl(AdapterState({deep: layer(one)}))
    assert len(known_layers()) == len(set(known_layers()))


@pytest.mark.parametrize(
    ("entry", "word", "expected"),
    [
        ("ss_base_model_version", "sdxl_base_v1-0", True),
        ("modelspec.architecture", "stable-diffusion-xl-v1-base/lora", True),
        ("ss_base_model_version", "sd_v1", False),
        ("modelspec.architecture", "stable-diffusion-v1/lora", False),
    ],
)
def test_an_adapter_for_sdxl_is_known_by_what_its_file_says(entry: str, word: str, expected: bool) -> None:
    state = AdapterState({"text_encoder.encoder.layers.1.mlp.fc1": layer(f"{BLOCK}.attn2.to_k")})
    assert not is_sdxl(state)
    assert is_sdxl(replace(state, metadata=Metadata(extra={entry: word}))) is expected
