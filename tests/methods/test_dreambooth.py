"""DreamBooth: the paper's formula to the gradient, the class kept both ways, and what is said before a run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from torch import Tensor, nn

from scumble.data.record import Batch
from scumble.data.settings import DataSettings
from scumble.errors import ConfigError
from scumble.methods import prior_prediction
from scumble.methods.dreambooth import DreamBoothSettings, dreambooth
from scumble.methods.prior import class_data
from scumble.models import FAMILIES
from scumble.models.family import BaseModel
from scumble.models.text import Words
from scumble.rng import Streams
from scumble.training.plan import Plan
from scumble.training.settings import TrainSettings
from tests.training.world import make_plan

SETTINGS = TrainSettings(steps=3, batch=2, seed=5)
CLASS = {"class_prompt": "a dog", "prior_weight": 0.7}


@pytest.fixture(scope="module")
def words() -> list[Words]:
    base = FAMILIES.get("sd1").tiny()
    return [base.words]  # type: ignore[attr-defined]


def made(options: dict[str, Any], **others: Any) -> tuple[Plan, BaseModel, list[nn.Parameter]]:
    """A plan whose adapter is somewhere, not at its start, with its base and parameters."""
    plan, base = make_plan(SETTINGS, method="dreambooth", options=options, **others)
    parameters = [p for each in plan.phases[0].trainables for p in each.parameters.values()]
    with torch.no_grad():
        for number, parameter in enumerate(parameters):
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
    return plan, base, parameters


def first(plan: Plan, count: int = 1) -> list[Batch]:
    batches: Iterator[Batch] = plan.phases[0].batches.start(0)
    return list(islice(batches, count))


def gradient(loss: Tensor, parameters: list[nn.Parameter]) -> Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])


def noisy(base: BaseModel, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """(x_t, noise, t) of a batch, from the definitions."""
    noise = Streams(5).normal("noise", batch.positions, batch.latents.shape[1:])
    t = (Streams(5).uniform("timestep", batch.positions) * 1000).long()
    level = base.prediction.alphas_cumprod[t].view(-1, 1, 1, 1)  # type: ignore[attr-defined]
    return level.sqrt() * batch.latents + (1 - level).sqrt() * noise, noise, t


def test_class_pictures_weigh_as_in_the_paper() -> None:
    """mean(instance) + lambda * mean(prior), Ruiz et al. 2023, eq. 2, over two micro-batches."""
    plan, base, parameters = made({"prior": "images", **CLASS})
    batches = first(plan, 2)
    objective = plan.phases[0].objective
    loss = sum(objective(batch).sum() for batch in batches) / sum(map(len, batches))
    instance, prior = [], []
    for batch in batches:
        xt, noise, t = noisy(base, batch)
        assert batch.conditioning is not None
        answer = base.denoiser(xt, t, batch.conditioning.tokens).sample
        each = (answer - noise).square().mean((1, 2, 3))
        instance += list(each[0::2])
        prior += list(each[1::2])
    formula = torch.stack(instance).mean() + 0.7 * torch.stack(prior).mean()
    torch.testing.assert_close(loss, formula)
    theirs = gradient(formula, parameters)
    assert theirs.abs().max() > 1e-3
    torch.testing.assert_close(gradient(loss, parameters), theirs, atol=1e-6, rtol=1e-4)
    assert plan.phases[0].batches.batch_size == 4 and plan.facts["class pictures"] == 5


def test_the_bases_own_prediction_weighs_as_in_the_paper() -> None:
    plan, base, parameters = made({"prior": "prediction", **CLASS})
    (batch,) = first(plan)
    loss = plan.phases[0].objective(batch).mean()
    untouched = FAMILIES.get("sd1").tiny(0)
    xt, noise, t = noisy(base, batch)
    said = untouched.encode_prompts(["a dog"] * 2).tokens
    with torch.no_grad():
        kept = untouched.denoiser(xt, t, said).sample
    assert batch.conditioning is not None
    instance = (base.denoiser(xt, t, batch.conditioning.tokens).sample - noise).square().mean()
    prior = (base.denoiser(xt, t, said).sample - kept).square().mean()
    assert prior > 1e-5
    formula = instance + 0.7 * prior
    torch.testing.assert_close(loss, formula)
    torch.testing.assert_close(
        gradient(loss, parameters), gradient(formula, parameters), atol=1e-6, rtol=1e-4
    )


@pytest.mark.parametrize("train_text_encoder", [False, True])
def test_a_caption_is_held_to_itself_with_the_class_in_the_subjects_place(train_text_encoder: bool) -> None:
    options = {"prior": "prediction", "subject": "Picture", "train_text_encoder": train_text_encoder, **CLASS}
    plan, base, parameters = made(options)
    (batch,) = first(plan)
    asked = [caption.replace("picture", "a dog") for caption in batch.captions]
    assert len(set(asked)) == 2 and all(prompt.startswith("a dog ") for prompt in asked)
    untouched = FAMILIES.get("sd1").tiny(0)
    xt, noise, t = noisy(base, batch)
    with torch.no_grad():
        kept = untouched.denoiser(xt, t, untouched.encode_prompts(asked).tokens).sample
    instance = base.denoiser(xt, t, base.encode_prompts(batch.captions).tokens).sample - noise
    prior = base.denoiser(xt, t, base.encode_prompts(asked).tokens).sample - kept
    formula = instance.square().mean() + 0.7 * prior.square().mean()
    loss = plan.phases[0].objective(batch).mean()
    torch.testing.assert_close(loss, formula)
    torch.testing.assert_close(
        gradient(loss, parameters), gradient(formula, parameters), atol=1e-6, rtol=1e-4
    )


def test_which_readings_of_class_captions_are_kept_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of an adapter that changes the text encoder: they are the bare base's."""
    options = {"prior": "prediction", "subject": "picture", "train_text_encoder": True, **CLASS}
    losses = []
    captions = [f"picture {number}" for number in range(6)]
    for room, known in ((prior_prediction.KEPT, captions), (prior_prediction.KEPT, []), (1, captions)):
        monkeypatch.setattr(prior_prediction, "KEPT", room)
        plan, _, _ = made(options, captions=lambda known=known: known)
        objective = plan.phases[0].objective
        losses.append(torch.cat([objective(batch) for batch in first(plan, 4)]))
        assert len(objective.kept) <= room  # type: ignore[attr-defined]
    assert torch.equal(losses[0], losses[1]) and torch.equal(losses[0], losses[2])


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("a sks dog on a beach", "a cat on a beach"),
        ("A SKS Dog, and another sks dog", "A cat, and another cat"),
        ("a sks doghouse", "cat"),  # not its words
        ("", "cat"),  # dropped for guidance
    ],
)
def test_the_class_stands_where_the_subject_stood(caption: str, expected: str) -> None:
    options = DreamBoothSettings(prior="prediction", subject="sks dog", class_prompt="cat")
    assert options.class_caption(caption) == expected
    alone = DreamBoothSettings(prior="prediction", class_prompt="a cat")
    assert alone.class_caption(caption) == "a cat"


