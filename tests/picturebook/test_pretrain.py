"""The recipe of the embedded base runs from nothing to a folder that diffusers loads."""

from __future__ import annotations

import collections
import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from scumble.errors import ConfigError
from scumble.picturebook import pretrain


def test_merges_join_the_most_frequent_pairs_first() -> None:
    words = collections.Counter({"fox": 5, "box": 4, "fog": 1})
    merges = pretrain.learn_merges(words, 2)
    assert merges == [("o", "x</w>"), ("f", "ox</w>")]
    assert pretrain.learn_merges(words, 100)[-1][1].endswith("</w>")


def test_the_alphabet_has_a_symbol_for_every_byte() -> None:
    assert len(set(pretrain.byte_alphabet())) == 256


def test_the_rate_warms_up_holds_and_falls_to_zero() -> None:
    rates = [pretrain.rate_at(step, 1000, 0.25, warmup=100) for step in range(1001)]
    assert rates[0] == 0.01 and rates[99] == rates[749] == 1.0
    assert rates[875] == pytest.approx(0.5) and rates[1000] == 0
    assert rates[100:] == sorted(rates[100:], reverse=True)


def test_noise_levels_cover_the_range_and_favour_its_middle() -> None:
    levels = pretrain.noise_levels(1000, torch.Generator().manual_seed(0))
    assert levels.min() >= 0 and levels.max() < 1
    middle = ((levels >= 0.2) & (levels < 0.85)).float().mean()
    assert middle == pytest.approx(0.6 + 0.4 * 0.65, abs=0.02)


def test_a_stage_that_does_not_exist_or_comes_too_early_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no stage 'vee'"):
        pretrain.pretrain(tmp_path, stage="vee")
    with pytest.raises(ConfigError, match="needs 'draw' first"):
        pretrain.pretrain(tmp_path, stage="unet")


def test_plain_attention_is_attention() -> None:
    torch.manual_seed(0)
    unet = pretrain.new_unet(pretrain.Recipe())
    arguments = torch.randn(1, 4, 16, 16), torch.tensor([500]), torch.randn(1, 77, 160)
    with torch.no_grad():
        before = unet(*arguments).sample
        unet.set_attn_processor(pretrain.PlainAttention())
        assert (unet(*arguments).sample - before).abs().max() < 1e-5


@pytest.mark.slow
def test_every_stage_runs_and_the_result_loads_in_diffusers(tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline

    small = pretrain.Recipe(
        pictures=256, doodles=16, vae_steps=2, unet_steps=2, unet_batch=4, decoder_steps=1
    )
    (tmp_path / "recipe.json").write_text(json.dumps(asdict(small)))
    for stage in pretrain.STAGES[:-1]:
        pretrain.pretrain(tmp_path, stage=stage, log=lambda _: None)
    pipe = StableDiffusionPipeline.from_pretrained(tmp_path / "picturebook", torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    assert pipe("a red fox", num_inference_steps=2).images[0].size == (64, 64)
    done = sorted(f.stem for f in tmp_path.glob("*.done"))
    assert done == sorted(pretrain.STAGES[:-1])
