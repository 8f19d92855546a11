"""Flux.1's files: fused matrices split and joined without loss, as diffusers' own converters split them."""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some

from scumble.adapters import layers_of
from scumble.adapters.state import AdapterState, LayerState, Metadata
from scumble.errors import CannotRepresent, FormatError, UnusedTensors
from scumble.formats import CODECS, TensorFile, detect, read, write
from scumble.formats.flat_names import expand
from scumble.formats.flux import PADDED, known_layers, name_of, parts_named
from scumble.formats.tables.modules import FLUX_TRANSFORMER, T5_TEXT

WIDTH = 8
WRITERS = ("kohya-flux", "bfl", "xlabs")
DOUBLE, SINGLE = "transformer.transformer_blocks.0", "transformer.single_transformer_blocks.1"
SHAPES: dict[str, tuple[int, int]] = {
    **{f"{DOUBLE}.attn.{name}": (WIDTH, WIDTH) for name in ("to_q", "to_k", "to_v", "to_out.0")},
    **{
        f"{DOUBLE}.attn.{name}": (WIDTH, WIDTH)
        for name in ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
    },
    f"{DOUBLE}.ff.net.0.proj": (4 * WIDTH, WIDTH),
    f"{DOUBLE}.ff_context.net.2": (WIDTH, 4 * WIDTH),
    f"{DOUBLE}.norm1.linear": (6 * WIDTH, WIDTH),
    **{f"{SINGLE}.attn.{name}": (WIDTH, WIDTH) for name in ("to_q", "to_k", "to_v")},
    f"{SINGLE}.proj_mlp": (4 * WIDTH, WIDTH),
    f"{SINGLE}.proj_out": (WIDTH, 5 * WIDTH),
    f"{SINGLE}.norm.linear": (3 * WIDTH, WIDTH),
    "transformer.x_embedder": (WIDTH, 6),
    "transformer.time_text_embed.text_embedder.linear_1": (WIDTH, 5),
    "transformer.norm_out.linear": (2 * WIDTH, WIDTH),
    "transformer.proj_out": (6, WIDTH),
    "text_encoder.encoder.layers.0.self_attn.q_proj": (4, 4),
    "text_encoder_2.encoder.block.0.layer.0.SelfAttention.q": (6, 6),
}
"""Layers of a small Flux, text encoders included."""
QKV = tuple(f"{DOUBLE}.attn.to_{x}" for x in "qkv")


def layer(
    path: str, rank: int, *, alpha: float | None = None, seed: int = 0, shapes: Mapping[str, Any] = SHAPES
) -> LayerState:
    out, inner = shapes[path]
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        "down": torch.randn(rank, inner, generator=generator),
        "up": torch.randn(out, rank, generator=generator),
    }
    return LayerState("lora", rank, float(rank) if alpha is None else alpha, tensors)


def adapter(paths: Iterable[str], rank: int = 4, **how: Any) -> AdapterState:
    return AdapterState({path: layer(path, rank, seed=n, **how) for n, path in enumerate(paths)})


def held(name: str) -> tuple[str, ...]:
    """The layers that a dialect has names for."""
    codec = CODECS.get(name)()
    attention = f"{DOUBLE}.attn.to_q"
    return tuple(p for p in SHAPES if codec.obstacle(adapter({attention, p}, 2)) is None)


