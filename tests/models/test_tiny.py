"""Tiny bases: real classes, from a seed, saved as folders that unmodified diffusers loads."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from scumble.errors import UnknownName
from scumble.models import FAMILIES
from scumble.models.family import fingerprint
from scumble.models.tiny import tiny_pipeline


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_a_saved_folder_draws_the_same_picture_in_diffusers(folders: dict[str, Path], family: str) -> None:
    ours = tiny_pipeline(family, 3)
    theirs: Any = DiffusionPipeline.from_pretrained(folders[family], local_files_only=True)
    pictures = []
    for pipeline in (ours, theirs):
        pipeline.set_progress_bar_config(disable=True)
        rng = torch.Generator().manual_seed(0)
        pictures.append(pipeline("a fox", num_inference_steps=2, generator=rng, output_type="pt").images)
    assert torch.equal(*pictures) and pictures[0].shape == (1, 3, 16, 16)


def test_classes_are_the_real_ones_and_it_takes_no_time() -> None:
    FAMILIES.get("sd1").tiny()
    started = time.process_time()
    pipeline = tiny_pipeline("sd1", 1)
    assert time.process_time() - started < 1
    kinds = {
        "unet": UNet2DConditionModel,
        "vae": AutoencoderKL,
        "text_encoder": CLIPTextModel,
        "tokenizer": CLIPTokenizer,
    }
    assert all(type(getattr(pipeline, name)) is kind for name, kind in kinds.items())


def test_seeds_are_different_bases() -> None:
    one, same, other = (FAMILIES.get("sd2").tiny(seed) for seed in (1, 1, 2))
    assert one.fingerprint() == same.fingerprint() != other.fingerprint()


def test_unknown_families_are_named() -> None:
    with pytest.raises(UnknownName, match="sd1, sd1-inpainting, sd2"):
        tiny_pipeline("sd9")


def test_the_registry_costs_no_import_of_torch() -> None:
    code = (
        "import sys, scumble.models as m; names = m.FAMILIES.names(); "
        "assert 'sd1' in names and 'load_base' in dir(m); assert 'torch' not in sys.modules; "
        "m.load_base; assert 'torch' in sys.modules"
    )
    subprocess.run(
        [sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    )


def test_fingerprints_see_names_shapes_and_numbers_to_fp16() -> None:
    tensors = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor(3.0), "c": torch.zeros(0)}
    mark = fingerprint(tensors)
    assert (
        mark
        == fingerprint(dict(reversed(tensors.items())))
        == fingerprint({n: t.half() for n, t in tensors.items()})
    )
    for other in ({"a": tensors["a"].view(2, 1)}, {"b": torch.tensor(3.01)}, {"d": torch.tensor(1.0)}):
        assert fingerprint({**tensors, **other}) != mark
