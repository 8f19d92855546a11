"""Single files of SD 3 and Flux.1: what is loaded is the base that was written, told from shapes, with no network."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from scumble.errors import ModelError
from scumble.models import FAMILIES, BaseModel, Frame, describe_base, load_base
from scumble.models.checkpoint_names import layer_marks
from scumble.models.configs import Configs
from scumble.models.family import Components
from scumble.models.file_layout import FileLayout, layout_of, unread
from scumble.models.loading import load_tokenizers, look_at
from scumble.tensor_files.header import Entry, Header
from tests.models import original
from tests.models import original_transformers as made

pytestmark = pytest.mark.usefixtures("no_network")

UNET = "model.diffusion_model."
BF16 = torch.bfloat16
Change = Callable[[dict[str, Tensor]], dict[str, Tensor]]


@dataclass(frozen=True)
class Kind:
    """A family whose single files are read."""

    parts: Callable[..., Components]
    tensors: Callable[[Components], dict[str, Tensor]]
    t5: str
    """Its tokenizer's folder."""
    sign: str
    """A tensor of its first block."""

    def layout(self) -> FileLayout:
        found = layout_of({UNET + self.sign: (1,)})
        assert found is not None
        return found


KINDS = {
    "sd3": Kind(made.sd3_parts, made.sd3_tensors, "tokenizer_3", "joint_blocks.0.x_block.attn.qkv.weight"),
    "flux": Kind(made.flux_parts, made.flux_tensors, "tokenizer_2", "double_blocks.0.img_attn.qkv.weight"),
}


@dataclass(frozen=True)
class World:
    """A base as a folder, its tensors as a single file has them, and that file."""

    kind: Kind
    folder: Path
    tensors: Mapping[str, Tensor]
    file: Path


def folder_of(family: str, parts: Components, folder: Path) -> Path:
    live = FAMILIES.get(family).load(parts, dtype=torch.float32, device=torch.device("cpu"))
    live.pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, World]:
    """The whole file stands beside the vocabularies that it doesn't hold."""
    found = {}
    for family, kind in KINDS.items():
        place = tmp_path_factory.mktemp(family)
        parts = kind.parts(3)
        folder = folder_of(family, parts, place / "folder")
        tensors = kind.tensors(parts)
        (place / "file").mkdir()
        for words in ("tokenizer", kind.t5):
            shutil.copytree(folder / words, place / "file" / words)
        found[family] = World(kind, folder, tensors, made.write(place / "file" / "base.safetensors", tensors))
    return found


@pytest.fixture(params=KINDS)
def world(request: pytest.FixtureRequest, worlds: dict[str, World]) -> World:
    return worlds[request.param]


