"""The text encoder beside the denoiser: its own rank and rate, its rest, and embeddings that are never stale."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from scumble.adapters.lora import LoraSettings
from scumble.data.loader import Loader
from scumble.data.record import Batch, Batches
from scumble.data.sources import open_dataset
from scumble.errors import ConfigError
from scumble.methods.method import METHODS, Ingredients
from scumble.models import FAMILIES
from scumble.rng import Streams
from scumble.training.loop import train
from scumble.training.objective import DenoisingObjective
from scumble.training.plan import Plan, Stretch
from scumble.training.proofs import digest
from scumble.training.settings import TrainSettings
from tests.data.fakes import folder
from tests.data.fakes import settings as settings_of
from tests.training.world import Listener, bytes_of, make_plan

SETTINGS = TrainSettings.model_validate(
    {"steps": 4, "batch": 2, "accumulate": 2, "checkpoint_every": 0, "optimizer": {"learning_rate": 1e-2}}
)
TEXT = {"train_text_encoder": True}


def digests(plan: Plan, name: str) -> list[str]:
    (group,) = (each for each in plan.phases[0].trainables if each.name == name)
    return [digest(parameter) for parameter in group.parameters.values()]


@pytest.mark.parametrize("method", ["text-to-image", "dreambooth"])
def test_it_has_its_own_rank_and_rate(method: str) -> None:
    options = {**TEXT, "text_encoder_rank": 3, "text_encoder_learning_rate": 1e-5}
    plan, base = make_plan(SETTINGS, method=method, options=options)
    groups = {each.name: each for each in plan.phases[0].trainables}
    assert {name: each.learning_rate for name, each in groups.items()} == {"unet": None, "text_encoder": 1e-5}
    ranks = {path.split(".")[0]: layer.rank for path, layer in plan.export().layers.items()}
    assert ranks == {"unet": 2, "text_encoder": 3}
    asked = {id(p) for root in base.roots.values() for p in root.parameters() if p.requires_grad}
    assert asked == {id(p) for each in groups.values() for p in each.parameters.values()}


def test_a_rank_by_layer_goes_before_the_text_encoders_own() -> None:
    adapter = LoraSettings(rank=2, rank_pattern={"text_encoder.*.q_proj": 5})
    plan, _ = make_plan(SETTINGS, adapter=adapter, options={**TEXT, "text_encoder_rank": 3})
    ranks = {
        path.split(".")[-1]: layer.rank for path, layer in plan.export().layers.items() if "text" in path
    }
    assert ranks == {"q_proj": 5, "k_proj": 3, "v_proj": 3, "out_proj": 3}


def test_it_may_train_alone() -> None:
    plan, _ = make_plan(SETTINGS, targets=("text_encoder.attention",), options={"text_encoder_rank": 3})
    assert [each.name for each in plan.phases[0].trainables] == ["text_encoder"]


@pytest.mark.parametrize(
    "option", [{"text_encoder_rank": 3}, {"text_encoder_learning_rate": 1e-4}, {"text_encoder_until": 0.5}]
)
def test_an_option_without_a_text_encoder_is_refused(option: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(option))} = .* no effect.*train_text_encoder"):
        make_plan(SETTINGS, options=option)


def test_nothing_left_to_train_is_refused() -> None:
    with pytest.raises(ConfigError, match="nothing to train after it"):
        make_plan(SETTINGS, targets=("text_encoder.attention",), options={"text_encoder_until": 0.5})


def test_at_rest_it_stays_bit_for_bit_and_its_words_are_read_anew(tmp_path: Path) -> None:
    """While it trains, batches carry words; then embeddings by what it has become, never those of before."""
    plan, base = make_plan(
        SETTINGS, options={**TEXT, "text_encoder_until": 0.5}, adapter=LoraSettings(rank=2, dropout=0.3)
    )
    first, second = plan.phases
    assert (first.steps, second.steps) == (2, 2)
    assert (first.stretch, second.stretch) == (Stretch(0, 4), Stretch(2, 4))
    assert [each.name for each in second.trainables] == ["unet"]
    fresh = digests(plan, "text_encoder")
    seen: list[list[str]] = []

    class Watch(Listener):
        def handle(self, event: Any) -> None:
            if type(event).__name__ == "StepDone":
                seen.append(digests(plan, "text_encoder"))

    listener = Watch()
    train(plan, tmp_path, SETTINGS, [listener], Streams(SETTINGS.seed))
    assert fresh != seen[0] != seen[1] and seen[1] == seen[2] == seen[3]
    while_training, at_rest = next(first.batches.start(4)), next(second.batches.start(0))
    assert while_training.conditioning is None and at_rest.conditioning is not None
    assert while_training.positions == at_rest.positions, "the order goes on where it was"
    with torch.no_grad():
        now = base.encode_prompts(at_rest.captions).tokens
        before = FAMILIES.get("sd1").tiny(0).encode_prompts(at_rest.captions).tokens
    torch.testing.assert_close(at_rest.conditioning.tokens, now)
    assert (at_rest.conditioning.tokens - before).abs().max() > 1e-3


class Later:
    """Batches from the `first`-th on."""

    def __init__(self, batches: Batches, first: int) -> None:
        self.batches, self.first = batches, first
        self.batch_size, self.samples, self.fingerprint = 2, batches.samples, batches.fingerprint

    def start(self, number: int, **where: int) -> Any:
        return self.batches.start(number + self.first, **where)


@pytest.mark.parametrize("optimizer", [{"learning_rate": 1e-2}, {"name": "prodigy", "learning_rate": 1.0}])
def test_stretches_of_a_course_equal_the_whole(tmp_path: Path, optimizer: dict[str, Any]) -> None:
    """Schedule and optimizer go on: cut after 3 of 6 steps, also when stopped there and resumed, nothing differs."""
    settings = TrainSettings.model_validate(
        {
            "steps": 6,
            "batch": 2,
            "checkpoint_every": 3,
            "optimizer": optimizer,
            "schedule": {"name": "cosine", "warmup_steps": 2},
        }
    )

    def cut() -> Plan:
        plan, _ = make_plan(settings)
        (whole,) = plan.phases
        one = replace(whole, steps=3, stretch=Stretch(0, 6))
        two = replace(whole, name="rest", steps=3, stretch=Stretch(3, 6), batches=Later(whole.batches, 3))
        return replace(plan, phases=(one, two))

    plan, _ = make_plan(settings)
    straight = train(plan, tmp_path / "whole", settings, [], Streams(0))
    parts = train(cut(), tmp_path / "parts", settings, [], Streams(0))
    import safetensors.torch

    mine, theirs = (safetensors.torch.load(bytes_of(result.adapter)) for result in (parts, straight))
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs) and mine.keys() == theirs.keys()
    again = train(
        cut(), tmp_path / "parts", settings, [], Streams(0), resume=tmp_path / "parts" / "checkpoint-000003"
    )
    assert safetensors.torch.load(bytes_of(again.adapter)).keys() == mine.keys()
    resumed = safetensors.torch.load(bytes_of(again.adapter))
    assert all(torch.equal(resumed[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("method", ["text-to-image", "dreambooth"])
def test_a_run_is_never_given_embeddings_of_another_text_encoder(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In every step, whatever lies in the cache: words while it trains, then what a fresh reading gives, and the same
    gradient."""
    base = FAMILIES.get("sd1").tiny(0)
    data = settings_of(folder(tmp_path / "p", ((16, 16),) * 3), cache=tmp_path / "cache", resolution=16)
    Loader(
        open_dataset(data), base, data, batch_size=2, seed=0
    ).prepare()  # those of the bare base are there to mislead
    bare = base.encode_prompts([record.captions[0] for record in open_dataset(data).records]).tokens
    told = METHODS.get(method)
    plan = told.plan(
        Ingredients(
            base=base,
            fresh=lambda: FAMILIES.get("sd1").tiny(0),
            adapter=LoraSettings(rank=2),
            targets="attention",
            batches=Loader(open_dataset(data), base, data, batch_size=2, seed=0, text_embeddings=False),
            train=SETTINGS,
            options=told.settings(**TEXT, text_encoder_until=0.5),
            data=data,
        )
    )
    given: list[Batch] = []
    fresh: list[torch.Tensor] = []
    real = DenoisingObjective.forward

    def watched(self: DenoisingObjective, batch: Batch) -> torch.Tensor:
        given.append(batch)
        with torch.no_grad():
            fresh.append(self.base.encode_prompts(batch.captions).tokens)
        return real(self, batch)

    monkeypatch.setattr(DenoisingObjective, "forward", watched)
    train(plan, tmp_path / "run", SETTINGS, [], Streams(SETTINGS.seed))
    monkeypatch.undo()
    kept = [batch.conditioning for batch in given]
    assert kept[:4] == [None] * 4 and None not in kept[4:] and len(kept) == 8
    for conditioning, now in list(zip(kept, fresh, strict=True))[4:]:
        assert conditioning is not None
        torch.testing.assert_close(conditioning.tokens, now, atol=1e-6, rtol=1e-6)
        assert min((row - other).abs().max() for row in now for other in bare) > 1e-3

    def gradients(batch: Batch) -> list[torch.Tensor]:
        (group,) = plan.phases[1].trainables
        plan.phases[1].objective(batch).mean().backward()
        found = [
            parameter.grad.clone() for parameter in group.parameters.values() if parameter.grad is not None
        ]
        for root in base.roots.values():
            root.zero_grad(set_to_none=True)
        return found

    one, other = gradients(given[-1]), gradients(replace(given[-1], conditioning=None))
    assert one and any(grad.abs().max() > 0 for grad in one)
    for mine, theirs in zip(one, other, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-4)


