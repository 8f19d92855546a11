"""The whole path on a tiny base: what is drawn, what is written, what is recommended, what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from scumble.adapters.state import AdapterState, TokenState
from scumble.errors import ConfigError, FormatError
from scumble.evaluation.asks import Ask
from scumble.evaluation.concept import Concept
from scumble.evaluation.evaluate import (
    evaluate,
    find_candidates,
    find_concept,
    find_eye,
    recommend,
)
from scumble.evaluation.eyes import Values
from scumble.evaluation.measure import Scores
from scumble.evaluation.result import Candidate, EvaluationSettings, Judged
from scumble.formats import write
from scumble.models.tiny import save
from scumble.runs.load import load
from scumble.runs.toml import dump
from scumble.training.state import ADAPTER
from tests.inference.makers import adapter_file

FEW = EvaluationSettings(pictures=4, seeds=2, unrelated=2, steps=1, resamples=100)


class BrightEye:
    """Likes bright pictures: a judge that sees every difference between two pictures."""

    name = "brightness"
    shares = True

    def learned(self, pictures: Sequence[Image.Image], concept: Concept) -> Mapping[str, Values]:
        return {"bright": np.array([np.asarray(picture).mean() / 255 for picture in pictures])}

    def obeys(self, pictures: Sequence[Image.Image], asks: Sequence[Ask]) -> Mapping[str, Values]:
        return {"drawn": np.ones(len(pictures))}

    def likeness(self, pictures: Sequence[Image.Image], others: Sequence[Image.Image]) -> Values | None:
        return None


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny base, two captioned pictures, and the folder of a run with two checkpoints."""
    folder = tmp_path_factory.mktemp("world")
    save("sd1", folder / "base")
    (folder / "pictures").mkdir()
    for number, words in enumerate(("a sks dog in snow", "the sks dog at night")):
        Image.new("RGB", (20, 16), (90 * number, 60, 200)).save(folder / f"pictures/{number}.png")
        (folder / f"pictures/{number}.txt").write_text(words)
    run = folder / "run"
    config = load(
        None, (), base=str(folder / "base"), data={"images": str(folder / "pictures")}, output=str(run)
    )
    for step in (2, 4):
        adapter_file(run / f"checkpoint-{step:06d}" / ADAPTER, seed=step, base_name=str(folder / "base"))
    shutil.copy(run / "checkpoint-000004" / ADAPTER, run / "pytorch_lora_weights.safetensors")
    (run / "run.toml").write_text(dump(config))
    return folder