def alone(tensors: Mapping[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """The transformer's tensors."""
    return {prefix + key.removeprefix(UNET): t for key, t in tensors.items() if key.startswith(UNET)}


def state(base: BaseModel) -> dict[str, Tensor]:
    """Every weight of a base, T5's too."""
    pipeline: Any = base.pipeline()
    parts = {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}
    return {f"{name}.{key}": t for name, part in parts.items() for key, t in part.state_dict().items()}


def same(base: BaseModel, other: BaseModel) -> None:
    """Two bases have the same weights and give the same answers, bit for bit."""
    mine, theirs = state(base), state(other)
    assert mine.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert mine[name].dtype == tensor.dtype and torch.equal(mine[name], tensor), name
    x = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    t, frame = torch.tensor([0.4]), Frame.plain(1, 16, 16)
    said, heard = (one.encode_prompts(["a small fox in the snow"]) for one in (base, other))
    assert torch.equal(said.tokens, heard.tokens)
    assert said.pooled is not None and heard.pooled is not None and torch.equal(said.pooled, heard.pooled)
    with torch.no_grad():
        assert torch.equal(base.denoise(x, t, said, frame), other.denoise(x, t, heard, frame))
        assert torch.equal(base.decode_latents(x), other.decode_latents(x))


def refusal(file: Path, **told: Any) -> str:
    with pytest.raises(ModelError) as caught:
        load_base(file, device="cpu", **told)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# -- what is loaded ------------------------------------------------------------------------------------------


def test_a_whole_file_is_the_base_that_was_written(world: World) -> None:
    facts = describe_base(world.file)
    assert facts.problems == () and facts.notes == ()
    base, folder = load_base(world.file, device="cpu"), load_base(world.folder, device="cpu")
    assert (base.family, base.notes, base.guided) == (folder.family, (), folder.guided)
    assert base.fingerprint() == folder.fingerprint()
    same(base, folder)
    drawn = []
    for one in (base, folder):
        pipeline: Any = one.pipeline()
        pipeline.set_progress_bar_config(disable=True)
        drawn.append(
            pipeline(
                **one.asked(["a fox"], None, one.usual_guidance), num_inference_steps=2, width=16, height=16,
                output_type="pt", generator=torch.Generator().manual_seed(1),
            ).images
        )  # fmt: skip
    assert torch.equal(*drawn)


@pytest.mark.parametrize("prefix", [UNET, ""], ids=["prefixed", "bare"])
def test_a_transformer_alone_takes_the_rest_of_another_base(
    world: World, tmp_path: Path, prefix: str
) -> None:
    file = made.write(tmp_path / "transformer.safetensors", alone(world.tensors, prefix))
    said = refusal(file)
    assert "Missing: the VAE (first_stage_model....) in the file; the text encoder CLIP" in said
    assert 'rest="FOLDER"' in said
    other = folder_of(describe_base(world.folder).family, world.kind.parts(4), tmp_path / "rest")
    base, rest = load_base(file, device="cpu", rest=other), load_base(other, device="cpu")
    whole = load_base(world.folder, device="cpu")
    assert base.fingerprint() == whole.fingerprint() != rest.fingerprint()
    mine, theirs = (
        state(base),
        {**state(rest), **{k: t for k, t in state(whole).items() if k.startswith("transformer.")}},
    )
    assert (
        all(torch.equal(mine[name], tensor) for name, tensor in theirs.items())
        and mine.keys() == theirs.keys()
    )
    (note,) = (note for note in base.notes if "Not in the file" in note)
    assert str(other) in note and "text_encoder, text_encoder_2" in note and note.endswith("vae.")


def test_a_file_in_a_base_s_folder_takes_the_rest_from_there(world: World, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(world.folder, tmp_path / "base"))
    file = made.write(folder / "transformer.safetensors", alone(world.tensors))
    base = load_base(file, device="cpu")
    same(base, load_base(world.folder, device="cpu"))
    assert any(str(folder) in note for note in base.notes)
    counted = [type(words) for words in load_tokenizers(file)]
    assert counted == [type(words) for words in load_tokenizers(world.folder)] != []


def test_a_folder_of_another_kind_lends_nothing_unasked(worlds: dict[str, World], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(worlds["sd3"].folder, tmp_path / "base"))
    file = made.write(folder / "flux.safetensors", alone(worlds["flux"].tensors))
    assert "Missing: the VAE" in refusal(file)
    said = refusal(file, rest=folder)
    assert "belongs to a FluxPipeline" in said and "is a StableDiffusion3Pipeline" in said


def test_t5_is_left_until_a_prompt_is_read(world: World) -> None:
    base = load_base(world.file, device="cpu")
    (name,) = base.waiting()
    assert name not in base.modules()
    base.encode_prompts(["a fox"])
    base.release()
    assert base.waiting().keys() == {name}


def test_sd3_does_without_t5(worlds: dict[str, World], tmp_path: Path) -> None:
    world = worlds["sd3"]
    kept = {key: t for key, t in world.tensors.items() if "t5xxl" not in key}
    shutil.copytree(world.file.parent / "tokenizer", tmp_path / "tokenizer")
    base = load_base(made.write(tmp_path / "clips.safetensors", kept), device="cpu")
    assert any("no T5" in note for note in base.notes)
    assert not base.encode_prompts(["a fox"]).tokens[:, 77:].any()
    with_t5 = load_base(tmp_path / "clips.safetensors", device="cpu", rest=world.folder)
    same(with_t5, load_base(world.folder, device="cpu"))


def test_schnell_is_told_by_what_it_lacks(tmp_path: Path) -> None:
    parts = made.flux_parts(5, guided=False)
    folder = folder_of("flux", parts, tmp_path / "folder")
    file = made.write(tmp_path / "schnell.safetensors", made.flux_tensors(parts))
    assert not describe_base(file, rest=folder).guided
    base = load_base(file, device="cpu", rest=folder)
    assert not base.guided
    same(base, load_base(folder, device="cpu"))
    scheduler = base.pipeline().scheduler  # type: ignore[attr-defined]
    assert (scheduler.config.shift, scheduler.config.use_dynamic_shifting) == (1.0, False)


@pytest.mark.parametrize(
    ("stored", "dtype"),
    [
        pytest.param(torch.float16, BF16, id="fp16", marks=pytest.mark.slow),
        pytest.param(BF16, torch.float32, id="bf16", marks=pytest.mark.slow),
        pytest.param(torch.float8_e4m3fn, BF16, id="fp8"),
    ],
)
def test_how_numbers_are_stored_and_computed_are_two_things(
    world: World, tmp_path: Path, stored: torch.dtype, dtype: torch.dtype
) -> None:
    """Everything is as if the rounded numbers had been written down in full."""
    narrow = made.write(tmp_path / "narrow.safetensors", world.tensors, lambda t: t.to(stored))
    wide = made.write(tmp_path / "wide.safetensors", world.tensors, lambda t: t.to(stored).float())
    one, other = (load_base(f, device="cpu", dtype=dtype, rest=world.folder) for f in (narrow, wide))
    assert one.dtype == dtype and one.fingerprint() == other.fingerprint()
    same(one, other)


def test_a_mixed_file_has_one_dtype_in_memory(world: World, tmp_path: Path) -> None:
    def mixed(key: str, tensor: Tensor) -> Tensor:
        return tensor.to(torch.float8_e4m3fn if tensor.ndim == 2 and "block" in key else BF16)

    tensors = {key: mixed(key, tensor) for key, tensor in world.tensors.items()}
    base = load_base(
        made.write(tmp_path / "mixed.safetensors", tensors), device="cpu", dtype=BF16, rest=world.folder
    )
    assert {t.dtype for name, t in state(base).items() if not name.startswith("vae.")} == {BF16}


def test_what_is_read_by_nothing_is_said(world: World, tmp_path: Path) -> None:
    tensors = {**world.tensors, "something.else": torch.zeros(2)}
    base = load_base(made.write(tmp_path / "more.safetensors", tensors), device="cpu", rest=world.folder)
    assert any(
        "1 tensors of the file are read by nothing, e.g. something.else" in note for note in base.notes
    )


# -- names ---------------------------------------------------------------------------------------------------


def test_every_weight_of_the_layers_is_found_where_it_is(world: World) -> None:
    base = load_base(world.folder, device="cpu")
    shapes = {key: tuple(tensor.shape) for key, tensor in world.tensors.items()}
    marks = layer_marks(shapes, "base")
    expected = {name: t for name, t in state(base).items() if not name.startswith("vae.")}
    found = {name.replace("text_encoder.text_model.", "text_encoder."): mark for name, mark in marks.items()}
    for name, tensor in expected.items():
        short = name.replace("text_encoder.text_model.", "text_encoder.")
        if short.endswith(("embed_tokens.weight", "text_encoder.text_projection.weight")):
            continue  # tied to another; fixed, and in no file
        mark = found[short]
        pieces = [world.tensors[mark.name][begin:end] for begin, end in mark.rows]
        assert torch.equal(torch.cat(pieces).reshape(mark.shape), tensor), name


PUBLISHED = {
    "3 medium": ("sd3", {"num_layers": 24, "num_attention_heads": 24, "pos_embed_max_size": 192}),
    "3.5 medium": (
        "sd3",
        {
            "num_layers": 24,
            "num_attention_heads": 24,
            "pos_embed_max_size": 384,
            "qk_norm": "rms_norm",
            "dual_attention_layers": tuple(range(13)),
        },
    ),
    "3.5 large": (
        "sd3",
        {"num_layers": 38, "num_attention_heads": 38, "pos_embed_max_size": 192, "qk_norm": "rms_norm"},
    ),
    "Flux.1 dev": ("flux", {"guidance_embeds": True}),
    "Flux.1 schnell": ("flux", {"guidance_embeds": False}),
}
"""Name -> (family, what its published config says beside what all of its family say)."""


@pytest.mark.parametrize(("family", "said"), PUBLISHED.values(), ids=PUBLISHED.keys())
def test_published_shapes_give_the_published_configs(family: str, said: dict[str, Any]) -> None:
    """In full size, on the meta device: every option that decides a module, and every layer's name and shape."""
    from diffusers import FluxTransformer2DModel, SD3Transformer2DModel

    common: dict[str, Any] = {
        "sd3": {
            "sample_size": 128,
            "in_channels": 16,
            "out_channels": 16,
            "patch_size": 2,
            "attention_head_dim": 64,
            "joint_attention_dim": 4096,
            "pooled_projection_dim": 2048,
            "caption_projection_dim": 64 * said.get("num_attention_heads", 0),
        },
        "flux": {
            "in_channels": 64,
            "num_layers": 19,
            "num_single_layers": 38,
            "attention_head_dim": 128,
            "num_attention_heads": 24,
            "joint_attention_dim": 4096,
            "pooled_projection_dim": 768,
            "patch_size": 1,
            "axes_dims_rope": (16, 56, 56),
        },
    }[family]
    cls: Any = {"sd3": SD3Transformer2DModel, "flux": FluxTransformer2DModel}[family]
    keys = {"sd3": made.sd3_keys, "flux": made.flux_keys}[family]
    with torch.device("meta"):
        published = cls(**common, **said)
        shapes = {key: tuple(t.shape) for key, t in keys(published).items()}
        header = Header({key: Entry("BF16", shape, 0, 0) for key, shape in shapes.items()}, {}, 0)
        layout = layout_of(shapes)
        assert layout is not None and layout is KINDS[family].layout()
        configs = layout.configs(header, family)
        told = cls.from_config(dict(configs.parts["transformer"]))
    for option, value in published.config.items():
        if not option.startswith("_"):
            mine = told.config[option]
            assert (list(mine) if isinstance(mine, tuple | list) else mine) == (
                list(value) if isinstance(value, tuple | list) else value
            ), option
    marks = layout.marks(shapes, family)["transformer"]
    assert {name: mark.shape for name, mark in marks.items()} == {
        name: tuple(t.shape) for name, t in published.state_dict().items()
    }
    assert unread(shapes, {"transformer": marks}) == ()
    facts = FAMILIES.get(family).describe(configs)
    assert facts.guided is bool(said.get("guidance_embeds", False))


def test_published_text_encoders_and_vae_give_their_configs() -> None:
    """CLIP-L, CLIP-G, T5 XXL and the 16-channel VAE in full size, by shapes only."""
    from diffusers import AutoencoderKL
    from transformers import (
        CLIPTextConfig,
        CLIPTextModel,
        CLIPTextModelWithProjection,
        T5Config,
        T5EncoderModel,
    )

    def like(kind: str, **options: Any) -> Any:
        return {"clip": CLIPTextConfig, "t5": T5Config}[kind](**options)

    clip_l = like(
        "clip", hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12
    )
    clip_g = like(
        "clip", hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20,
        hidden_act="gelu", projection_dim=1280,
    )  # fmt: skip
    t5 = like(
        "t5", vocab_size=32128, d_model=4096, d_ff=10240, d_kv=64, num_layers=24, num_heads=64,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    with torch.device("meta"):
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=16,
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
            use_quant_conv=False, use_post_quant_conv=False,
        )  # fmt: skip
        parts = {
            "text_encoder": made.clip_keys(CLIPTextModel(clip_l), made.CLIP_L),
            "text_encoder_2": made.clip_keys(CLIPTextModelWithProjection(clip_g), made.CLIP_G),
            "text_encoder_3": {made.T5XXL + k: t for k, t in T5EncoderModel(t5).state_dict().items()},
            "vae": original.vae_keys(vae),
        }
    shapes = {key: tuple(t.shape) for part in parts.values() for key, t in part.items()}
    shapes[UNET + KINDS["sd3"].sign] = (1, 1)
    layout = KINDS["sd3"].layout()
    told = {p.name: p.config(layout.own(p, shapes)) for p in layout.parts if p.name in parts}
    for name, config in (("text_encoder", clip_l), ("text_encoder_2", clip_g)):
        for option in (
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "hidden_act",
        ):
            assert told[name][option] == getattr(config, option), (name, option)
        assert (told[name]["vocab_size"], told[name]["max_position_embeddings"]) == (49408, 77)
    assert told["text_encoder_2"]["projection_dim"] == 1280
    for option in ("vocab_size", "d_model", "d_ff", "d_kv", "num_layers", "num_heads", "feed_forward_proj"):
        assert told["text_encoder_3"][option] == getattr(t5, option), option
    for option in ("block_out_channels", "layers_per_block", "latent_channels", "use_quant_conv"):
        mine, theirs = told["vae"][option], vae.config[option]
        assert mine == (list(theirs) if isinstance(theirs, tuple) else theirs), option
    assert (told["vae"]["scaling_factor"], told["vae"]["shift_factor"]) == (1.5305, 0.0609)


# -- what is wrong -------------------------------------------------------------------------------------------


def without(*ends: str) -> Change:
    return lambda tensors: {key: t for key, t in tensors.items() if not key.endswith(ends)}


def wider(end: str) -> Change:
    return lambda tensors: {key: t.repeat(2) if key.endswith(end) else t for key, t in tensors.items()}


def flat(*ends: str) -> Change:
    return lambda tensors: {key: t.flatten() if key.endswith(ends) else t for key, t in tensors.items()}


SPOILED: dict[str, tuple[Change, str]] = {
    "no beginning": (without("embedder.proj.weight", "img_in.weight"), "files are: in the transformer, there is no '"),
    "no end": (without("final_layer.linear.weight"), "in the transformer, there is no 'final_layer.linear.weight'"),
    "another rank": (flat("x_embedder.proj.weight", "img_in.weight"), "in the transformer, not enough values"),
    "a hole": (without("clip_l.transformer.text_model.final_layer_norm.bias"), "lacks 1 tensors of its CLIPTextModel"),
    "a hole in the VAE": (without("decoder.conv_out.bias"), "lacks 1 tensors of its AutoencoderKL, e.g. decoder"),
    "a hole in T5": (without("t5xxl.transformer.encoder.final_layer_norm.weight"), "lacks 1 tensors of its T5Encoder"),
    "another shape": (wider("final_layer.linear.bias"), "belongs to one of"),
    "quantized": (lambda tensors: tensors | {"x.scale_weight": torch.ones(1)}, "is quantized (1 tensors as x.scale"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "said"), SPOILED.values(), ids=SPOILED.keys())
def test_a_file_that_is_not_whole_is_one_sentence(
    world: World, tmp_path: Path, change: Change, said: str
) -> None:
    file = made.write(tmp_path / "spoiled.safetensors", change(dict(world.tensors)))
    assert said in refusal(file, rest=world.folder)


def test_a_text_encoder_of_another_width_is_refused(world: World, tmp_path: Path) -> None:
    file = made.write(tmp_path / "transformer.safetensors", alone(world.tensors))
    other = Path(shutil.copytree(world.folder, tmp_path / "rest"))
    part, key = (
        ("text_encoder_2", "d_model") if world.kind.t5 == "tokenizer_2" else ("text_encoder_3", "d_model")
    )
    config = json.loads((other / part / "config.json").read_text())
    (other / part / "config.json").write_text(json.dumps({**config, key: 48}))
    assert "don't belong together: its T5 gives 48 numbers a token" in refusal(file, rest=other)


def test_what_the_rest_lacks_is_named(world: World, tmp_path: Path) -> None:
    file = made.write(tmp_path / "transformer.safetensors", alone(world.tensors))
    other = Path(shutil.copytree(world.folder, tmp_path / "rest"))
    for weights in (other / "vae").glob("*.safetensors"):
        weights.unlink()
    assert "vae: a .safetensors file" in refusal(file, rest=other)
    index = json.loads((other / "model_index.json").read_text())
    del index["vae"]
    (other / "model_index.json").write_text(json.dumps(index))
    assert "Missing: the VAE (first_stage_model....) in the file" in refusal(file, rest=other)


def test_rest_has_to_be_a_base_and_to_have_an_effect(world: World, tmp_path: Path) -> None:
    assert "is no folder here and no Hub id" in refusal(world.file, rest=tmp_path / "nowhere")
    assert "is no folder here and no Hub id" in refusal(world.file, rest=str(world.file))
    assert "rest" in refusal(world.folder, rest=world.folder) and "has no effect" in refusal(
        world.folder, rest=world.folder
    )
    assert "has no effect" in refusal(Path("picturebook"), rest=world.folder)
    assert "it has no model_index.json" in refusal(world.file, rest=tmp_path)
    assert "revision 'x' has no effect" in refusal(world.file, revision="x")


def test_without_t5_s_vocabulary_the_next_step_is_said(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("scumble.models.hub.cached_file", lambda *_: None)
    shutil.copytree(world.file.parent / "tokenizer", tmp_path / "tokenizer")
    file = made.write(tmp_path / "base.safetensors", world.tensors)
    said = refusal(file)
    assert "no vocabulary of T5" in said and str(tmp_path / world.kind.t5) in said and "hf download" in said
    cached = {"tokenizer.json", "tokenizer_config.json"}
    monkeypatch.setattr(
        "scumble.models.hub.cached_file",
        lambda repo, name: (
            world.folder / world.kind.t5 / Path(name).name
            if repo.startswith("black-forest") and Path(name).name in cached
            else None
        ),
    )
    assert load_base(file, device="cpu").token_counts(["a fox"])[0][0] > 2


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"double_blocks.0.processor.qkv_lora1.down.weight": (4, 4)}, "It is an adapter"),
        ({"double_blocks.0.img_attn.qkv.lora_A.weight": (4, 4)}, "It is an adapter"),
        ({"distilled_guidance_layer.in_proj.bias": (4,), "double_blocks.0.img_attn.qkv.weight": (4,)}, "is Chroma"),
        ({"double_stream_modulation_img.lin.weight": (4,), "double_blocks.0.img_attn.qkv.weight": (4,)}, "is Flux 2"),
        ({"transformer_blocks.0.attn.to_q.weight": (4, 4)}, "one component of a base"),
    ],
)  # fmt: skip
def test_what_only_looks_like_one_says_what_it_is(
    tmp_path: Path, tensors: dict[str, tuple[int, ...]], said: str
) -> None:
    save_file({name: torch.zeros(shape) for name, shape in tensors.items()}, tmp_path / "file.safetensors")
    assert said in refusal(tmp_path / "file.safetensors")