def test_what_stands_in_the_subjects_place_is_taken_as_it_is() -> None:
    options = DreamBoothSettings(prior="prediction", subject="C++ (v1)", class_prompt=r"a \1 dog")
    assert options.class_caption("my C++ (v1) logo") == r"my a \1 dog logo"


def test_captions_that_do_not_say_the_subject_are_told(tmp_path: Path, words: list[Words]) -> None:
    for number, caption in enumerate(("sks dog in a field", "the sks dog", "a dog")):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{number}.png")
        (tmp_path / f"{number}.txt").write_text(caption)
    data = DataSettings(images=str(tmp_path), caption_dropout=0.1)

    def problems(subject: str, class_prompt: str) -> list[tuple[bool, str, str]]:
        options = DreamBoothSettings(prior="prediction", subject=subject, class_prompt=class_prompt)
        return [(one.error, one.key, one.text) for one in dreambooth.check(options, data, words)]

    ((error, key, text),) = problems("sks dog", "animal")
    assert not error and key == "dreambooth.subject"
    assert "1 of 3 captions do not say 'sks dog', first that of 2.png" in text and "'animal' alone" in text
    ((error, key, text),) = problems("zorbik", "animal")
    assert error and "no caption says 'zorbik'" in text and "'sks dog in a field'" in text
    long = "x " * (words[0].limit - 4)
    while words[0].truncated([long]):
        long = long[2:]
    (_, (error, key, text)) = problems("sks dog", long)
    assert not error and key == "dreambooth.class_prompt" and "would be cut off" in text


def test_an_untrained_adapter_costs_the_prior_nothing() -> None:
    plain, _ = make_plan(SETTINGS, method="dreambooth")
    kept, _ = make_plan(SETTINGS, method="dreambooth", options={"prior": "prediction", **CLASS})
    (batch,) = first(kept)
    assert torch.equal(plain.phases[0].objective(batch), kept.phases[0].objective(batch))