@some.composite
def states(draw: some.DrawFn, name: str) -> AdapterState:
    """Adapters of mixed rank, one scale a matrix, with one A for several parts or one for each, of one dtype."""
    paths = draw(some.lists(some.sampled_from(held(name)), min_size=1, unique=True))
    if not any(path.startswith("transformer.") for path in paths):
        paths.append(f"{DOUBLE}.attn.to_q")
    dtype = draw(some.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
    shared = draw(some.booleans())
    scale = draw(some.sampled_from([1.0, 0.5, 2.0, 0.3])) if name != "xlabs" else 1.0
    stabilized = name != "xlabs" and draw(some.booleans())
    common = draw(some.integers(1, 6))
    layers = {}
    for path in paths:
        rank = common if shared else draw(some.integers(1, 6))
        # one A for all that read the same
        one = layer(path, rank, seed=SHAPES[path][1] if shared else draw(some.integers(0, 99)))
        if draw(some.integers(0, 9)) == 0:
            one = replace(one, tensors={**one.tensors, "up": torch.zeros_like(one.tensors["up"])})
        tensors = {part: tensor.to(dtype) for part, tensor in one.tensors.items()}
        alpha = scale * (rank**0.5 if stabilized else rank)
        layers[path] = replace(one, tensors=tensors, alpha=alpha, rank_stabilized=stabilized)
    return AdapterState(layers, metadata=Metadata(base_name="b", extra={"said": "so"}))


def expectable(state: AdapterState) -> bool:
    """Whether the scales of one matrix's parts are one number to the last bit (sqrt may round)."""
    scales: dict[str | None, set[float]] = {}
    for path, one in state.layers.items():
        scales.setdefault(name_of(path), set()).add(one.scale)
    return all(len(found) == 1 for name, found in scales.items() if name is not None)


@pytest.mark.parametrize("name", WRITERS)
@settings(max_examples=60, deadline=None)
@given(data=some.data())
def test_decode_inverts_encode_bit_for_bit(name: str, data: some.DataObject) -> None:
    state = data.draw(states(name))
    codec = CODECS.get(name)()
    if not expectable(state):
        with pytest.raises(CannotRepresent):
            codec.encode(state)
        return
    assert codec.obstacle(state) is None
    file = codec.encode(state)
    for bare in (file, replace(file, metadata={})):
        assert [other for other in CODECS if CODECS.get(other)().matches(bare)] == [name]
    for layers in (SHAPES, SHAPES.keys(), None):
        decoded = codec.decode(file, layers)
        found = decoded.state
        if layers is None:  # CLIP's classic names
            continue
        assert (
            found.equal(state) and found.metadata.extra["said"] == "so" and PADDED not in found.metadata.extra
        )
        assert sorted(decoded.used) == sorted(file.tensors) and not decoded.unused and not decoded.ignored


@pytest.mark.parametrize("name", WRITERS)
@settings(max_examples=40, deadline=None)
@given(data=some.data())
def test_without_our_header_the_change_is_the_same(name: str, data: some.DataObject) -> None:
    state = data.draw(states(name))
    codec = CODECS.get(name)()
    if not expectable(state):
        return
    file = codec.encode(state)
    found = codec.decode(replace(file, metadata={}), SHAPES).state
    for path, one in found.layers.items():
        change = one.scale * one.tensors["up"].double() @ one.tensors["down"].double()
        mine = state.layers.get(path)
        wanted = torch.zeros_like(change)
        if mine is not None:
            wanted = mine.scale * mine.tensors["up"].double() @ mine.tensors["down"].double()
        assert (change - wanted).norm() <= 1e-6 * wanted.norm() + 1e-12
    assert set(state.layers) <= set(found.layers)


def test_one_a_is_written_once_and_three_become_blocks() -> None:
    codec = CODECS.get("kohya-flux")()
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    shared = AdapterState({path: layer(path, 4, seed=0) for path in QKV})
    file = codec.encode(shared)
    assert file.tensors[f"{name}.lora_down.weight"].shape == (4, WIDTH)
    assert (
        file.tensors[f"{name}.lora_up.weight"].shape == (3 * WIDTH, 4)
        and float(file.tensors[f"{name}.alpha"]) == 4
    )
    apart = adapter(QKV, 4, alpha=2.0)
    file = codec.encode(apart)
    up = file.tensors[f"{name}.lora_up.weight"]
    assert up.shape == (3 * WIDTH, 12) and int((up != 0).sum()) == 3 * WIDTH * 4
    assert float(file.tensors[f"{name}.alpha"]) == 6
    assert file.metadata["ss_network_module"] == "networks.lora_flux"


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (
            AdapterState({QKV[0]: layer(QKV[0], 4), QKV[1]: layer(QKV[1], 4, alpha=1.0)}),
            "img_attn.qkv' is one matrix with one alpha.*scales 1, 0.25",
        ),
        (
            AdapterState({"transformer.pos_embed.proj": LayerState("lora", 1, 1.0, {})}),
            "no name for 'transformer.pos_embed",
        ),
        (AdapterState({"unet.conv_in": LayerState("lora", 1, 1.0, {})}), "for Flux.1's transformer"),
    ],
)
def test_what_it_can_not_hold_is_refused_by_name(state: AdapterState, message: str) -> None:
    obstacle = CODECS.get("bfl")().obstacle(state)
    assert obstacle is not None and re.search(message, obstacle)


def test_what_stands_beside_the_factors_has_no_place() -> None:
    biased = layer(QKV[0], 2)
    biased = replace(biased, tensors={**biased.tensors, "bias": torch.ones(WIDTH)})
    for name in WRITERS:
        assert "no place for bias" in str(CODECS.get(name)().obstacle(AdapterState({QKV[0]: biased})))


