"""Pivotal tuning: the words first, the adapter around them, each at its own rate, and one file with both."""

from __future__ import annotations

import shutil
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from scumble.adapters import Adapter, base_state
from scumble.adapters.layers import layers_of
from scumble.data.settings import DataSettings
from scumble.errors import ConfigError, NothingTrained
from scumble.formats import read
from scumble.methods.method import METHODS
from scumble.methods.pivotal import Later, PivotalSettings, pivotal
from scumble.methods.prior_prediction import PriorPrediction
from scumble.models import FAMILIES
from scumble.models.family import BaseModel
from scumble.rng import Streams
from scumble.training.events import StepDone
from scumble.training.loop import train
from scumble.training.objective import DenoisingObjective
from scumble.training.plan import Plan
from scumble.training.proofs import digest, digests
from scumble.training.settings import TrainSettings
from tests.methods.words_world import WordBatches, words_plan
from tests.training.world import Listener

SETTINGS = TrainSettings(steps=6, batch=2, checkpoint_every=0, optimizer={"learning_rate": 1e-3})  # type: ignore[arg-type]


class Watch(Listener):
    """Keeps the digests of everything that trains, after each step, and what took gradients."""

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.plan, self.seen, self.woken = plan, [], []

    def handle(self, event: Any) -> None:
        super().handle(event)
        if isinstance(event, StepDone):
            self.seen.append({f"{t}/{n}": digest(p) for t, n, p in parts(self.plan)})
            self.woken.append({t for t, _, p in parts(self.plan) if p.requires_grad})


def parts(plan: Plan) -> list[tuple[str, str, torch.nn.Parameter]]:
    found = {
        (t.name, n): p for phase in plan.phases for t in phase.trainables for n, p in t.parameters.items()
    }
    return [(trainable, name, parameter) for (trainable, name), parameter in found.items()]


def run(folder: Path, train_settings: TrainSettings = SETTINGS, **options: Any) -> tuple[Watch, Any, Any]:
    plan, base = words_plan("pivotal", train_settings, **options)
    watch = Watch(plan)
    result = train(plan, folder, train_settings, [watch], Streams(0))
    return watch, result, base


def test_it_is_found_by_name() -> None:
    assert METHODS.get("pivotal") is pivotal


def test_each_phase_moves_its_own_and_nothing_else(tmp_path: Path) -> None:
    watch, result, base = run(tmp_path, inversion_steps=3, norm_pull=0.0)
    untouched = FAMILIES.get("sd1").tiny(0)
    for name, root in base.roots.items():
        assert digests(base_state(root)) == digests(base_state(untouched.roots[name]))
    words = [state["tokens/text_encoder.<fox>"] for state in watch.seen]
    layers = [{n: d for n, d in state.items() if n.startswith("unet/")} for state in watch.seen]
    assert len(set(words[:3])) == 3 and len(set(words[2:])) == 1, "the pivot stays"
    assert layers[0] == layers[2] and all(layers[2][n] != layers[5][n] for n in layers[0] if n.endswith("up"))
    assert watch.woken == [{"tokens"}] * 3 + [{"unet"}] * 3, "no work is done for what rests"
    rates = [event.learning_rates for event in watch.all(StepDone)]
    assert rates == [{"tokens": 1e-3}] * 3 + [{"unet": 1e-3}] * 3
    assert result.difference == 0.0 and all(p.requires_grad for _, _, p in parts(watch.plan))


def test_joint_trains_the_words_on_at_their_own_rate(tmp_path: Path) -> None:
    watch, _, _ = run(
        tmp_path,
        inversion_steps=2,
        joint=True,
        token_learning_rate=2e-4,
        train_text_encoder=True,
        text_encoder_learning_rate=3e-4,
        inversion_optimizer={"learning_rate": 1e-2},
        inversion_schedule={"name": "linear"},
    )
    rates = [event.learning_rates for event in watch.all(StepDone)]
    assert rates[:2] == [{"tokens": 1e-2}, {"tokens": 5e-3}]
    assert rates[2:] == [{"unet": 1e-3, "text_encoder": 3e-4, "tokens": 2e-4}] * 4
    assert len({state["tokens/text_encoder.<fox>"] for state in watch.seen}) == 6


