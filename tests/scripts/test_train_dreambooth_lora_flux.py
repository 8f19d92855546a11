"""The DreamBooth command people already have for Flux.1: each flag becomes what it should, and the whole of it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from scumble.adapters import resolve
from scumble.models import FAMILIES
from tests.runs.worlds import write_world
from tests.scripts.commands import (
    FOLDER,
    about,
    at,
    defaults,
    load,
    meaning,
    named_in,
    notes_of,
    trained,
)
from tests.scripts.theirs import SUBJECT_FLOW

THEIRS: dict[str, Any] = {
    **SUBJECT_FLOW,
    "max_sequence_length": 512,
    "lora_alpha": 4,
    "output_dir": "flux-dreambooth-lora",
    "guidance_scale": 3.5,
    "weighting_scheme": "none",
    "enable_npu_flash_attention": False,
}

script = load("train_dreambooth_lora_flux")


config = meaning(script, FOLDER)


def test_the_flags_are_theirs_with_their_defaults() -> None:
    assert defaults(script) == THEIRS


ROWS: list[tuple[str, str, Any]] = [
    ("", "method", "dreambooth"),
    ("", "data.images", "dog"),
    ("", "dreambooth.instance_prompt", "a photo of sks dog"),
    ("--validation_prompt=sks", "preview.steps", 28),
    ("--validation_prompt=sks", "preview.guidance", None),
    ("--train_text_encoder", "dreambooth.train_text_encoder", True),
    ("--train_text_encoder", "dreambooth.text_encoder_learning_rate", 5e-6),
    ("", "train.objective.guidance", 3.5),
    ("--guidance_scale=1", "train.objective.guidance", 1.0),
    ("", "train.objective.timesteps.distribution", "uniform"),
    ("", "train.objective.timesteps.shift", None),
    ("--weighting_scheme=logit_normal --logit_mean=0.5", "train.objective.timesteps.mean", -0.5),
    ("--weighting_scheme=mode --mode_scale=0.8", "train.objective.timesteps.mode_scale", 0.8),
    ("--weighting_scheme=sigma_sqrt", "train.objective.weighting", "sigma-sqrt"),
    ("", "train.objective.weighting", "none"),
    ("", "train.objective.measured", "prediction"),
    ("--optimizer=Prodigy --use_8bit_adam", "train.optimizer.name", "prodigy"),
    ("", "train.optimizer.weight_decay", 1e-4),
    ("--lora_layers=attn.to_q,attn.to_k", "adapter.targets", ("*.attn.to_q", "*.attn.to_k")),
    ("--rank=16", "adapter.rank", 16),
    ("--rank=16", "adapter.alpha", 4.0),
    ("--rank=16 --lora_alpha=8", "adapter.alpha", 8.0),
    ("", "train.optimizer.learning_rate", 1e-4),
    ("", "output", Path("flux-dreambooth-lora")),
    ("", "train.steps", 5),
]  # fmt: skip


@pytest.mark.parametrize(("flags", "setting", "value"), ROWS)
def test_each_flag_becomes_its_setting(flags: str, setting: str, value: Any) -> None:
    assert at(config(*flags.split()), setting) == about(value)


def test_every_flag_is_in_a_table_or_shared() -> None:
    """Rows shared with the other commands are tested there."""
    shared = {flag.name for flag in load("train_dreambooth_lora_sd3").FLAGS}
    assert set(THEIRS) <= shared | named_in(ROWS) | {"enable_npu_flash_attention"}


def test_class_pictures_are_drawn_as_the_pipeline_draws() -> None:
    found = config("--with_prior_preservation", "--class_data_dir=dogs", "--class_prompt=a dog")
    assert found.dreambooth.prior == "images"
    assert (found.dreambooth.class_steps, found.dreambooth.class_guidance) == (28, None)


def test_a_base_that_is_told_no_guidance_gets_none() -> None:
    assert config("--guidance_scale=2", guided=lambda flags: False).train.objective.guidance is None


def test_targets_are_the_layers_that_diffusers_trains() -> None:
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists

    base = FAMILIES.get("flux").tiny()
    layers = LoraConfig(target_modules=[name.removeprefix("*.") for name in config().adapter.targets])
    expected = {
        f"transformer.{name}"
        for name, _ in base.denoiser.named_modules()
        if check_target_module_exists(layers, name)
    }
    assert set(resolve(base.roots, config().adapter.targets).layers) == expected


def test_notes_name_what_is_not_used() -> None:
    notes = " ".join(notes_of(script, *FOLDER, "--max_sequence_length=128", "--enable_npu_flash_attention"))
    assert "--max_sequence_length=128 is not used" in notes and "--enable_npu_flash_attention" in notes
    assert notes_of(script, *FOLDER) == []


def test_the_whole_of_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(write_world(tmp_path, 2, family="flux", pictures="dog", caption=None))
    flags = ("--train_text_encoder", "--text_encoder_lr=0.01", "--guidance_scale=1")
    preview = ("--validation_prompt=a dog", "--num_validation_images=1")
    found = trained(script, tmp_path, *FOLDER, *flags, *preview)
    assert found.dialect == "diffusers" and found.state.metadata.base_family == "flux"
    assert found.state.roots == {"transformer", "text_encoder"}
