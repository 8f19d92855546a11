"""A dtype for each component: how it is asked for, what is refused, and what it does to caches, memory and proofs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from scumble.cli.doctor import base_findings
from scumble.data.cache import image_encoder_fingerprint, text_encoder_fingerprint
from scumble.errors import ModelError, PrecisionError, UnknownName
from scumble.models import FAMILIES, load_base
from scumble.models.dtypes import Dtypes, computing, dtype_spelled, short
from scumble.models.family import BaseModel, Components
from scumble.models.loading import describe_base, look_at
from scumble.models.needs import needs_of
from scumble.models.tiny import save
from tests.models import original_transformers as transformers

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.fixture(scope="module")
def sd1(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save("sd1", tmp_path_factory.mktemp("sd1") / "base")


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save("flux", tmp_path_factory.mktemp("flux") / "base")


def test_dtypes_by_name() -> None:
    for name in ("bf16", "bfloat16", "torch.bfloat16", BF16):
        assert dtype_spelled(name) is BF16
    assert [short(dtype) for dtype in (FP32, FP16, BF16)] == ["fp32", "fp16", "bf16"]
    with pytest.raises(UnknownName, match=r"no dtype 'int8'.*Known: bf16, fp16, fp32"):
        dtype_spelled("int8")
    kept = Dtypes(BF16, {"vae": FP32})
    assert (kept.of("vae"), kept.of("unet"), kept.used) == (FP32, BF16, (BF16, FP32))


def test_unknown_names_are_refused_with_those_that_exist(sd1: Path, flux: Path) -> None:
    known = r"It has text_encoder, unet, vae\."
    with pytest.raises(
        ModelError, match=rf"names 'text_encodr'.*Did you mean \"text_encoder\"\? {known}"
    ) as told:
        load_base(sd1, dtypes={"text_encodr": FP32})
    assert "tokenizer" not in str(told.value) and "scheduler" not in str(told.value)
    with pytest.raises(ModelError, match="no such component with weights"):
        load_base(sd1, dtypes={"tokenizer": FP32})
    with pytest.raises(UnknownName, match="no dtype 'fp31'"):
        load_base(sd1, dtypes={"vae": "fp31"})
    with pytest.raises(PrecisionError, match=r"There is no training or drawing in torch\.float64"):
        load_base(sd1, dtype=torch.float64, device="cpu")
    assert set(describe_base(flux).components) == {"transformer", "vae", "text_encoder", "text_encoder_2"}


def test_none_leaves_a_base_as_it_was(sd1: Path) -> None:
    plain, told = load_base(sd1, device="cpu"), load_base(sd1, device="cpu", dtypes={})
    assert plain.dtypes == told.dtypes == {} and told.dtype_of("vae") == FP32
    assert not told.modules()["vae"].encoder._forward_pre_hooks  # type: ignore[union-attr]
    assert "encode_prompt" not in vars(told.pipeline())


def test_fp16_on_a_cpu_is_refused_for_the_component_that_would_compute(sd1: Path) -> None:
    base = load_base(sd1, device="cpu", dtypes={"text_encoder": FP16})
    assert next(base.roots["text_encoder"].parameters()).dtype == FP16
    with pytest.raises(PrecisionError, match="fp16 needs a GPU"):
        base.encode_prompts(["a fox"])
    said = load_base(sd1, device="cpu").encode_prompts(["a fox"])
    assert base.denoise(torch.zeros(1, 4, 8, 8), torch.tensor([3]), said, None).isfinite().all()  # type: ignore[arg-type]
    base = load_base(sd1, device="cpu", dtypes={"vae": FP16})
    with pytest.raises(PrecisionError, match="fp16 needs a GPU"):
        base.encode_images(torch.zeros(1, 3, 16, 16), None)
    assert load_base(sd1, dtype=FP16, device="cpu").dtype_of("vae") == FP16  # it stores


def test_a_family_that_takes_one_dtype_is_found_out(sd1: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    family: Any = FAMILIES.get("sd1")
    own = family.load

    def deaf(source: Components, *, dtype: torch.dtype, device: torch.device) -> BaseModel:
        return own(replace(source, dtypes={}), dtype=dtype, device=device)

    monkeypatch.setattr(family, "load", deaf)
    with pytest.raises(
        ModelError, match=r"The vae of .* is in fp32, though bf16 was asked for it.*Leave dtypes out"
    ):
        load_base(sd1, device="cpu", dtypes={"vae": "bf16"})


def test_a_single_file_and_its_rest_take_them_too(tmp_path: Path) -> None:
    parts = transformers.sd3_parts(2)
    whole = FAMILIES.get("sd3").load(parts, dtype=FP32, device=torch.device("cpu"))
    whole.pipeline().save_pretrained(tmp_path / "rest")
    tensors, prefix = transformers.sd3_tensors(parts), "model.diffusion_model."
    alone = {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}
    transformers.write(tmp_path / "transformer.safetensors", alone)
    own = {"transformer": BF16, "text_encoder_2": BF16, "text_encoder_3": BF16}
    base: Any = load_base(
        tmp_path / "transformer.safetensors", rest=tmp_path / "rest", device="cpu", dtypes=own
    )
    for name, module in {**base.modules(), "text_encoder_3": base.t5}.items():
        assert {p.dtype for p in module.parameters()} == {own.get(name, FP32)}, name
    assert base.fingerprint() == load_base(tmp_path / "rest", device="cpu").fingerprint()


def keys(folder: Path, dtypes: Mapping[str, Any]) -> tuple[str, str]:
    base = load_base(folder, device="cpu", dtypes=dtypes)
    return image_encoder_fingerprint(base), text_encoder_fingerprint(base)


def test_caches_are_found_again_by_the_dtype_that_they_were_made_in(flux: Path) -> None:
    """Whatever the denoiser's is; T5, which is not loaded for it, is known by its own."""
    pictures, texts = keys(flux, {})
    assert keys(flux, {"transformer": BF16}) == (pictures, texts)
    other, same = keys(flux, {"vae": BF16})
    assert other != pictures and same == texts
    same, other = keys(flux, {"text_encoder": BF16})
    assert same == pictures and other != texts
    same, again = keys(flux, {"text_encoder_2": BF16})
    assert same == pictures and again not in (texts, other)