def test_an_inpainting_flux_is_refused_by_name(worlds: dict[str, World], tmp_path: Path) -> None:
    tensors = alone(worlds["flux"].tensors)
    tensors["img_in.weight"] = torch.zeros(len(tensors["img_in.weight"]), 384)
    said = refusal(made.write(tmp_path / "fill.safetensors", tensors), rest=worlds["flux"].folder)
    assert "Flux.1 Fill" in said


def test_a_family_that_reads_folders_alone_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Chroma:
        name, title = "chroma", "Chroma 1"

        @classmethod
        def recognises(cls, configs: Configs) -> bool:
            return False

    monkeypatch.setattr(FAMILIES, "working", lambda: iter([("chroma", Chroma)]))
    save_file({"distilled_guidance_layer.in_proj.bias": torch.zeros(4)}, tmp_path / "c.safetensors")
    assert "ChromaPipeline.from_single_file" in refusal(tmp_path / "c.safetensors")


# -- the rest of SD 1, which is read by diffusers' own loader --------------------------------------------------


def test_a_unet_alone_takes_the_rest_of_another_base(tmp_path: Path) -> None:
    unet, vae, text = original.parts(False)
    base = FAMILIES.get("sd1").tiny(2)
    pipeline: Any = base.pipeline()
    pipeline.register_modules(unet=unet, vae=vae, text_encoder=text)
    pipeline.save_pretrained(tmp_path / "rest")
    file = original.write(
        tmp_path / "unet.safetensors", False, {"modelspec.prediction_type": "epsilon"}, "first_stage"
    )
    tensors = {k: t for k, t in original.unet_keys(unet).items()}
    save_file(
        {k: t.clone().contiguous() for k, t in tensors.items()},
        file,
        {"modelspec.prediction_type": "epsilon"},
    )
    assert "the VAE (first_stage_model....) in the file; the text encoder" in refusal(file)
    loaded = load_base(file, device="cpu", rest=tmp_path / "rest")
    same_weights = load_base(tmp_path / "rest", device="cpu")
    mine, theirs = state(loaded), state(same_weights)
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[k], t) for k, t in theirs.items())


