"""Single checkpoints: configs told from shapes, weights read by diffusers' own loader, no network."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from scumble.errors import ModelError
from scumble.models import FAMILIES, Frame, describe_base, load_base
from scumble.models.loading import probe_prediction
from scumble.models.single_file import OPEN_CLIP, text_config, unet_config
from scumble.models.tiny import tiny_tokenizer
from scumble.models.unet import UNetBase
from tests.models import original

pytestmark = pytest.mark.usefixtures("no_network")

CUT_OFF = b'{"a":{"dtype":"F32","shape":[9],"data_offsets":[0,36]}}'
STATES = {False: "epsilon", True: "v"}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """Whether it is SD 2 -> a checkpoint beside a tokenizer folder."""
    place = tmp_path_factory.mktemp("checkpoints")
    tiny_tokenizer().save_pretrained(place / "tokenizer")
    return {
        linear: original.write(
            place / f"{name}.safetensors", linear, {"modelspec.prediction_type": STATES[linear]}
        )
        for linear, name in ((False, "one"), (True, "two"))
    }


@pytest.mark.parametrize("linear", [False, True], ids=["sd1", "sd2"])
def test_every_weight_arrives_where_it_was(files: dict[bool, Path], linear: bool) -> None:
    base = load_base(files[linear], device="cpu")
    assert isinstance(base, UNetBase) and base.family == ("sd2" if linear else "sd1")
    ours = (base.unet, base.vae, base.text_encoder)
    for module, reference in zip(ours, original.parts(linear), strict=True):
        state, expected = module.state_dict(), reference.state_dict()
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())
    unet, _, text = original.parts(linear)
    x, t = torch.randn(1, 4, 8, 8), torch.tensor([500])
    words = base.encode_prompts(["a fox"])
    ids = base.words.ids(["a fox"])[0]
    assert ids[0, -1] == (0 if linear else 519)  # OpenCLIP pads with "!", CLIP with its end token
    with torch.no_grad():
        torch.testing.assert_close(words.tokens, text(ids)[0])
        expected_answer = unet(x, t, words.tokens).sample
        assert torch.equal(base.denoise(x, t, words, Frame.plain(1, 32, 32)), expected_answer)


@pytest.mark.parametrize("linear", [False, True], ids=["sd1", "sd2"])
def test_the_header_alone_describes_it(files: dict[bool, Path], linear: bool) -> None:
    facts = describe_base(files[linear])
    assert facts.problems == () and facts.cross_attention_dim == 64 and facts.latent_factor == 4
    assert facts.prediction == ("v_prediction" if linear else "epsilon")
    assert facts.resolution == (96 if linear else 64) * 4
    assert facts.parameters["unet"] == sum(p.numel() for p in original.parts(linear)[0].parameters())


def test_rounding_to_bf16_keeps_the_fingerprint(files: dict[bool, Path]) -> None:
    half = load_base(files[False], device="cpu", dtype=torch.bfloat16)
    assert half.fingerprint() == load_base(files[False], device="cpu").fingerprint()
    assert half.denoiser.dtype == torch.bfloat16


def test_published_shapes_give_the_published_configs() -> None:
    """SD 1.5 and SD 2.1 in full size, by shapes only."""
    from diffusers import UNet2DConditionModel

    common = {"sample_size": 64, "block_out_channels": (320, 640, 1280, 1280)}
    for linear, width, heads in ((False, 768, 8), (True, 1024, [5, 10, 20, 20])):
        with torch.device("meta"):
            unet = UNet2DConditionModel(
                **common, cross_attention_dim=width, attention_head_dim=heads, use_linear_projection=linear
            )
        told = unet_config({key: tuple(t.shape) for key, t in original.unet_keys(unet).items()})
        for key in ("block_out_channels", "down_block_types", "up_block_types"):
            assert list(told[key]) == list(unet.config[key])
        for key in (
            "cross_attention_dim",
            "attention_head_dim",
            "layers_per_block",
            "in_channels",
            "out_channels",
        ):
            assert told[key] == unet.config[key]


def test_the_last_of_24_layers_of_open_clip_is_not_used() -> None:
    block = "cond_stage_model.model.transformer.resblocks"
    shapes = {f"{block}.{layer}.mlp.c_fc.weight": (4096, 1024) for layer in range(24)}
    shapes |= {
        "cond_stage_model.model.token_embedding.weight": (49408, 1024),
        "cond_stage_model.model.positional_embedding": (77, 1024),
    }
    told = text_config(shapes, OPEN_CLIP)
    assert told is not None
    assert (told["num_hidden_layers"], told["num_attention_heads"], told["eos_token_id"]) == (23, 16, 49407)


def test_what_it_predicts_is_asked_of_the_weights_when_nothing_says_it(
    files: dict[bool, Path], tmp_path: Path
) -> None:
    silent = original.write(tmp_path / "silent.safetensors", False)
    assert describe_base(silent).prediction == ""
    base = load_base(silent, device="cpu", tokenizer=files[False].parent / "tokenizer")
    # random weights answer with nothing of the noise that they are given
    assert base.prediction.name == "v_prediction" and "correlates" in base.notes[-1]
    marked = original.write(tmp_path / "marked.safetensors", False, v_pred=torch.zeros(1))
    assert describe_base(marked).prediction == "v_prediction"


def test_a_denoiser_of_noise_is_told_from_one_of_velocity(monkeypatch: pytest.MonkeyPatch) -> None:
    base = FAMILIES.get("sd1").tiny()
    rough = torch.Generator().manual_seed(1)
    for share, kind in ((1.0, "epsilon"), (0.07, "v_prediction")):
        monkeypatch.setattr(
            base, "denoise", lambda x, *_, s=share: s * x + 0.5 * torch.randn(x.shape, generator=rough)
        )
        found, note = probe_prediction(base)
        assert found == kind and kind in note


def test_without_a_tokenizer_the_next_step_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scumble.models.hub.cached_file", lambda *_: None)
    path = original.write(tmp_path / "alone.safetensors", False)
    with pytest.raises(ModelError, match=r"vocab.json and merges.txt.*hf download openai/clip") as caught:
        load_base(path, device="cpu")
    assert str(tmp_path / "tokenizer") in str(caught.value)
    with pytest.raises(ModelError, match="no tokenizer folder"):
        load_base(path, device="cpu", tokenizer=tmp_path / "nowhere")


def test_the_vocabulary_in_the_hub_cache_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "cache"
    tiny_tokenizer().save_pretrained(folder)
    monkeypatch.setattr(
        "scumble.models.hub.cached_file",
        lambda repo, file: folder / file if repo.startswith("openai/") else None,
    )
    path = original.write(tmp_path / "alone.safetensors", False, {"modelspec.prediction_type": "epsilon"})
    assert len(load_base(path, device="cpu").tokenizer) == 520  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"lora_unet_down_blocks_0.lora_up.weight": (4, 4)}, "It is an adapter"),
        (
            {"conditioner.embedders.1.model.ln_final.weight": (4,)},
            "not a checkpoint of a base model. Its 1 tensors are called conditioner",
        ),
        (
            {"model.diffusion_model.joint_blocks.0.x_block.weight": (4,)},
            "Stable Diffusion 3's files are: in the transformer, there is no 'x_embedder.proj.weight'",
        ),
        (
            {"double_blocks.0.img_attn.qkv.weight": (4,)},
            "Flux.1's files are: in the transformer, there is no 'img_in.weight'",
        ),
        ({"down_blocks.0.resnets.0.conv1.weight": (4,)}, "one component of a base"),
        ({"something.else": (4,)}, "called something.else"),
        ({"model.diffusion_model.input_blocks.0.0.weight": (4, 4)}, "not laid out as Stable Diffusion's"),
    ],
)
def test_files_that_are_no_base_say_what_they_are(
    tmp_path: Path, tensors: dict[str, tuple[int, ...]], said: str
) -> None:
    path = tmp_path / "file.safetensors"
    save_file({name: torch.zeros(shape) for name, shape in tensors.items()}, path)
    with pytest.raises(ModelError, match=said):
        load_base(path, device="cpu")


@pytest.mark.parametrize(
    ("drop", "said"),
    [
        ("first_stage_model.", "the VAE"),
        ("cond_stage_model.", "the text encoder"),
        ("first_stage_model.post_quant_conv.weight", "post_quant_conv.weight' is not where it belongs"),
        ("model.diffusion_model.out.2.bias", "lacks tensors of its UNet"),
    ],
)
def test_parts_that_the_file_lacks_are_named(files: dict[bool, Path], drop: str, said: str) -> None:
    stated = {"modelspec.prediction_type": "epsilon"}
    path = original.write(files[False].with_name("part.safetensors"), False, stated, drop)
    with pytest.raises(ModelError, match=said):
        load_base(path, device="cpu")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid", "Git LFS pointer"),
        (b"<!DOCTYPE html><html></html>", "web page"),
        (b"\x80\x02}q\x00.", "pickle"),
        (b"", "0 bytes"),
        (struct.pack("<Q", len(CUT_OFF)) + CUT_OFF + b"123", "cut short"),
    ],
)  # fmt: skip
def test_broken_files_are_named(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "broken.safetensors"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=said):
        load_base(path, device="cpu")