def test_autocast_is_changed_only_where_it_is_on() -> None:
    cpu, product = torch.device("cpu"), lambda: (torch.ones(2, 2) @ torch.ones(2, 2)).dtype
    with computing(BF16, cpu):
        assert product() == FP32
    with torch.autocast("cpu", BF16):
        with computing(None, cpu):
            assert product() == BF16
        with computing(FP32, cpu):
            assert product() == FP32
        with computing(FP16, cpu):
            assert product() == FP16
        assert product() == BF16
    with computing(FP32, torch.device("meta")):
        pass


def test_predicted_memory_honours_them(sd1: Path, flux: Path) -> None:
    for folder in (sd1, flux):
        look = look_at(folder)
        plain = needs_of(look.configs, look.facts, BF16, look.tokenizers)
        mixed = needs_of(
            look.configs, look.facts, BF16, look.tokenizers, {"vae": "fp32", "text_encoder": FP32}
        )
        for before, after in zip(plain.parts, mixed.parts, strict=True):
            wide = before.name in ("vae", "text_encoder")
            # buffers of whole numbers stay as large as they are
            assert after.size == before.size if not wide else 1.9 < after.size / before.size <= 2, before.name
        assert mixed.drawing() == sum(part.size for part in mixed.parts) > plain.drawing()
        assert mixed.kept == plain.kept  # the denoiser's
        denoiser = plain.parts[0].name
        wide_denoiser = needs_of(look.configs, look.facts, BF16, look.tokenizers, {denoiser: "fp32"})
        assert wide_denoiser.kept[False] > 1.5 * plain.kept[False]
        with pytest.raises(ModelError, match="no such component"):
            needs_of(look.configs, look.facts, BF16, None, {"unit": "fp32"})


def test_the_doctor_says_what_it_counted_in(flux: Path) -> None:
    def found(**told: Any) -> dict[str, str]:
        return {line.what: line.found for line in base_findings(str(flux), **told)}

    assert ": all parts in bf16;" in found()["to draw"]
    assert ": all parts in bf16, vae in fp32;" in found(dtypes={"vae": "float32"})["to draw"]
