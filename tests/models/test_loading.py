"""load_base and describe_base: what is found, what is refused, and what is said."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from scumble import picturebook
from scumble.errors import ModelError, PrecisionError
from scumble.models import FAMILIES, describe_base, load_base
from scumble.models.loading import load_tokenizers
from scumble.models.unet import UNetBase

pytestmark = pytest.mark.usefixtures("no_network")


@pytest.fixture
def sd1(folders: dict[str, Path], tmp_path: Path) -> Path:
    """A folder of its own, to spoil."""
    return Path(shutil.copytree(folders["sd1"], tmp_path / "base"))


def edit(folder: Path, file: str, **values: Any) -> None:
    path = folder / file
    config = json.loads(path.read_text())
    config.update(values)
    path.write_text(json.dumps({k: v for k, v in config.items() if v != "drop"}))


def refusal(source: Path | str, **options: Any) -> str:
    with pytest.raises(ModelError) as caught:
        load_base(source, **options)
    return str(caught.value)


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_a_folder_gives_back_what_was_saved(folders: dict[str, Path], family: str) -> None:
    tiny, base = FAMILIES.get(family).tiny(3), load_base(folders[family], device="cpu")
    assert base.family == family and base.name == str(folders[family]) and base.notes == ()
    assert base.prediction.name == {"sd2": "v_prediction"}.get(family, "epsilon")
    assert torch.equal(base.encode_prompts(["a fox"]).tokens, tiny.encode_prompts(["a fox"]).tokens)
    pixels = torch.rand(1, 3, 16, 16) * 2 - 1
    assert torch.equal(base.encode_images(pixels, None), tiny.encode_images(pixels, None))
    assert base.fingerprint() == tiny.fingerprint()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_fingerprint_does_not_depend_on_the_dtype(folders: dict[str, Path], dtype: torch.dtype) -> None:
    base = load_base(folders["sd1"], dtype=dtype, device="cpu")
    assert base.dtype == dtype == next(base.denoiser.parameters()).dtype
    assert base.fingerprint() == FAMILIES.get("sd1").tiny(3).fingerprint()


def test_fp16_on_a_cpu_is_stored_and_not_computed_with(folders: dict[str, Path]) -> None:
    base = load_base(folders["sd1"], dtype=torch.float16, device="cpu")
    assert isinstance(base, UNetBase) and base.vae.dtype == torch.float32
    with pytest.raises(PrecisionError, match="bf16"):
        base.encode_prompts(["a fox"])
    assert base.encode_images(torch.zeros(1, 3, 16, 16), None).isfinite().all()


def test_describe_reads_no_weights(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("safetensors.torch.load_file", None)
    facts, base = describe_base(folders["sd2"]), FAMILIES.get("sd2").tiny(3)
    assert (facts.family, facts.title, facts.prediction) == ("sd2", "Stable Diffusion 2", "v_prediction")
    assert (facts.cross_attention_dim, facts.latent_channels, facts.latent_factor) == (48, 4, 2)
    assert (facts.resolution, facts.size_multiple) == (base.resolution, base.size_multiple)
    assert facts.parameters["unet"] == sum(p.numel() for p in base.denoiser.parameters())
    assert facts.weights_dtype == "F32" and facts.problems == () and facts.notes == ()


def test_picturebook_is_the_base_inside_the_package(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(picturebook, "path", lambda: folders["sd1"], raising=False)
    base = load_base("picturebook", device="cpu")
    assert base.name == "picturebook" and base.family == "sd1"
    assert "inside this package" in refusal("picturebook", revision="main")


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("./sd9", "has no 'sd9'"),
        ("/nowhere/at/all", "/ has no 'nowhere'"),
        ("models/of/mine", "has no 'models'"),
        ("mine.safetensors", "There is no file or folder mine.safetensors"),
        ("here/sd11", 'Did you mean "sd1"?'),
        ("here/sd11", "If a Hub id is meant"),
        ("picturebok", 'Did you mean "picturebook"?'),
        ("two words", "owner/name"),
    ],
)
def test_what_is_not_there_is_one_clear_error(
    source: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here" / "sd1").mkdir(parents=True)
    message = refusal(source)
    assert said in message and "\n" not in message


def test_options_without_effect_are_refused(folders: dict[str, Path]) -> None:
    assert "revision 'main' has no effect" in refusal(folders["sd1"], revision="main")
    assert "tokenizer" in refusal(folders["sd1"], tokenizer="x")


@pytest.mark.parametrize(
    ("index", "unet", "title"),
    [
        ("KolorsPipeline", {"addition_embed_type": "text_time", "encoder_hid_dim_type": "text_proj"}, "Kolors"),
        ("StableDiffusion3Pipeline", {"_class_name": "SD3Transformer2DModel"}, "Stable Diffusion 3"),
        ("FluxPipeline", {"_class_name": "FluxTransformer2DModel"}, "Flux"),
        ("MarigoldPipeline", {"_class_name": "OtherModel"}, "MarigoldPipeline with a OtherModel"),
    ],
)  # fmt: skip
def test_other_architectures_are_refused_by_name(
    sd1: Path, index: str, unet: dict[str, Any], title: str
) -> None:
    edit(sd1, "model_index.json", _class_name=index)
    edit(sd1, "unet/config.json", **unet)
    message = refusal(sd1)
    assert f"is {title}" in message.replace(" a M", " M") and f"trains {', '.join(FAMILIES)}." in message
    facts = describe_base(sd1)
    assert facts.family == "" and facts.problems == (message,)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"in_channels": 5}, "a depth-to-image model on Stable Diffusion 1"),
        ({"in_channels": 8}, "an InstructPix2Pix model"),
        ({"in_channels": 16, "out_channels": 16}, "VAE has 4 latent channels and its UNet takes 16"),
        ({"cross_attention_dim": 768}, "gives 32 numbers a token and its UNet's cross-attention takes 768"),
        ({"time_cond_proj_dim": 256}, "latent consistency model"),
    ],
)
def test_parts_that_do_not_fit_are_refused_with_both_numbers(
    sd1: Path, changes: dict[str, int], said: str
) -> None:
    edit(sd1, "unet/config.json", **changes)
    assert said in refusal(sd1) and said in describe_base(sd1).problems[0]


def test_the_scheduler_config_decides_the_prediction(sd1: Path) -> None:
    edit(sd1, "scheduler/scheduler_config.json", prediction_type="v_prediction")
    assert load_base(sd1, device="cpu").prediction.name == "v_prediction"
    edit(sd1, "scheduler/scheduler_config.json", prediction_type="drop")
    base = load_base(sd1, device="cpu")
    assert base.prediction.name == "epsilon" and "prediction_type" in base.notes[0]
    edit(sd1, "scheduler/scheduler_config.json", prediction_type="sample")
    assert "'sample'" in refusal(sd1)


def test_a_scheduler_that_says_it_wrong_is_overruled_by_the_user(sd1: Path) -> None:
    base = load_base(sd1, device="cpu", prediction="v_prediction")
    assert base.prediction.name == "v_prediction" == base.pipeline().scheduler.config.prediction_type
    assert base.notes == ("Taken to predict v_prediction, as asked; its configs say epsilon.",)
    assert load_base(sd1, device="cpu", prediction="epsilon").notes == ()
    with pytest.raises(ModelError, match="'noise'"):
        load_base(sd1, device="cpu", prediction="noise")


def test_tokenizers_are_read_without_weights(sd1: Path) -> None:
    (sd1 / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    (tokenizer,) = load_tokenizers(sd1)
    assert len(tokenizer) == 520
    with pytest.raises(ModelError, match="no file or folder"):
        load_tokenizers("./nowhere")


@pytest.mark.parametrize(
    ("lost", "said"),
    [
        ("unet/diffusion_pytorch_model.safetensors", "unet: a .safetensors file"),
        ("vae/config.json", "vae/config.json"),
        ("tokenizer/tokenizer.json", "vocab.json and merges.txt"),
        ("scheduler/scheduler_config.json", "scheduler/scheduler_config.json"),
    ],
)
def test_what_is_missing_is_named(sd1: Path, lost: str, said: str) -> None:
    (sd1 / lost).unlink()
    message = refusal(sd1)
    assert "is not complete" in message and said in message


def test_variants_are_found_and_their_absence_explained(sd1: Path) -> None:
    assert "leave variant out" in refusal(sd1, variant="fp16")
    for part in ("unet", "vae", "text_encoder"):
        for path in (sd1 / part).glob("*.safetensors"):
            path.rename(path.with_suffix(".fp16.safetensors"))
    assert "set variant to it" in refusal(sd1)
    assert (
        load_base(sd1, variant="fp16", device="cpu").fingerprint()
        == FAMILIES.get("sd1").tiny(3).fingerprint()
    )


def test_pickles_are_never_opened(sd1: Path) -> None:
    path = sd1 / "unet" / "diffusion_pytorch_model.safetensors"
    path.rename(path.with_suffix(".bin"))
    assert "pickle" in refusal(sd1)
    checkpoint = sd1 / "model.ckpt"
    checkpoint.write_bytes(b"PK")
    assert "Pickles" in refusal(checkpoint)


def test_missing_tensors_are_an_error_and_unused_ones_a_note(sd1: Path) -> None:
    path = sd1 / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "conv_extra.weight": torch.zeros(1)}, path, {"format": "pt"})
    assert "conv_extra.weight" in load_base(sd1, device="cpu").notes[0]
    save_file({n: t for n, t in tensors.items() if n != "conv_in.bias"}, path, {"format": "pt"})
    assert "1 tensors of unet are missing" in refusal(sd1) and "conv_in.bias" in refusal(sd1)


def test_a_tokenizer_of_another_base_is_refused(sd1: Path) -> None:
    edit(sd1, "text_encoder/config.json", vocab_size=500, bos_token_id=0, eos_token_id=1, pad_token_id=1)
    path = sd1 / "text_encoder" / "model.safetensors"
    tensors = load_file(path)
    name = next(n for n in tensors if n.endswith("token_embedding.weight"))
    save_file({**tensors, name: tensors[name][:500].clone()}, path, {"format": "pt"})
    assert "has 520 tokens and its text encoder 500" in refusal(sd1)


def test_folders_that_are_no_base_say_what_they_are(sd1: Path, tmp_path: Path) -> None:
    assert "one component of a base (UNet2DConditionModel)" in refusal(sd1 / "unet")
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "pytorch_lora_weights.safetensors").touch()
    assert "It holds an adapter" in refusal(tmp_path / "lora")
    (tmp_path / "empty").mkdir()
    assert "It holds nothing" in refusal(tmp_path / "empty")


def test_impossible_precisions_are_refused_before_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75"])
    with pytest.raises(PrecisionError, match=r"Tesla T4 is sm_75\. Use fp16"):
        load_base("./not/even/there", dtype=torch.bfloat16, device="cuda")
    with pytest.raises(PrecisionError, match="float64"):
        load_base("./not/even/there", dtype=torch.float64, device="cpu")


def test_a_unet_with_a_scheduler_of_flow_matching_is_refused(sd1: Path) -> None:
    (sd1 / "scheduler/scheduler_config.json").write_text(
        json.dumps({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0})
    )
    edit(sd1, "model_index.json", scheduler=["diffusers", "FlowMatchEulerDiscreteScheduler"])
    assert "trained by flow matching" in refusal(sd1)
    with pytest.raises(ModelError, match="contradicts it: its noise levels are others"):
        load_base("picturebook", prediction="flow", device="cpu")