def test_the_mask_is_about_the_subject() -> None:
    """Where it is black the instance counts nothing; the class is kept everywhere."""
    plan, base, _ = made({"prior": "prediction", **CLASS})
    (batch,) = first(plan)
    masked = replace(batch, mask=torch.zeros(2, 1, 4, 4))
    xt, _, t = noisy(base, batch)
    said = base.encode_prompts(["a dog"] * 2).tokens
    with torch.no_grad():
        mine = base.denoiser(xt, t, said).sample
        theirs = FAMILIES.get("sd1").tiny(0).denoiser(xt, t, said).sample
    expected = 0.7 * (mine - theirs).square().mean((1, 2, 3))
    torch.testing.assert_close(plan.phases[0].objective(masked), expected)


def test_a_trained_text_encoder_is_held_to_the_bases_reading() -> None:
    """The class prompt is read with the adapter, its target without: gradients reach the text encoder."""
    options = {"prior": "prediction", "train_text_encoder": True, **CLASS}
    plan, base, parameters = made(options)
    (batch,) = first(plan)
    assert batch.conditioning is None
    untouched = FAMILIES.get("sd1").tiny(0)
    xt, noise, t = noisy(base, batch)
    with torch.no_grad():
        kept = untouched.denoiser(xt, t, untouched.encode_prompts(["a dog"] * 2).tokens).sample
    instance = base.denoiser(xt, t, base.encode_prompts(batch.captions).tokens).sample - noise
    prior = base.denoiser(xt, t, base.encode_prompts(["a dog"] * 2).tokens).sample - kept
    formula = instance.square().mean() + 0.7 * prior.square().mean()
    loss = plan.phases[0].objective(batch).mean()
    torch.testing.assert_close(loss, formula)
    torch.testing.assert_close(
        gradient(loss, parameters), gradient(formula, parameters), atol=1e-6, rtol=1e-4
    )


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"prior": "images"}, "class_prompt that the base can draw them from"),
        ({"prior": "prediction"}, "class_prompt is not set"),
        ({"prior": "prediction", "class_prompt": "a dog", "class_count": 5}, "class_count: .*no effect"),
        ({"class_images": "dogs/"}, "class_images: .*no effect"),
        ({"prior_weight": 0.5}, "prior_weight = 0.5 has no effect"),
        ({"text_encoder_until": 0}, "greater than 0"),
        ({"instance_prompt": "   "}, "the prompt is blank"),
        ({"prior": "prediction", "class_prompt": " \n"}, "the prompt is blank"),
        ({"subject": "sks dog"}, "subject = 'sks dog' has no effect with prior = \"none\""),
        (
            {"prior": "images", "class_prompt": "dog", "subject": "sks dog"},
            "subject = 'sks dog' has no effect",
        ),
        ({"prior": "prediction", "subject": "sks dog"}, "class_prompt is not set"),
        ({"prior": "prediction", "class_prompt": "a dog", "subject": "dog"}, "says the subject, 'dog'"),
    ],
)
def test_a_setting_without_effect_is_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        DreamBoothSettings(**options)


def test_the_instance_prompt_is_every_pictures_caption() -> None:
    options = DreamBoothSettings(instance_prompt="a photo of sks dog")
    assert options.shaped(DataSettings(images="p")).caption == "a photo of sks dog"
    assert DreamBoothSettings().shaped(DataSettings(images="p")).caption is None
    with pytest.raises(ConfigError, match="both are the caption"):
        options.shaped(DataSettings(images="p", caption="a dog"))


def test_class_pictures_are_shown_in_the_form_of_the_subjects() -> None:
    data = DataSettings(
        images="p", masks="alpha", resolution=64, random_flip=True, held_out=1, templates=("so: {caption}",)
    )
    options = DreamBoothSettings(prior="images", class_prompt="a dog", class_images="dogs")
    shown = class_data(options, data, "dogs")
    assert (shown.images, shown.caption, shown.masks, shown.held_out) == ("dogs", "a dog", None, 0)
    assert (shown.resolution, shown.random_flip, shown.templates) == (64, True, ("{caption}",))


