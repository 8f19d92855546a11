"""The model card: front matter that the Hub accepts, measured results, a snippet that is valid Python."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import yaml

from scumble.runs.card import CardFacts, hub_id, unedited, write_card
from scumble.training.events import HeldOut, Panel
from tests.runs.hub_server import front_matter_problems


def front_matter(card: str) -> dict[str, object]:
    found = re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)
    assert found
    return yaml.safe_load(found[1])


def snippet(card: str) -> str:
    found = re.search(r"```python\n(.*?)```", card, re.DOTALL)
    assert found
    return found[1]


def full(folder: Path, **changes: object) -> CardFacts:
    values = {
        "name": "painter/fox",
        "base": "owner/base",
        "dataset": "owner/pictures",
        "pictures": 40,
        "prompt": 'a "woodcut" of: a fox | #1',
        "panels": (
            Panel("a red fox: at night", 7, folder / "previews/b.png", folder / "previews/a.png", 12.5),
        ),
        "held_out": HeldOut(500, 0.12345, 0.2, 0.01, True),
        "steps": 500,
        "seconds": 125.4,
        "loss": 0.111,
        "facts": {"layers": 128, "parameters": 797184},
        "settings": 'base = "owner/base"\n',
        "folder": folder,
    }
    return CardFacts(**{**values, **changes})  # type: ignore[arg-type]


def test_everything_known_is_said(tmp_path: Path) -> None:
    card = write_card(full(tmp_path))
    data = front_matter(card)
    assert data["base_model"] == "owner/base"
    assert data["datasets"] == ["owner/pictures"]
    assert {"lora", "text-to-image", "diffusers"} <= set(data["tags"])  # type: ignore[call-overload]
    assert data["instance_prompt"] == 'a "woodcut" of: a fox | #1'
    assert data["widget"] == [{"text": "a red fox: at night", "output": {"url": "previews/a.png"}}]
    assert "license" not in data, "a license is the author's choice"
    assert front_matter_problems(card) == []
    for wanted in (
        "40 pictures of [owner/pictures]",
        "![base](previews/b.png)",
        "![with this LoRA](previews/a.png)",
        "| optimizer steps | 500 |",
        "2 min 5 s",
        "0.1235",
        "-0.0766 ± 0.0100",
        "| layers | 128 |",
        'base = "owner/base"',
    ):
        assert wanted in card, wanted
    code = snippet(card)
    ast.parse(code)
    assert 'load_lora_weights("painter/fox", weight_name="pytorch_lora_weights.safetensors")' in code


def test_what_is_not_known_is_left_out() -> None:
    card = write_card(CardFacts(name="fox", base="owner/base"))
    for absent in ("Measured", "Pictures", "Settings", "widget", "instance_prompt", "datasets", "None"):
        assert absent not in card
    assert front_matter_problems(card) == []
    ast.parse(snippet(card))


def test_new_words_are_told_with_how_to_load_them(tmp_path: Path) -> None:
    alone = write_card(
        full(tmp_path, words=("<fox>",), changes_layers=False, file="learned_embeds.safetensors")
    )
    assert "The new word `<fox>` for" in alone and "textual_inversion" in front_matter(alone)["tags"]  # type: ignore[operator]
    assert "lora" not in front_matter(alone)["tags"]  # type: ignore[operator]
    code = snippet(alone)
    ast.parse(code)
    assert 'load_textual_inversion("painter/fox", weight_name="learned_embeds.safetensors")' in code
    assert "load_lora_weights" not in alone and "models/embeddings/" in alone
    both = write_card(full(tmp_path, words=("<fox>",), word_files=("learned_embeds.safetensors",)))
    assert "load_lora_weights" in snippet(both) and "load_textual_inversion" in snippet(both)
    several = snippet(write_card(full(tmp_path, words=("<fox>",), word_encoders=2)))
    ast.parse(several)
    assert "scumble.load_adapter(pipeline" in several and "import scumble" in several
    assert "load_textual_inversion" not in several and "load_lora_weights" not in several


def test_a_scale_that_comfyui_does_not_read_is_told(tmp_path: Path) -> None:
    assert "*Load LoRA*, strength 1." in write_card(full(tmp_path))
    assert "*Load LoRA*, strength 0.5 (alpha / rank" in write_card(full(tmp_path, scale=0.5))


def test_an_edited_card_is_told_from_ours(tmp_path: Path) -> None:
    card = write_card(full(tmp_path))
    assert unedited(card) and unedited(card.replace("\n", "\r\n"))
    assert not unedited(card.replace("# painter/fox", "# Fox"))
    assert (
        not unedited(card.replace("---\n", "---\nlicense: mit\n", 1))
        and not unedited("")
        and not unedited("# x")
    )


def test_an_interrupted_run_says_so(tmp_path: Path) -> None:
    card = write_card(full(tmp_path, steps=200, planned=500, subfolder="checkpoint-000200"))
    assert "interrupted after 200 of 500 steps" in card
    assert 'subfolder="checkpoint-000200"' in snippet(card)
    assert "checkpoint-000200/pytorch_lora_weights.safetensors" in card


def test_a_local_base_is_no_base_model(tmp_path: Path) -> None:
    (tmp_path / "owner").mkdir()
    for base in (str(tmp_path), "./x/y", "picturebook", "models/v1.safetensors", str(tmp_path / "owner")):
        card = write_card(full(tmp_path, base=base, dataset=str(tmp_path)))
        data = front_matter(card)
        assert "base_model" not in data and "datasets" not in data
        assert f"`{base}`" in card
        assert front_matter_problems(card) == []
        ast.parse(snippet(card))
    assert "scumble.picturebook.path()" in snippet(write_card(full(tmp_path, base="picturebook")))


def test_a_path_is_not_taken_for_a_hub_id(tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.chdir(tmp_path)
    assert hub_id("owner/base")
    (tmp_path / "owner" / "base").mkdir(parents=True)
    assert not hub_id("owner/base"), "a folder of that name is there"