def test_loaders_embed_with_the_text_encoder_as_it_is(tmp_path: Path) -> None:
    """A cache on disk knows an embedding by the weights it was made with, adapters included."""
    from scumble.adapters.adapter import Adapter

    base = FAMILIES.get("sd1").tiny(0)
    data = settings_of(folder(tmp_path / "p", ((16, 16),) * 2), cache=tmp_path / "cache", resolution=16)
    plain = Loader(open_dataset(data), base, data, batch_size=2, seed=0)
    before = next(plain.start(0)).conditioning
    words = Loader(open_dataset(data), base, data, batch_size=2, seed=0, text_embeddings=False)
    assert next(words.start(0)).conditioning is None and words.needs_text_encoder
    adapter = Adapter.inject(base.roots, "text_encoder.attention", LoraSettings(rank=2))
    for parameter in adapter.parameters():
        parameter.data += 0.1
    batch = next(islice(words.with_text_embeddings().start(0), 1))
    after = batch.conditioning
    assert before is not None and after is not None and not torch.allclose(before.tokens, after.tokens)
    with torch.no_grad():
        assert torch.equal(after.tokens[:1], base.encode_prompts(batch.captions[:1]).tokens)
    adapter.eject()
    again = words.with_text_embeddings()
    found = next(again.start(0)).conditioning
    assert found is not None and torch.equal(found.tokens, before.tokens)
