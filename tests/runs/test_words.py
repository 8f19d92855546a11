"""Runs that teach words, whole: what is refused before a model is loaded, the files, and the examples as they stand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import scumble
from scumble.adapters.state import AdapterState, LayerState, TokenState
from scumble.errors import ConfigError, DataError
from scumble.formats import read, write
from scumble.picturebook.dataset import write_dataset
from scumble.runs.load import load
from scumble.runs.train import export_words

EXAMPLES = Path(__file__).parents[2] / "examples"
COMMON = {"base": "picturebook", "output": "never"}


def config(method: str, **settings: Any) -> Any:
    return load(None, (), (), method=method, **COMMON, **settings)


def test_words_are_needed() -> None:
    with pytest.raises(ConfigError, match=r"textual_inversion\.placeholders is not set"):
        config("textual-inversion", data={"images": "x"})


def test_an_adapter_that_would_not_train_is_refused() -> None:
    words = {"placeholders": "<fox>"}
    with pytest.raises(ConfigError, match=r"trains no layer: \[adapter\] would have no effect"):
        config("textual-inversion", textual_inversion=words, data={"images": "x"}, adapter={"rank": 8})
    assert config(
        "textual-inversion", textual_inversion=words, data={"images": "x"}
    ).options.placeholders == ("<fox>",)


def test_another_methods_options_are_refused_by_name() -> None:
    words = {"placeholders": "<fox>"}
    with pytest.raises(ConfigError, match=r'\[pivotal\] are the settings of method = "pivotal"'):
        config(
            "textual-inversion",
            textual_inversion=words,
            pivotal={**words, "inversion_steps": 2},
            data={"images": "x"},
        )
    with pytest.raises(ConfigError, match=r'\[textual_inversion\] has no setting "inversion_steps"'):
        config("textual-inversion", textual_inversion={**words, "inversion_steps": 2}, data={"images": "x"})


@pytest.fixture(scope="module")
def creature(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("words") / "pictures"
    write_dataset("zorbik", folder)
    return folder


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"placeholders": "fox"}, "'fox' is in the vocabulary already"),
        ({"placeholders": "zorbik", "initial": "a cat"}, r"is 2 tokens for this base \('a', 'cat'\)"),
        ({"placeholders": "zorbik", "vectors": 64, "learns": "captions"}, "This would be cut off"),
        ({"placeholders": "<fox>", "learns": "captions"}, "no caption contains '<fox>'"),
    ],
)
def test_what_is_wrong_with_words_is_said_before_a_model_is_loaded(
    settings: dict[str, Any], said: str, creature: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from scumble.runs import build

    def refused(*_: object, **__: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(build, "load_base", refused)
    captions = "<fox> and zorbik, zorbik" if settings.get("vectors") else None
    data = {"images": str(creature), **({"caption": captions} if captions else {})}
    with pytest.raises(DataError, match=said):
        scumble.train(
            base="picturebook",
            method="textual-inversion",
            textual_inversion=settings,
            data=data,
            output=tmp_path / "run",
            quiet=True,
        )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("example", ["textual_inversion", "pivotal"])
def test_the_example_runs_as_it_stands(example: str, creature: Path, tmp_path: Path) -> None:
    """With fewer steps. Unmodified diffusers loads the result in two files."""
    import scumble.picturebook

    less = ["train.steps=2", "train.batch=1", "preview.steps=1", "device=cpu"]
    less += ["pivotal.inversion_steps=1"] if example == "pivotal" else []
    result = scumble.train(
        EXAMPLES / f"{example}.toml",
        *less,
        f"data.images={creature}",
        f"output={tmp_path / 'run'}",
        quiet=True,
    )
    assert result.adapter is not None and result.difference is not None and result.difference < 1e-5
    words = result.folder / "learned_embeds.safetensors"
    assert (words == result.adapter) == (example == "textual_inversion")
    (name,) = read(words, []).state.tokens
    assert name == "zorbik" and read(result.adapter).state.tokens.keys() == {"zorbik"}
    assert "load_textual_inversion" in result.card.read_text()
    from diffusers import StableDiffusionPipeline

    pipeline: Any = StableDiffusionPipeline.from_pretrained(scumble.picturebook.path(), safety_checker=None)
    if example == "pivotal":
        pipeline.load_lora_weights(str(result.folder), weight_name=result.adapter.name)
    pipeline.load_textual_inversion(str(result.folder), weight_name=words.name)
    theirs, _ = pipeline.encode_prompt(["a zorbik"], "cpu", 1, False)
    from scumble.adapters import Adapter, layers_of
    from scumble.models.loading import load_base

    base = load_base("picturebook", dtype=torch.float32, device="cpu")
    state = read(result.adapter, layers_of(base.roots)).state
    with torch.no_grad(), Adapter.load(base.roots, state, vocabularies=base.vocabularies):
        ours = base.encode_prompts(["a zorbik"]).tokens
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_words_alone_say_for_how_many_text_encoders_they_are(tmp_path: Path) -> None:
    pair = {"down": torch.ones(2, 8), "up": torch.ones(4, 2)}
    words = {
        "<one>": TokenState({"text_encoder": torch.ones(1, 8)}),
        "<both>": TokenState({"text_encoder": torch.ones(1, 8), "text_encoder_2": torch.ones(1, 12)}),
    }
    layer = LayerState("lora", 2, 2.0, pair)
    path = write(
        AdapterState({"unet.mid_block.attentions.0.proj_in": layer}, words), tmp_path / "a.safetensors"
    )
    found = export_words(path)
    assert sorted(found.values()) == [1, 2]
    for file, encoders in found.items():
        (token,) = read(file).state.tokens.values()
        assert len(token.vectors) == encoders