def test_a_look_at_a_file_with_its_rest_finds_everything(world: World, tmp_path: Path) -> None:
    file = made.write(tmp_path / "transformer.safetensors", alone(world.tensors))
    assert look_at(file).tokenizers == {}
    look = look_at(file, rest=world.folder)
    assert look.facts.problems == () and look.folder is None
    assert {"tokenizer", world.kind.t5} <= set(look.tokenizers)
    assert set(look.configs.elsewhere) >= {"vae", "text_encoder", world.kind.t5}
    assert "transformer" not in look.configs.elsewhere


def test_the_rest_may_be_on_the_hub(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, ...]] = []

    def weights(repo: str, revision: str | None, variant: str | None, configs: Configs) -> Path:
        asked.append((repo, *sorted(configs.parts)))
        return world.folder

    monkeypatch.setattr("scumble.models.hub.download_configs", lambda repo, revision: world.folder)
    monkeypatch.setattr("scumble.models.hub.download_weights", weights)
    file = made.write(tmp_path / "transformer.safetensors", alone(world.tensors))
    assert describe_base(file, rest="somebody/base").problems == () and not asked
    assert load_base(file, device="cpu", rest="somebody/base").family in FAMILIES
    assert asked[0][0] == "somebody/base" and "vae" in asked[0] and "transformer" not in asked[0]