def test_xlabs_has_neither_feed_forward_nor_alpha() -> None:
    codec = CODECS.get("xlabs")()
    assert f"{DOUBLE}.ff.net.0.proj" not in held("xlabs") and f"{SINGLE}.proj_mlp" not in held("xlabs")
    assert "no name for" in str(codec.obstacle(adapter([*QKV, f"{SINGLE}.proj_mlp"])))
    assert "no place for an alpha" in str(codec.obstacle(adapter(QKV, 4, alpha=2.0)))


def test_every_layer_has_one_name_and_every_name_its_layers() -> None:
    for path in known_layers():
        if path.startswith("transformer."):
            name = name_of(path)
            assert name is not None and path in parts_named(name), path


@pytest.mark.parametrize("part", ["lora_down.weight", "lora_up.weight"])
def test_half_a_pair_is_one_error(part: str, tmp_path: Path) -> None:
    file = CODECS.get("kohya-flux")().encode(adapter(QKV))
    name = f"lora_unet_double_blocks_0_img_attn_qkv.{part}"
    tensors = {key: tensor for key, tensor in file.tensors.items() if key != name}
    with pytest.raises(FormatError, match="only one of the two factors"):
        CODECS.get("kohya-flux")().decode(TensorFile(tensors), SHAPES)


def test_rows_that_are_no_qkv_are_one_error() -> None:
    tensors = {
        "double_blocks.0.img_attn.qkv.lora_A.weight": torch.ones(2, WIDTH),
        "double_blocks.0.img_attn.qkv.lora_B.weight": torch.ones(3 * WIDTH + 1, 2),
    }
    with pytest.raises(FormatError, match="not q, k and v of 8 each"):
        CODECS.get("bfl")().decode(TensorFile(tensors), SHAPES)


def test_what_the_base_lacks_is_reported_whole(tmp_path: Path) -> None:
    state = adapter([*QKV, f"{SINGLE}.proj_out"])
    path = write(state, tmp_path / "a.safetensors", "kohya-flux")
    assert detect(path) == "kohya-flux"
    fewer = {name: shape for name, shape in SHAPES.items() if not name.startswith(SINGLE)}
    with pytest.raises(UnusedTensors, match="3 of 6 tensors matched no layer"):
        read(path, fewer)
    found = read(path, fewer, allow_partial=True)
    assert set(found.state.layers) == set(QKV) and len(found.unused) == 3
    assert found.report == "3/4 transformer layers, 3 unused tensors"


def test_comfyuis_prefix_and_onetrainers_flat_names_are_read() -> None:
    apart = adapter(QKV)
    file = CODECS.get("bfl")().encode(apart)
    prefixed = TensorFile(
        {f"diffusion_model.{name}": tensor for name, tensor in file.tensors.items()}, file.metadata
    )
    assert [name for name in CODECS if CODECS.get(name)().matches(prefixed)] == ["bfl"]
    assert CODECS.get("bfl")().decode(prefixed, SHAPES).state.equal(apart)
    flat: dict[str, torch.Tensor] = {}
    for path, one in apart.layers.items():
        spelled = "lora_transformer_" + path.removeprefix("transformer.").replace(".", "_")
        flat |= {
            f"{spelled}.lora_down.weight": one.tensors["down"],
            f"{spelled}.lora_up.weight": one.tensors["up"],
        }
    assert [name for name in CODECS if CODECS.get(name)().matches(TensorFile(flat))] == ["kohya-flux"]
    for layers in (SHAPES, None):
        assert CODECS.get("kohya-flux")().decode(TensorFile(flat), layers).state.equal(apart)


# -- as diffusers reads them ---------------------------------------------------------------------------------

FULL = 3072
FULL_SHAPES = {
    **{
        f"transformer.transformer_blocks.3.attn.{name}": (FULL, FULL)
        for name in ("to_q", "to_k", "to_v", "to_out.0")
    },
    **{f"transformer.transformer_blocks.3.attn.add_{x}_proj": (FULL, FULL) for x in "qkv"},
    "transformer.transformer_blocks.3.norm1_context.linear": (6 * FULL, FULL),
    **{f"transformer.single_transformer_blocks.30.attn.to_{x}": (FULL, FULL) for x in "qkv"},
    "transformer.single_transformer_blocks.30.proj_mlp": (4 * FULL, FULL),
    "transformer.single_transformer_blocks.30.proj_out": (FULL, 5 * FULL),
}
XLABS = [path for path in FULL_SHAPES if "norm" not in path and "proj_mlp" not in path]