def test_long_prompts_are_refused_with_what_is_cut_off(words: list[Words]) -> None:
    limit = words[0].limit
    prompt = "a photo of sks dog " + "x " * limit + "the end"
    options = DreamBoothSettings(instance_prompt=prompt, class_prompt="a dog", prior="prediction")
    (problem,) = dreambooth.check(options, None, words)
    assert problem.error and problem.key == "dreambooth.instance_prompt"
    (cut,) = words[0].truncated([prompt])
    assert cut.lost in str(problem) and "the end" in cut.lost.replace(" ", "").replace("theend", "the end")


def test_a_prompt_without_identifier_is_a_warning(words: list[Words]) -> None:
    for prompt, warned in (("A photo of a dog.", True), ("a photo of sks dog", False)):
        options = DreamBoothSettings(instance_prompt=prompt, class_prompt="a photo of a dog")
        problems = dreambooth.check(options, None, words)
        assert [problem.error for problem in problems] == ([False] if warned else [])
        assert not warned or "'A photo of a dog.' has no word" in problems[0].text


def test_a_class_that_is_held_while_no_caption_is_dropped_is_a_warning() -> None:
    options = DreamBoothSettings(prior="prediction", class_prompt="a dog")
    for dropped in (0.0, 0.1):
        problems = dreambooth.check(options, DataSettings(images="p", caption_dropout=dropped), [])
        assert [problem.error for problem in problems] == ([] if dropped else [False])
        assert dropped or (problems[0].key == "data.caption_dropout" and "guidance" in problems[0].text)


def test_class_pictures_that_nobody_can_draw_are_refused(tmp_path: Path) -> None:
    options = DreamBoothSettings(prior="images", class_images=str(tmp_path), class_count=3)
    (problem,) = dreambooth.check(options, None, [])
    assert problem.error and "holds 0 pictures, class_count asks for 3" in problem.text
    for number in range(3):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{number}.png")
    assert dreambooth.check(options, None, []) == []
    nowhere = options.model_copy(update={"class_images": str(tmp_path / "none"), "class_count": None})
    assert "holds 0 pictures" in dreambooth.check(nowhere, None, [])[0].text
    drawn = nowhere.model_copy(update={"class_prompt": "a dog"})
    assert dreambooth.check(drawn, None, []) == [], "the base draws them"
    a_file = drawn.model_copy(update={"class_images": str(tmp_path / "0.png")})
    assert "is a file" in dreambooth.check(a_file, None, [])[0].text


def test_class_pictures_that_can_not_be_trained_on_are_named(tmp_path: Path) -> None:
    data, place = DataSettings(images="p", caption="a photo of sks dog"), tmp_path / "dogs"
    place.mkdir()
    (place / "a.png").write_text("no picture")
    Image.new("RGB", (8, 8)).save(place / "b.png")
    drawn = DreamBoothSettings(prior="images", class_prompt="a dog", class_images=str(place), class_count=3)
    (problem,) = dreambooth.check(drawn, data, [])
    assert problem.error and problem.key == str(place / "a.png") and "is no picture" in problem.text
    Image.new("RGB", (8, 8), "red").save(place / "a.png")
    assert dreambooth.check(drawn, data, []) == []
    own = DreamBoothSettings(prior="images", class_images=str(place))
    (problem,) = dreambooth.check(own, data, [])
    assert problem.error and "0 captions" in problem.text and "Or set class_prompt" in problem.text
    (place / "a.txt").write_text("a dog")
    (problem,) = dreambooth.check(own, data, [])
    assert problem.key == str(place / "b.png") and "has no caption" in problem.text
    (place / "b.txt").write_text("a dog")
    assert dreambooth.check(own, data, []) == []


def test_the_subject_is_not_its_own_class(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "inside").mkdir()
    options = DreamBoothSettings(prior="images", class_prompt="a dog", class_images=f"{tmp_path}/inside/..")
    (problem,) = dreambooth.check(options, DataSettings(images=tmp_path), [])  # type: ignore[arg-type]
    assert problem.error and "is data.images too" in problem.text


def test_buckets_and_class_pictures_are_refused_together() -> None:
    options = DreamBoothSettings(prior="images", class_prompt="a dog")
    (problem,) = dreambooth.check(options, DataSettings(images="p", buckets=True), [])
    assert problem.error and 'prior = "prediction"' in problem.text


def test_a_plan_that_is_only_looked_at_draws_nothing() -> None:
    plan, _ = make_plan(SETTINGS, method="dreambooth", options={"prior": "images", **CLASS}, draw=None)
    assert "class pictures" not in plan.facts and plan.facts["prior"] == "images"
