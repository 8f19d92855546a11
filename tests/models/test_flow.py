"""Flow bases: T5 is loaded when a prompt is read and not before, let go of, and held where something hangs in it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import scumble
from scumble.adapters import Adapter, LoraSettings, layers_of
from scumble.adapters.state import Metadata
from scumble.cli.main import main
from scumble.data.cache import text_encoder_fingerprint
from scumble.data.loader import Loader
from scumble.data.settings import DataSettings
from scumble.data.sources import open_dataset
from scumble.errors import ModelError, NoLayerMatches
from scumble.formats import read, write
from scumble.inference.request import Request
from scumble.inference.session import Session
from scumble.models import FAMILIES, describe_base, load_base, loading
from scumble.models.flow import FlowBase
from scumble.models.tiny import save
from scumble.runs.effect import measure_effect
from tests.inference.makers import fill
from tests.runs.worlds import write_world

BASES = ("flux", "sd3")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Family -> its tiny base as a folder. Copy it to spoil it."""
    place = tmp_path_factory.mktemp("flow")
    return {family: save(family, place / family, seed=3) for family in BASES}


@pytest.fixture(params=BASES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The components that are loaded from here on."""
    found: list[str] = []
    whole = loading._load_part

    def watched(cls: Any, folder: Path, *others: Any) -> Any:
        found.append(folder.name)
        return whole(cls, folder, *others)

    monkeypatch.setattr(loading, "_load_part", watched)
    return found


def opened(folder: Path) -> tuple[FlowBase, str]:
    """A base from its folder, and what its T5 is called."""
    base = load_base(folder, device="cpu")
    assert isinstance(base, FlowBase)
    return base, base.t5_parts[0]


def test_t5_is_loaded_when_a_prompt_is_read_and_not_before(
    family: str, folders: dict[str, Path], tmp_path: Path, asked: list[str]
) -> None:
    Image.new("RGB", (16, 16), "red").save(tmp_path / "0.png")
    data = DataSettings(images=str(tmp_path), caption="a fox", resolution=16, cache=str(tmp_path / "cache"))
    shown = []
    for expected in (1, 0):
        asked.clear()
        loaded, t5 = opened(folders[family])
        assert (
            t5 not in asked and "text_encoder" in asked and describe_base(folders[family]).deferred == (t5,)
        )
        loader = Loader(open_dataset(data), loaded, data, batch_size=1, seed=0)
        loader.prepare()
        shown.append(next(loader.start(0)).conditioning)
        assert asked.count(t5) == expected
    assert all(one is not None for one in shown)
    assert torch.equal(shown[0].tokens, shown[1].tokens)  # type: ignore[union-attr]
    told, read_by_t5 = FAMILIES.get(family).tiny(3).encode_prompts(["a fox"]), loaded.t5_window
    assert torch.equal(shown[1].tokens, told.tokens)  # type: ignore[union-attr]
    # a proof needs none: zeros are in its place, in both models
    with loaded.sparing():
        said = loaded.encode_prompts(["a fox"]).tokens
    assert not said[:, -read_by_t5:].any() and said.shape == told.tokens.shape
    assert torch.equal(said[:, :-read_by_t5], told.tokens[:, :-read_by_t5])
    assert asked.count(t5) == 0
    assert torch.equal(loaded.encode_prompts(["a fox"]).tokens, told.tokens)
    assert asked.count(t5) == 1
    loaded.release()
    assert getattr(loaded.pipeline(), t5) is not None and asked.count(t5) == 2


def test_what_waits_is_known_by_its_bytes(family: str, folders: dict[str, Path], tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folders[family], tmp_path / "base"))
    (base, t5), (same, _) = opened(folders[family]), opened(copy)
    key = text_encoder_fingerprint(base)
    assert key == text_encoder_fingerprint(same) and t5 not in base.modules()
    base.encode_prompts(["a fox"])
    assert key == text_encoder_fingerprint(base) and t5 not in base.modules(), "the same before and after"
    file = copy / t5 / "model.safetensors"
    tensors = load_file(file)
    name = next(iter(tensors))
    save_file({**tensors, name: tensors[name] + 1}, file, {"format": "pt"})
    assert key != text_encoder_fingerprint(opened(copy)[0])


def test_a_scheduler_of_another_prediction_is_refused(
    family: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(folders[family], tmp_path / "base"))
    other = {"_class_name": "DDIMScheduler", "prediction_type": "v_prediction"}
    (copy / "scheduler/scheduler_config.json").write_text(json.dumps(other))
    index = json.loads((copy / "model_index.json").read_text())
    (copy / "model_index.json").write_text(json.dumps({**index, "scheduler": ["diffusers", "DDIMScheduler"]}))
    with pytest.raises(ModelError, match="a DDIMScheduler, says that it predicts v_prediction") as caught:
        load_base(copy, device="cpu")
    assert "trained by flow matching" in str(caught.value) and "\n" not in str(caught.value)


def test_a_t5_with_more_words_than_rows_is_refused_when_it_comes(
    family: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(folders[family], tmp_path / "base"))
    base, _ = opened(copy)
    assert base.t5_reading is not None
    base.t5_reading.tokenizer.add_tokens([f"<{number}>" for number in range(9)])
    with pytest.raises(ModelError, match=f"{base.t5_parts[1]} of .* has .* tokens and its text encoder"):
        base.encode_prompts(["a fox"])


# -- where adapters and words go to T5 (Flux.1) --------------------------------------------------------------


def test_t5_is_one_of_the_roots_while_it_is_loaded_where_it_learns(
    family: str, folders: dict[str, Path], asked: list[str]
) -> None:
    base, t5 = opened(folders[family])
    learns = family == "flux"
    assert base.late == ((t5,) if learns else ()) and t5 not in base.roots
    assert (t5 in base.vocabularies) is learns
    base.encode_prompts(["a fox"])
    assert (t5 in base.roots) is learns
    base.release()
    assert t5 not in base.roots
    asked.clear()
    base.claim(base.vocabularies)
    base.release()
    assert (t5 in base.roots) is learns and asked == [t5] * learns
    with base.sparing():
        tokens = base.encode_prompts(["a fox"]).tokens
    assert bool(tokens[:, -base.t5_window :].any()) is learns, "what was claimed is read"


def t5_adapter(path: Path) -> Path:
    """A LoRA of Flux's attention and its T5's, as sd-scripts calls it."""
    base = FAMILIES.get("flux").tiny(3)
    targets = ("attention", "text_encoder_2.attention")
    with Adapter.inject(base.roots, targets, LoraSettings(rank=2)) as adapter:
        state = fill(adapter, seed=1).state(Metadata(base_name=base.name, base_family=base.family))
    return write(state, path, "kohya-flux")


def test_an_adapter_of_t5_acts_and_keeps_it(folders: dict[str, Path], tmp_path: Path) -> None:
    path = t5_adapter(tmp_path / "t5.safetensors")
    base, t5 = opened(folders["flux"])
    state = read(path, layers_of(FAMILIES.get("flux").tiny(3).roots)).state
    assert state.roots == {"transformer", t5}
    request = Request(prompt="a fox", steps=2, scheduler="FlowMatchEulerDiscreteScheduler")
    with Session(base) as session:
        (plain,) = session.generate(request)
    with Session(base, [path]) as session:
        (drawn,) = session.generate(request)
        base.release()
        assert t5 in base.roots, "something hangs in it"
    assert plain.image.tobytes() != drawn.image.tobytes()
    base.release()
    assert t5 not in base.roots
    assert measure_effect(base, state).text > 0 and t5 in base.roots


def test_a_file_is_compared_with_t5_where_it_changes_it(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = t5_adapter(tmp_path / "t5.safetensors")
    with pytest.raises(SystemExit) as stop:
        main(["inspect", str(path), "--against", str(folders["flux"])])
    told = capsys.readouterr().out
    assert stop.value.code == 0 and "text_encoder_2 layers, 0 unused tensors" in told.replace("\n", " ")


def test_the_words_of_t5_are_taught_proven_and_drawn(tmp_path: Path, asked: list[str]) -> None:
    world = write_world(tmp_path, 2, family="flux", caption=None)
    result = scumble.train(
        method="textual-inversion",
        base=str(world / "base"),
        data={"images": str(world / "pictures"), "resolution": 16},
        output=tmp_path / "run",
        textual_inversion={"placeholders": "<fox>", "initial": "a"},
        train={"steps": 2, "batch": 1, "optimizer": {"learning_rate": 0.05}},
        preview={"prompts": ["a <fox>"], "steps": 1},
        quiet=True,
    )
    assert result.reason == "complete" and result.difference == 0 and result.adapter is not None
    (token,) = read(result.adapter).state.tokens.values()
    assert set(token.vectors) == {"text_encoder", "text_encoder_2"}
    assert asked.count("text_encoder_2") == 2, "for training, and for the proof"


def test_targets_that_name_t5_claim_it(tmp_path: Path) -> None:
    world = write_world(tmp_path, 2, family="flux")
    settings = {
        "base": str(world / "base"),
        "data": {"images": str(world / "pictures"), "resolution": 16},
        "train": {"steps": 1, "batch": 1, "optimizer": {"learning_rate": 0.05}},
        "quiet": True,
    }
    adapter = {"targets": ["attention", "text_encoder_2.attention"], "rank": 2}
    result = scumble.train(**settings, adapter=adapter, output=tmp_path / "run")
    assert result.reason == "complete" and result.difference == 0 and result.adapter is not None
    assert read(result.adapter).state.roots == {"transformer", "text_encoder_2"}
    with pytest.raises(NoLayerMatches, match="text_encoder_3"):
        scumble.train(**settings, adapter={"targets": "text_encoder_3.attention"}, output=tmp_path / "other")
