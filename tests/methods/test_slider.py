"""Slider: its formula, its noisy latents, what it refuses, and that a resumed run sees the same samples."""

from __future__ import annotations

import shutil
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from scumble.adapters.lora import LoraSettings
from scumble.data.problems import Problem
from scumble.errors import ConfigError
from scumble.methods.method import METHODS, Ingredients
from scumble.methods.slider import Paths, Slider, SliderObjective, SliderSettings
from scumble.models import FAMILIES
from scumble.models.family import BaseModel, Frame
from scumble.models.text import Words
from scumble.models.tiny import tiny_tokenizer
from scumble.rng import Streams
from scumble.runs.load import load
from scumble.training.loop import train
from scumble.training.plan import Plan
from scumble.training.settings import TrainSettings

PAIR = {"positive": "a big fox", "negative": "a small fox", "neutral": "a fox"}


def make(
    family: str = "sd1", *, targets: Any = "attention", batch: int = 2, streams: int = 0, **more: Any
) -> tuple[Plan, BaseModel]:
    base = FAMILIES.get(family).tiny(0)
    settings = SliderSettings.model_validate({**PAIR, "paths": 3, "path_steps": 4, "resolution": 16, **more})
    ingredients = Ingredients(
        base=base,
        fresh=lambda: FAMILIES.get(family).tiny(0),
        adapter=LoraSettings(rank=2),
        targets=targets,
        batches=None,
        train=TrainSettings(steps=4, batch=batch),
        streams=Streams(streams),
        options=settings,
    )
    return Slider().plan(ingredients), base


def parts(plan: Plan) -> tuple[SliderObjective, Paths]:
    objective, paths = plan.phases[0].objective, plan.phases[0].batches
    assert isinstance(objective, SliderObjective) and isinstance(paths, Paths)
    return objective, paths


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
@pytest.mark.parametrize("both_ways", [True, False])
def test_the_gradient_is_that_of_the_formula(family: str, both_ways: bool) -> None:
    """Against the formula written out by hand, with a bare base for the target and merged weights for the answer."""
    plan, base = make(family, both_ways=both_ways, eta=1.5, batch=4)
    objective, paths = parts(plan)
    adapter = objective.adapter
    for parameter in adapter.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    batch = next(iter(paths.start(0)))
    losses = objective(batch)
    losses.sum().backward()
    names = [name for name, _ in adapter.named_parameters()]
    gradients = [p.grad.clone() for p in adapter.parameters() if p.grad is not None]
    assert len(gradients) == len(names)

    bare = FAMILIES.get(family).tiny(0)
    total = torch.zeros(())
    for row, position in enumerate(batch.positions):
        x, t = batch.latents[row : row + 1], paths.said([position])[0]
        frame = Frame.plain(1, 16, 16)
        with torch.no_grad():
            n, plus, minus = (
                bare.denoise(x, t, bare.encode_prompts([PAIR[word]]), frame)
                for word in ("neutral", "positive", "negative")
            )
        s = -1.0 if both_ways and position % 2 else 1.0
        target = n + s * 1.5 * (plus - minus)
        adapter.strength = s
        answer = base.denoise(x, t, bare.encode_prompts([PAIR["neutral"]]), frame)
        loss = (answer - target).square().mean()
        assert torch.allclose(losses[row], loss, rtol=1e-4), row
        total = total + loss
    expected = torch.autograd.grad(total, list(adapter.parameters()))
    for name, mine, theirs in zip(names, gradients, expected, strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-3, atol=1e-6), name


def test_latents_lie_on_the_bases_own_ways_from_noise() -> None:
    """The last level implies nearly the clean latents that the way ends at; the first is noise."""
    plan, base = make(path_steps=10, guidance=1.0)
    _, paths = parts(plan)
    paths.batch(range(4))
    path = paths._made[0]
    assert path.t.tolist() == sorted(path.t.tolist(), reverse=True) and path.t[0] == 999
    assert torch.equal(path.latents[0], Streams(0).normal("slider noise", [0], (4, 8, 8))[0])
    for level in range(9):
        t, after = path.t[level : level + 1], path.t[level + 1 : level + 2]
        x, out = path.latents[level : level + 1], path.neutral[level : level + 1]
        x0 = base.prediction.clean(x, out, t)
        # DDIM: the same x0 and the same noise, at the next level (here epsilon is the noise itself)
        expected = base.prediction.noisy(x0, out, after)
        assert torch.allclose(path.latents[level + 1][None], expected, atol=1e-3)


