"""Textual inversion: only the new rows move, from where they were told to start, near the table's norm."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from scumble.adapters import Adapter, base_state
from scumble.adapters.tokens import TokenTable
from scumble.data.settings import DataSettings
from scumble.errors import AdapterError, ConfigError, TrainingError
from scumble.formats import read
from scumble.methods.method import METHODS
from scumble.methods.textual_inversion import TextualInversionSettings, textual_inversion
from scumble.methods.words import TEMPLATES
from scumble.models import FAMILIES
from scumble.models.text import Words
from scumble.models.tiny import tiny_tokenizer
from scumble.rng import Streams
from scumble.runs.build import refuse_dialect
from scumble.runs.load import load
from scumble.runs.train import export_words
from scumble.training.loop import train
from scumble.training.proofs import digests
from scumble.training.settings import TrainSettings
from tests.methods.words_world import words_plan
from tests.training.world import Listener

SETTINGS = TrainSettings(steps=3, batch=2, checkpoint_every=0, optimizer={"learning_rate": 1e-2})  # type: ignore[arg-type]


def options(**values: Any) -> TextualInversionSettings:
    return TextualInversionSettings.model_validate({"placeholders": "<fox>", **values})


def words() -> list[Words]:
    return [Words(tiny_tokenizer(), 77)]


def pictures(folder: Path, *captions: str, **values: Any) -> DataSettings:
    from PIL import Image

    for number, caption in enumerate(captions):
        Image.new("RGB", (16, 16), (40 * number, 9, 9)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(caption)
    return DataSettings(images=str(folder), **values)


def test_it_is_found_by_name() -> None:
    assert METHODS.get("textual-inversion") is textual_inversion


def test_only_the_rows_move_and_the_file_loads_in_a_fresh_base(tmp_path: Path) -> None:
    plan, base = words_plan("textual-inversion", SETTINGS, vectors=3, norm_pull=0.0)
    untouched = {name: digests(base_state(root)) for name, root in base.roots.items()}
    rows = plan.export().tokens["<fox>"].vectors["text_encoder"]
    result = train(plan, tmp_path, SETTINGS, [Listener()], Streams(0))
    assert {name: digests(base_state(root)) for name, root in base.roots.items()} == untouched
    assert result.difference == 0.0
    found = read(result.adapter, []).state  # type: ignore[arg-type]
    assert not found.layers and found.equal(plan.export())
    moved = found.tokens["<fox>"].vectors["text_encoder"]
    assert bool((moved != rows).any(1).all()), "every vector is reached"


def test_rows_start_from_words(tmp_path: Path) -> None:
    plan, base = words_plan("textual-inversion", SETTINGS, vectors=2, initial="the")
    table = FAMILIES.get("sd1").tiny(0).roots["text_encoder"].get_input_embeddings().weight  # type: ignore[operator]
    ids = tiny_tokenizer().convert_tokens_to_ids(["the</w>", "f", "o</w>"])
    start = plan.export().tokens["<fox>"].vectors["text_encoder"]
    assert torch.equal(start, table[[ids[0], ids[0]]])
    plan, base = words_plan("textual-inversion", SETTINGS, vectors=2, initial="fo")
    start = plan.export().tokens["<fox>"].vectors["text_encoder"]
    assert torch.equal(start, table[ids[1:]]), "one token for each vector"
    assert isinstance(base.roots["text_encoder"].get_input_embeddings(), TokenTable)  # type: ignore[operator]


def test_noise_has_the_tables_statistics_and_the_seeds_numbers() -> None:
    first, base = words_plan("textual-inversion", SETTINGS, vectors=64)
    second, _ = words_plan("textual-inversion", SETTINGS, vectors=64)
    other, _ = words_plan("textual-inversion", SETTINGS.model_copy(update={"seed": 1}), vectors=64)
    rows, again, else_ = (p.export().tokens["<fox>"].vectors["text_encoder"] for p in (first, second, other))
    table = base.roots["text_encoder"].get_input_embeddings().base.weight  # type: ignore[operator]
    assert torch.equal(rows, again) and not torch.equal(rows, else_)
    assert rows.norm(dim=1).mean() == pytest.approx(table.norm(dim=1).mean().item(), rel=0.1)
    assert torch.allclose(rows.mean(0), table.mean(0), atol=0.5 * table.std().item())


def test_norms_stay_near_the_tables(tmp_path: Path) -> None:
    fast = TrainSettings(steps=6, batch=2, checkpoint_every=0, optimizer={"learning_rate": 0.5})  # type: ignore[arg-type]
    norms = {}
    for name, held in (("free", {"norm_pull": 0.0}), ("held", {"norm_pull": 1.0})):
        plan, base = words_plan("textual-inversion", fast, **held)
        train(plan, tmp_path / name, fast, [Listener()], Streams(0))
        norms[name] = plan.export().tokens["<fox>"].vectors["text_encoder"].norm().item()
        mean = base.roots["text_encoder"].get_input_embeddings().base.weight.norm(dim=1).mean().item()  # type: ignore[operator]
    assert norms["held"] == pytest.approx(mean, rel=1e-4) and norms["free"] > 2 * mean


def test_the_held_out_loss_knows_the_base_without_the_word() -> None:
    plan, base = words_plan("textual-inversion", SETTINGS, held_out=True)
    assert plan.held_out is not None
    taught, bare = plan.held_out()
    fresh, base = words_plan("textual-inversion", SETTINGS, held_out=True)
    for parameter in fresh.phases[0].trainables[0].parameters.values():
        parameter.data *= -3.0
    assert fresh.held_out is not None
    moved, still = fresh.held_out()
    assert torch.equal(still, bare) and not torch.equal(moved, taught)
    assert isinstance(base.roots["text_encoder"].get_input_embeddings(), TokenTable)  # type: ignore[operator]


def test_another_file_than_what_was_trained_is_found_out() -> None:
    plan, _ = words_plan("textual-inversion", SETTINGS)
    state = plan.export()
    assert plan.verify(state) == 0.0
    for parameter in plan.phases[0].trainables[0].parameters.values():
        parameter.data *= -3.0  # adding a constant would be lost in the first layer norm
    with pytest.raises(TrainingError, match="answers otherwise"):
        plan.verify(state)


def test_general_sentences_take_the_captions_place() -> None:
    data = DataSettings(images="x")
    shaped = options(learns="style", placeholders=("<a1>", "<b2>")).shaped(data)
    assert shaped.caption == "<a1> <b2>" and shaped.templates == TEMPLATES["style"]
    assert options(learns="captions").shaped(data) is data
    written_out = DataSettings(images="x", templates=data.templates)  # as a run's own run.toml has it
    assert options(learns="style", placeholders=("<a1>", "<b2>")).shaped(written_out) == shaped
    for given in ({"caption": "a cat"}, {"templates": ("{caption}!",)}):
        with pytest.raises(ConfigError, match='or set learns = "captions"'):
            options().shaped(DataSettings(images="x", **given))  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", TEMPLATES)
def test_templates_are_many_and_apart(kind: str) -> None:
    found = TEMPLATES[kind]
    assert len(set(found)) == len(found) >= 12 and all(one.count("{caption}") == 1 for one in found)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"placeholders": ("<a>", "<a>")}, "given twice"),
        ({"placeholders": ()}, "at least 1"),
        ({"initial": ("cat", "toy")}, "initial has 2 words and placeholders has 1"),
        ({"vectors": 0}, "greater than or equal to 1"),
        ({"inversion_steps": 3}, "Extra inputs"),
    ],
)
def test_settings_that_make_no_sense_are_refused(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        options(**values)


def problems(given: TextualInversionSettings, data: DataSettings | None = None) -> str:
    return "\n".join(str(one) for one in textual_inversion.check(given, data, words()) if one.error)


def test_a_placeholder_in_the_vocabulary_is_an_error_before_a_model_is_loaded() -> None:
    assert "'the' is in the vocabulary already" in problems(options(placeholders="the"))
    with pytest.raises(AdapterError, match="in the vocabulary already"):
        words_plan("textual-inversion", SETTINGS, word="the")


def test_a_start_of_several_tokens_is_an_error_that_shows_them() -> None:
    said = problems(options(initial="frog"))
    assert "'frog', which '<fox>' should start from, is 4 tokens for this base ('f', 'r', 'o', 'g')" in said
    assert "one, or one for each of the 3 vectors" in problems(options(initial="frog", vectors=3))
    assert not problems(options(initial="frog", vectors=4))
    with pytest.raises(ConfigError, match="is 4 tokens"):
        words_plan("textual-inversion", SETTINGS, initial="frog")


def test_a_caption_that_is_too_long_with_the_words_is_an_error_that_shows_the_cut(tmp_path: Path) -> None:
    data = pictures(tmp_path, "<fox> on the a b c d e")
    given = options(vectors=64, learns="captions")
    assert not problems(options(vectors=4, learns="captions"), data)
    assert not problems(given, data)
    (tmp_path / "0.txt").write_text("<fox> and <fox> on the moon")
    said = problems(given, data)
    assert "with 64 for each new word, and the base reads 77" in said and "This would be cut off: '" in said


def test_captions_without_the_word_are_an_error_when_all_are_and_a_warning_when_some_are(
    tmp_path: Path,
) -> None:
    data = pictures(tmp_path, "a cat", "a dog")
    assert "no caption contains '<fox>'" in problems(options(learns="captions"), data)
    (tmp_path / "1.txt").write_text("a <fox>")
    (warning,) = textual_inversion.check(options(learns="captions"), data, words())
    assert not warning.error and "1 of 2 captions" in warning.text


def test_every_count_after_the_check_counts_the_vectors() -> None:
    one = words()
    textual_inversion.check(options(vectors=5), None, one)
    assert one[0].counts(["a <fox>"]) == [1 + 1 + 5 + 1]


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_several_words_are_taught_at_once(family: str, tmp_path: Path) -> None:
    plan, base = words_plan(
        "textual-inversion",
        SETTINGS,
        family=family,
        word="<a1> <b2>",
        placeholders=("<a1>", "<b2>"),
        initial=("the", "and"),
    )
    refuse_dialect(load(None, (), base="x", data={"images": "x"}, output="never"), plan)
    result = train(plan, tmp_path, SETTINGS, [Listener()], Streams(0))
    state = read(result.adapter, []).state  # type: ignore[arg-type]
    assert set(state.tokens) == {"<a1>", "<b2>"}
    alone = export_words(result.adapter)  # type: ignore[arg-type]
    assert [path.name for path in alone] == ["learned_embeds-1.safetensors", "learned_embeds-2.safetensors"]
    assert [list(read(path).state.tokens) for path in alone] == [["<a1>"], ["<b2>"]]
    fresh = FAMILIES.get(family).tiny(0)
    with Adapter.load(fresh.roots, state, vocabularies=fresh.vocabularies), torch.no_grad():
        assert torch.equal(
            fresh.encode_prompts(["<a1> <b2>"]).tokens, base.encode_prompts(["<a1> <b2>"]).tokens
        )