def test_joint_from_the_start_is_one_phase() -> None:
    plan, _ = words_plan("pivotal", SETTINGS, inversion_steps=0, joint=True)
    (phase,) = plan.phases
    assert (phase.name, phase.steps) == ("tuning", 6)
    assert {t.name: t.learning_rate for t in phase.trainables} == {"unet": None, "tokens": 1e-4}


def test_the_text_encoder_may_come_to_rest() -> None:
    plan, _ = words_plan(
        "pivotal", SETTINGS, inversion_steps=2, train_text_encoder=True, text_encoder_until=0.5
    )
    assert [(p.name, p.steps, sorted(t.name for t in p.trainables)) for p in plan.phases] == [
        ("inversion", 2, ["tokens"]),
        ("tuning", 2, ["text_encoder", "unet"]),
        ("tuning, text encoder at rest", 2, ["unet"]),
    ]


def test_the_class_is_kept_while_the_adapter_is_tuned(tmp_path: Path) -> None:
    plan, _ = words_plan(
        "pivotal", SETTINGS, inversion_steps=2, prior="prediction", class_prompt="a dog", prior_weight=0.5
    )
    inversion, tuning = (phase.objective for phase in plan.phases)
    assert type(inversion) is DenoisingObjective, "words alone can't change what the base says of others"
    assert isinstance(tuning, PriorPrediction) and plan.facts["prior"] == "prediction"
    batch = next(iter(plan.phases[1].batches.start(0)))
    with torch.no_grad():
        before = tuning(batch)
        assert torch.equal(before, DenoisingObjective.measured(tuning, tuning.drawn(batch))), "still the base"
        for parameter in plan.phases[1].trainables[0].parameters.values():
            parameter += 0.1
        alone = DenoisingObjective.measured(tuning, tuning.drawn(batch))
        kept = (tuning(batch) - alone) / 0.5
    assert (kept > 0).all(), "what moved the class counts"


def test_class_pictures_join_the_tuning_alone() -> None:
    class Dogs(WordBatches):
        def __init__(self, base: BaseModel) -> None:
            super().__init__(base, 2, 3, seed=5)
            self.captions = ["a dog"] * 3

    dogs: list[Dogs] = []

    def open_batches(data: DataSettings, *, batch_size: int, text_embeddings: bool) -> Dogs:
        assert (data.caption, batch_size, text_embeddings) == ("a dog", 2, False)
        dogs.append(Dogs(FAMILIES.get("sd1").tiny(0)))
        return dogs[-1]

    plan, _ = words_plan(
        "pivotal",
        SETTINGS,
        ingredients={
            "data": DataSettings(images="pictures"),
            "open_batches": open_batches,
            "draw": lambda prompt, count, **_: Path("drawn"),
        },
        inversion_steps=2,
        joint=True,
        prior="images",
        class_prompt="a dog",
    )
    first, second = (next(iter(phase.batches.start(0))) for phase in plan.phases)
    assert "a dog" not in first.captions and plan.facts["class pictures"] == 3
    assert second.captions[1::2] == ("a dog", "a dog") and "<fox>" in second.captions[0]
    theirs = next(iter(Later(dogs[0], 2).start(0))).positions
    assert second.positions[1::2] == tuple(2 * position + 1 for position in theirs), "and goes on as they do"


def test_a_class_that_is_the_subject_is_refused() -> None:
    options = PivotalSettings(
        placeholders=("<fox>",), inversion_steps=2, prior="prediction", class_prompt="a <fox> dog"
    )
    (problem,) = [one for one in pivotal.check(options, None, []) if one.kind == "class prompt"]
    assert "'<fox>'" in problem.text and problem.error


def test_one_file_holds_both_and_acts_in_a_fresh_base(tmp_path: Path) -> None:
    watch, result, base = run(tmp_path, inversion_steps=3, train_text_encoder=True, vectors=2)
    fresh = FAMILIES.get("sd1").tiny(0)
    state = read(result.adapter, layers_of(fresh.roots)).state
    assert state.equal(watch.plan.export()) and set(state.tokens) == {"<fox>"}
    latents, t = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([300])
    with torch.no_grad(), Adapter.load(fresh.roots, state, vocabularies=fresh.vocabularies):
        answers = [
            one.denoise(latents, t, one.encode_prompts(["a <fox>"]), None)  # type: ignore[arg-type]
            for one in (base, fresh)
        ]
    assert torch.equal(*answers)