def test_samples_depend_on_their_position_alone() -> None:
    one = make(paths=9)[0].phases[0].batches
    two = make(paths=9)[0].phases[0].batches
    whole = list(islice(one.start(0), 9))
    late = list(islice(two.start(5), 4))
    for first, second in zip(whole[5:], late, strict=True):
        assert first.positions == second.positions
        assert torch.equal(first.latents, second.latents)
    shared = [
        next(islice(make(paths=9)[0].phases[0].batches.start(0, process=p, processes=2), 1, None))
        for p in (0, 1)
    ]
    assert [batch.positions for batch in shared] == [whole[2].positions, whole[3].positions]


def test_every_level_of_every_path_is_seen_once_a_round() -> None:
    _, paths = parts(make()[0])
    for round_ in (0, 3):
        places = [paths.place(12 * round_ + n) for n in range(12)]
        assert sorted(places) == [(path, level) for path in range(3) for level in range(4)]


def test_the_base_is_as_it_was_and_trains_nothing_but_the_adapter() -> None:
    plan, base = make()
    mine = {id(p) for t in plan.phases[0].trainables for p in t.parameters.values()}
    assert mine == {id(p) for root in base.roots.values() for p in root.parameters() if p.requires_grad}
    assert plan.facts["noisy latents"] == 12


def test_after_training_the_strength_is_one() -> None:
    plan, _ = make()
    objective, paths = parts(plan)
    objective.train()
    objective(next(iter(paths.start(0))))
    assert isinstance(objective.adapter.strength, torch.Tensor)
    objective.eval()
    assert objective.adapter.strength == 1.0


def test_a_text_encoder_that_trains_is_asked_anew_each_time() -> None:
    plan, _ = make(targets=("attention", "text_encoder.attention"))
    objective, paths = parts(plan)
    batch = next(iter(paths.start(0)))
    assert batch.conditioning is None
    objective(batch).sum().backward()
    reached = [
        n
        for n, p in objective.adapter.named_parameters()
        if p.grad is not None and n.startswith("text_encoder")
    ]
    assert len(reached) == 16


def test_words_to_preserve_are_in_all_three_prompts() -> None:
    settings = SliderSettings.model_validate({**PAIR, "preserve": ("in the snow", ", at night")})
    assert settings.prompts(0) == ("a fox in the snow", "a big fox in the snow", "a small fox in the snow")
    assert settings.prompts(3)[0] == "a fox, at night"
    placed = SliderSettings(
        positive="a big {}", negative="a small {}", neutral="a {}", preserve=("cat", "red fox")
    )
    assert placed.prompts(1) == ("a red fox", "a big red fox", "a small red fox")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"neutral": " "}, "neutral not set"),
        ({"positive": "x", "negative": "x"}, "there is no difference to learn"),
        ({"neutral": "a {}"}, "which is empty"),
        (
            {"positive": "a {}", "negative": "a", "preserve": ("x",)},
            'both "a x" with the words of preserve: there is no difference',
        ),
    ],
)
def test_prompts_that_teach_nothing_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        SliderSettings.model_validate({**PAIR, **changes})


def problems(**changes: Any) -> list[Problem]:
    settings = SliderSettings.model_validate({**PAIR, **changes})
    return list(Slider().check(settings, None, [Words(tiny_tokenizer(), 77)]))


def test_prompts_that_are_cut_are_warned_of_with_the_cut() -> None:
    assert not problems()
    (one,) = problems(positive="the " * 75 + "big fox")
    assert not one.error and str(one).startswith("slider.positive: has 8")
    assert one.text.endswith("This would be cut off: 'big fox'. Shorten the prompt.")
    assert len(problems(preserve=("the " * 75, "in snow"))) == 3, "the words to preserve count"


