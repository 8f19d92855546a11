"""scumble's laws of base models, as they are, on a family that scumble does not know.

The star import brings them; `family` decides on whom they are tried. One is written anew: it reads what the pipeline's
`encode_prompt` returns, and PixArt's returns masks where others have a pooled embedding.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import scumble
from scumble.models import FAMILIES, describe_base, load_base
from scumble.models.family import BaseModel
from scumble.models.tiny import save
from tests.laws import test_component_dtypes as dtypes
from tests.laws.test_base_models import *  # noqa: F403
from tests.laws.test_base_models import PROMPTS, quiet

NAME = "pixart-sigma"


@pytest.fixture
def family() -> str:
    return NAME


def test_encode_prompts_is_the_pipelines(base: BaseModel) -> None:
    ours, nothing = base.encode_prompts(PROMPTS), base.unconditional(len(PROMPTS))
    for theirs, mine in zip(
        quiet(base).encode_prompt(PROMPTS, True, device="cpu"), (ours, ours, nothing, nothing), strict=True
    ):
        assert torch.equal(theirs, mine.mask if theirs.ndim == 2 else mine.tokens)


def test_it_is_found_by_its_entry_point_alone() -> None:
    assert NAME in FAMILIES
    source = Path(scumble.__file__).parent
    assert not any("pixart-sigma" in file.read_text() for file in source.rglob("*.py"))


def test_a_folder_is_recognised_trained_and_drawn_with(tmp_path: Path) -> None:
    from PIL import Image

    base = save(NAME, tmp_path / "base")
    facts = describe_base(base)
    assert (facts.family, facts.title, facts.problems) == (NAME, "PixArt-Sigma", ())
    assert load_base(base, device="cpu").fingerprint() == FAMILIES.get(NAME).tiny().fingerprint()
    (tmp_path / "pictures").mkdir()
    for number in range(2):
        Image.new("RGB", (16, 16), (90 * number, 200, 90)).save(tmp_path / f"pictures/{number}.png")
    result = scumble.train(
        base=str(base),
        data={"images": str(tmp_path / "pictures"), "caption": "a fox", "resolution": 16},
        train={"steps": 2, "batch": 2, "optimizer": {"learning_rate": 0.01}, "checkpoint_every": 0},
        adapter={"rank": 2},
        preview={"prompts": ("a fox",), "steps": 2},
        output=tmp_path / "run",
        quiet=True,
    )
    assert result.adapter is not None
    with scumble.Session(base, [result.adapter]) as session:
        request = scumble.Request(prompt="a fox", steps=2)
        drawn = session.generate(request)[0].image
        bare = scumble.Session(base).generate(request)[0].image
    assert drawn.size == (16, 16) and drawn.tobytes() != bare.tobytes()


@pytest.mark.parametrize(
    "mix", ["texts", *(pytest.param(mix, marks=pytest.mark.slow) for mix in ("vae", "denoiser"))]
)
def test_a_dtype_for_each_component(tmp_path: Path, mix: str) -> None:
    folders = dtypes.Folders(tmp_path)
    dtypes.test_every_component_has_the_dtype_that_was_asked_for(folders, NAME, mix)
    dtypes.test_it_draws_the_picture_of_fp32_also_with_an_adapter(folders, NAME, mix, tmp_path)
    dtypes.test_a_step_trains_with_a_loss_close_to_fp32s(folders, NAME, mix, torch.bfloat16)
    dtypes.test_a_component_in_fp32_computes_in_it_within_a_step_in_bf16(folders, NAME)


def test_a_text_encoder_of_another_width_is_refused(tmp_path: Path) -> None:
    base = save(NAME, tmp_path / "base")
    config = base / "text_encoder" / "config.json"
    config.write_text(config.read_text().replace('"d_model": 24', '"d_model": 32'))
    (problem,) = describe_base(base).problems
    assert "gives 32 numbers a token and its transformer takes 24" in problem