def test_the_tuning_goes_on_in_the_order_of_pictures() -> None:
    plan, base = words_plan("pivotal", SETTINGS, inversion_steps=2)
    straight = [batch.positions for batch in islice(WordBatches(base, 2).start(0), 6)]
    first, second = plan.phases
    seen = [batch.positions for batch in islice(first.batches.start(0), 2)]
    seen += [batch.positions for batch in islice(second.batches.start(0), 4)]
    assert seen == straight and first.batches.fingerprint == second.batches.fingerprint


def test_a_resting_text_is_embedded_once_with_the_word_as_it_became() -> None:
    plan, base = words_plan("pivotal", SETTINGS, inversion_steps=2)
    first, second = plan.phases
    assert next(first.batches.start(0)).conditioning is None
    for parameter in first.trainables[0].parameters.values():
        parameter.data += 0.5
    batch = next(second.batches.start(0))
    assert batch.conditioning is not None
    with torch.no_grad():
        assert torch.equal(batch.conditioning.tokens, base.encode_prompts(batch.captions).tokens)
    joint, _ = words_plan("pivotal", SETTINGS, inversion_steps=2, joint=True)
    assert next(joint.phases[1].batches.start(0)).conditioning is None


def test_later_batches_keep_the_law_of_batches() -> None:
    base = FAMILIES.get("sd1").tiny(0)
    plain, later = WordBatches(base, 2), Later(WordBatches(base, 2), 3)
    assert [b.positions for b in islice(later.start(1), 3)] == [
        b.positions for b in islice(plain.start(4), 3)
    ]


@pytest.mark.parametrize("joint", [False, True])
def test_a_run_goes_on_bit_exactly_within_and_between_its_phases(joint: bool, tmp_path: Path) -> None:
    settings = SETTINGS.model_copy(update={"checkpoint_every": 1})

    def plan() -> Plan:
        rates = {"token_learning_rate": 1e-3} if joint else {}
        return words_plan("pivotal", settings, inversion_steps=3, joint=joint, vectors=2, **rates)[0]

    straight = train(plan(), tmp_path / "straight", settings, [], Streams(0))
    assert straight.adapter is not None
    for step in (2, 3, 5):  # within the inversion, between the phases, within the tuning
        folder = tmp_path / f"from {step}"
        name = f"checkpoint-{step:06d}"
        shutil.copytree(tmp_path / "straight" / name, folder / name)
        again = train(plan(), folder, settings, [], Streams(0), resume="latest")
        assert again.adapter is not None and again.adapter.read_bytes() == straight.adapter.read_bytes()


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"inversion_steps": 0}, "would never train the words"),
        ({"inversion_steps": 2, "token_learning_rate": 1e-3}, "no effect with joint = false"),
        ({"inversion_steps": 2, "joint": True, "text_encoder_until": 0.5}, "text_encoder_until = 0.5 ends"),
        ({"inversion_steps": 0, "joint": True, "inversion_schedule": {"name": "linear"}}, "no effect with"),
        ({}, "inversion_steps"),
    ],
)
def test_settings_that_make_no_sense_are_refused(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        PivotalSettings.model_validate({"placeholders": "<fox>", **values})


def test_no_step_for_the_adapter_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"inversion_steps = 6 leaves none of the 6 steps"):
        words_plan("pivotal", SETTINGS, inversion_steps=6)


def test_some_options_keep_the_others_defaults() -> None:
    found = PivotalSettings.model_validate(
        {"placeholders": "<fox>", "inversion_steps": 1, "inversion_optimizer": {"weight_decay": 0.1}}
    )
    assert found.inversion_optimizer.learning_rate == 1e-3


def test_words_that_no_caption_says_never_train(tmp_path: Path) -> None:
    plan, _ = words_plan("pivotal", SETTINGS, inversion_steps=3, word="<fox>", placeholders=("<cat>",))
    with pytest.raises(NothingTrained, match=r"tokens/text_encoder\.<cat>"):
        train(plan, tmp_path, SETTINGS, [Listener()], Streams(0))