def test_prompts_that_differ_only_where_they_are_cut_are_refused() -> None:
    *cut, same = problems(positive="the " * 90 + "big", negative="the " * 90 + "small")
    assert [one.key for one in cut] == ["slider.positive", "slider.negative"]
    assert same.error and "are the same tokens for the base" in same.text
    assert [one.error for one in problems(positive="A fox", negative="a fox")] == [True]


def test_a_run_says_what_is_cut_and_refuses_a_pair_that_is_one_before_a_model_is_loaded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from scumble.runs import build

    def run(**changes: str) -> tuple[Problem, ...]:
        said = {**PAIR, **changes}
        return build.check_data(
            load(None, (), base="picturebook", method="slider", output="never", slider=said)
        )[2]

    monkeypatch.setattr(build, "load_base", None)
    (warning,) = run(neutral="a " * 90 + "fox")
    assert warning.key == "slider.neutral" and "This would be cut off" in warning.text
    with pytest.raises(ConfigError, match=r"slider\.positive: .* are the same tokens for the base"):
        run(positive="a " * 90 + "big", negative="a " * 90 + "small")


def test_mistakes_in_a_settings_file_are_told_in_one_place(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="a slider needs three prompts"):
        load(None, (), base="picturebook", method="slider", output=str(tmp_path))
    with pytest.raises(ConfigError, match="learns without pictures"):
        load(
            None,
            (),
            base="picturebook",
            method="slider",
            output=str(tmp_path),
            slider=PAIR,
            data={"images": "x"},
        )
    with pytest.raises(ConfigError, match=r"slider.resolution = 20"):
        make(resolution=20)


@pytest.mark.parametrize(
    ("objective", "named"),
    [
        ({"loss": "huber"}, 'train.objective.loss = "huber" would'),
        (
            {"snr_gamma": 5, "noise_offset": 0.5},
            r"objective.snr_gamma = 5.0, train.objective.noise_offset = 0.5 would",
        ),
        (
            {"timesteps": {"distribution": "logit-normal"}},
            'train.objective.timesteps.distribution = "logit-normal" would',
        ),
    ],
)
def test_settings_of_another_loss_are_refused_by_name(objective: dict[str, Any], named: str) -> None:
    run = {"base": "picturebook", "method": "slider", "output": "never", "slider": PAIR}
    with pytest.raises(ConfigError, match=named):
        load(None, (), train={"objective": objective}, **run)
    assert load(None, (), train={"objective": {"loss": "l2"}}, **run).train.objective.loss == "l2"


def test_a_resumed_run_gives_the_very_same_file(tmp_path: Path) -> None:
    settings = TrainSettings.model_validate(
        {"steps": 4, "batch": 2, "checkpoint_every": 2, "optimizer": {"learning_rate": 1e-2}}
    )
    whole = train(make()[0], tmp_path / "whole", settings, [], Streams(0))
    shutil.copytree(tmp_path / "whole" / "checkpoint-000002", tmp_path / "half" / "checkpoint-000002")
    half = train(make()[0], tmp_path / "half", settings, [], Streams(0), resume="latest")
    assert whole.adapter is not None and half.adapter is not None and half.step == 4
    assert whole.adapter.read_bytes() == half.adapter.read_bytes()


def test_it_is_found_by_name() -> None:
    assert isinstance(METHODS.get("slider"), Slider)


def test_the_example_trains_and_its_file_acts(tmp_path: Path) -> None:
    """On the embedded base, with fewer steps than it says."""
    from scumble.formats import read
    from scumble.runs.train import train as train_run

    few = ("train.steps=2", "train.batch=2", "slider.paths=1", "slider.path_steps=2")
    result = train_run(
        Path(__file__).parents[2] / "examples" / "slider.toml", *few, output=tmp_path / "run", quiet=True
    )
    assert result.adapter is not None and result.reason == "complete" and result.difference is not None
    state = read(result.adapter).state
    assert state.layers and '"positive":"a big {}"' in state.metadata.settings