def theirs(name: str, file: TensorFile) -> dict[str, torch.Tensor]:
    """What diffusers makes of a file's tensors."""
    from diffusers import FluxPipeline

    state, alphas = FluxPipeline.lora_state_dict(dict(file.tensors), return_alphas=True)
    assert not alphas
    return dict(state)


@pytest.mark.parametrize("form", ["shared", "blocks"])
@pytest.mark.parametrize("name", ["kohya-flux", "xlabs"])
def test_files_are_split_as_diffusers_splits_them(name: str, form: str) -> None:
    paths = XLABS if name == "xlabs" else list(FULL_SHAPES)
    alpha = 3.0 if name == "xlabs" else 1.5
    layers = {
        path: layer(path, 3, alpha=alpha, seed=0 if form == "shared" else n, shapes=FULL_SHAPES)
        for n, path in enumerate(paths)
    }
    codec = CODECS.get(name)()
    file = codec.encode(AdapterState(layers))
    converted = theirs(name, file)
    ours = codec.decode(replace(file, metadata={}), None).state
    assert {key.removesuffix(".lora_A.weight") for key in converted if "lora_A" in key} == set(ours.layers)
    for path, one in ours.layers.items():
        down, up = converted[f"{path}.lora_A.weight"], converted[f"{path}.lora_B.weight"]
        same_rank = down.shape[0] == one.rank
        assert same_rank or name == "xlabs"  # their reader of XLabs' files never looks for blocks
        if same_rank:
            torch.testing.assert_close(down, one.scale * one.tensors["down"])
            torch.testing.assert_close(up, one.tensors["up"])
        else:
            torch.testing.assert_close(
                up @ down[:, :64], one.scale * one.tensors["up"] @ one.tensors["down"][:, :64]
            )


def outputs(pipeline: Any) -> torch.Tensor:
    """What the denoiser and both text encoders make of a prompt."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        tokens, pooled, text = pipeline.encode_prompt("a fox")
        return pipeline.transformer(
            hidden_states=torch.randn(1, 16, 64, generator=generator),
            timestep=torch.tensor([0.4]),
            guidance=torch.tensor([3.5]),
            pooled_projections=pooled,
            encoder_hidden_states=tokens,
            txt_ids=text,
            img_ids=pipeline._prepare_latent_image_ids(1, 4, 4, "cpu", torch.float32),
        ).sample


@pytest.mark.parametrize("dialect", ["diffusers", "kohya-flux", "xlabs"])
def test_unmodified_diffusers_loads_ours_with_the_same_output(dialect: str, tmp_path: Path) -> None:
    from scumble.adapters import Adapter, LoraSettings
    from scumble.models.flux import Flux

    targets = {
        "diffusers": ("all-linear", "text_encoder.attention"),
        "kohya-flux": ("transformer.transformer_blocks.*", "text_encoder.attention"),
        "xlabs": ("transformer.transformer_blocks.*.attn.*",),
    }[dialect]
    base, other = Flux.tiny(1), Flux.tiny(1)
    with Adapter.inject(
        base.roots, targets, LoraSettings(rank=2, alpha=2.0 if dialect == "xlabs" else 3.0)
    ) as mine:
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in mine.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 4)
        expected, state = outputs(base.pipeline()), mine.state()
    bare = outputs(base.pipeline())
    path = write(state, tmp_path / "pytorch_lora_weights.safetensors", dialect)
    again = read(path, layers_of(base.roots))
    assert again.state.equal(state)
    pipeline: Any = other.pipeline()
    pipeline.load_lora_weights(str(path))
    found = outputs(pipeline)
    assert (expected - bare).abs().max() > 1e-2
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


# -- the tables are diffusers' own names ---------------------------------------------------------------------


def linear_layers(module: torch.nn.Module) -> set[str]:
    return {name for name, one in module.named_modules() if isinstance(one, torch.nn.Linear)}


def test_the_tables_are_the_libraries_own_names() -> None:
    from diffusers import FluxTransformer2DModel
    from transformers import T5Config, T5EncoderModel

    with torch.device("meta"):
        transformer = FluxTransformer2DModel(guidance_embeds=True)
        # names depend on neither width nor vocabulary
        t5 = T5EncoderModel(
            T5Config(num_layers=24, d_model=64, d_ff=64, vocab_size=10, feed_forward_proj="gated-gelu")
        )
    assert set(expand(FLUX_TRANSFORMER)) == linear_layers(transformer)
    assert set(expand(T5_TEXT)) == linear_layers(t5)
    assert random.Random(0).choice(known_layers()) in known_layers()