def test_every_checkpoint_is_judged_and_one_recommended(world: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(world / "run", run)
    told: list[tuple[int, int, str]] = []
    found = evaluate(
        run,
        checkpoints=True,
        settings=FEW,
        eye=BrightEye(),
        device="cpu",
        progress=lambda *news: told.append(news),
    )
    assert [one.candidate.label for one in found.judged] == ["step 2", "step 4"]
    assert (
        found.concept.phrase == "sks dog"
        and found.concept.class_phrase == "dog"
        and len(found.concept.pictures) == 2
    )
    # subject 2 prompts x 2 seeds, class 4, unrelated 2; base and two checkpoints
    assert told[-1][:2] == (30, 30) and [done for done, _, _ in told] == list(range(1, 31))
    numbers = json.loads((run / "evaluation" / "evaluation.json").read_text())
    assert numbers["recommended"] == found.recommended.candidate.label if found.recommended else False
    sections = {m["section"] for m in numbers["adapters"][0]["measures"]}
    assert sections == {"learned", "obeys", "broke", "copied"}
    overall = [adapter["overall"] for adapter in numbers["adapters"]]
    assert numbers["recommended"] == f"step {(2, 4)[int(np.argmax(overall))]}" and overall[0] != overall[1]
    card = json.loads((run / "evaluation.json").read_text())
    assert set(card) == {"learned", "obeys", "broke", "copied"} and "low" in card["learned"]["bright"]
    page = (run / "evaluation" / "evaluation.html").read_text()
    assert (
        'src="data:image/png' in page
        and 'src="pictures' not in page
        and "http" not in page.replace("http-equiv", "")
    )
    for word in (
        "Checkpoints",
        "recommended",
        "Nearest training pictures",
        "a dog",
        "a sks dog in deep snow",
    ):
        assert word in page, word
    again = evaluate(run, checkpoints=True, settings=FEW, eye=BrightEye(), device="cpu")
    assert json.loads(again.numbers.read_text()) == numbers


def test_a_file_alone_is_judged_beside_itself(world: Path, tmp_path: Path) -> None:
    file = adapter_file(tmp_path / "fox.safetensors", base_name=str(world / "base"))
    found = evaluate(file, subject="fox", class_phrase="", settings=FEW, eye=BrightEye(), device="cpu")
    assert found.folder == tmp_path / "fox-evaluation" and found.recommended is None
    (one,) = found.judged
    assert (
        one.scores.learned is None and one.scores.obeys == 1 and set(found.asks) == {"subject", "unrelated"}
    )
    assert any("--images" in note for note in found.notes)
    drift = next(m for m in one.scores.measures if m.name == "drift")
    assert drift.adapter.value > 0, "the adapter shows in unrelated pictures"


@pytest.mark.parametrize("there", [True, False])
def test_a_file_alone_is_judged_by_the_settings_that_it_carries(
    world: Path, tmp_path: Path, there: bool
) -> None:
    """Also where its pictures are on another machine."""
    pictures = world / "pictures" if there else tmp_path / "elsewhere"
    config = load(
        None, (), base=str(world / "base"), data={"images": str(pictures)}, output=str(tmp_path / "run")
    )
    settings = config.model_dump_json(exclude={"output"})  # as a run writes it
    file = adapter_file(tmp_path / "fox.safetensors", base_name=str(world / "base"), settings=settings)
    subject = None if there else "a sks dog"
    found = evaluate(file, subject=subject, settings=FEW, eye=BrightEye(), device="cpu")
    (one,) = found.judged
    assert found.concept.phrase.removeprefix("a ") == "sks dog"
    assert (one.scores.learned is not None) is there and len(found.concept.pictures) == 2 * there
    if not there:
        with pytest.raises(ConfigError, match="they are not here"):
            evaluate(file, settings=FEW, eye=BrightEye(), device="cpu")


def scores(learned: float | None, obeys: float | None = 1.0) -> Scores:
    return Scores([], learned, obeys, 1.0)


def test_the_earlier_of_two_equal_checkpoints_is_recommended() -> None:
    judged = [
        Judged(Candidate(Path("x"), str(n), n), scores(value), {}) for n, value in enumerate((0.2, 0.9, 0.9))
    ]
    best = recommend(judged)
    assert best is not None and best.candidate.label == "1"
    assert recommend(judged[:1]) is None
    assert recommend([Judged(Candidate(Path("x"), "a"), scores(None), {})] * 2) is None


def test_the_finished_adapter_is_not_judged_twice(world: Path) -> None:
    assert len(find_candidates(world / "run", checkpoints=True)) == 2
    (only,) = find_candidates(world / "run", checkpoints=False)
    assert only.file.name == "pytorch_lora_weights.safetensors"


def test_an_interrupted_run_has_its_last_checkpoint(world: Path, tmp_path: Path) -> None:
    shutil.copytree(world / "run", tmp_path / "run")
    (tmp_path / "run" / "pytorch_lora_weights.safetensors").unlink()
    (only,) = find_candidates(tmp_path / "run", checkpoints=False)
    assert only.step == 4


def test_a_checkpoint_can_be_named(world: Path) -> None:
    (only,) = find_candidates(world / "run" / "checkpoint-000002", checkpoints=False)
    assert only.file.parent.name == only.label == "checkpoint-000002"


def test_mistakes_are_told_before_anything_is_drawn(world: Path, tmp_path: Path) -> None:
    file = adapter_file(tmp_path / "fox.safetensors", base_name=str(world / "base"))
    with pytest.raises(ConfigError, match="--subject"):
        evaluate(file, settings=FEW)
    with pytest.raises(ConfigError, match="holds no checkpoints"):
        evaluate(file, checkpoints=True)
    with pytest.raises(FormatError, match="Name a run's folder or an adapter's file"):
        evaluate(tmp_path / "nothing")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "diary.txt").write_text("dear diary")
    with pytest.raises(ConfigError, match=r"holds other files \(diary.txt\)"):
        evaluate(file, subject="fox", settings=FEW, output=tmp_path / "mine", eye=BrightEye())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fox.safetensors", "mine"]


def test_pictures_and_words_can_be_given_instead(world: Path, tmp_path: Path) -> None:
    file = adapter_file(tmp_path / "fox.safetensors")
    concept = find_concept(None, file, "blue dog", None, world / "pictures")
    assert (
        concept.phrase == "blue dog"
        and concept.keys == ("0.png", "1.png")
        and concept.pictures[0].size == (16, 16)
    )


def test_a_file_of_one_of_two_words_is_called_by_that_word(world: Path, tmp_path: Path) -> None:
    config = load(
        None,
        (),
        base=str(world / "base"),
        method="textual-inversion",
        textual_inversion={"placeholders": ["<zz>", "<yy>"]},
        data={"images": str(world / "pictures")},
        output=str(tmp_path),
    )
    tokens = {word: TokenState({"text_encoder": torch.ones(1, 32)}) for word in ("<zz>", "<yy>")}
    both = write(AdapterState({}, tokens), tmp_path / "learned_embeds.safetensors")
    assert find_concept(config, both, None, None, None).phrase == "<zz> <yy>"
    for word, token in tokens.items():
        alone = write(AdapterState({}, {word: token}), tmp_path / "alone.safetensors")
        assert find_concept(config, alone, None, None, None).phrase == word


def test_without_clip_and_dino_it_is_said_how_to_get_them(monkeypatch: pytest.MonkeyPatch) -> None:
    notes: list[str] = []
    monkeypatch.setattr("scumble.evaluation.evaluate._cached", lambda name: False)
    assert find_eye(False, None, None, "cpu", notes) is None
    assert "hf download openai/clip" in notes[0] and "--dino" in notes[0]
    eye: Any = find_eye(True, None, None, "cpu", notes)
    assert eye.shares and len(notes) == 1
