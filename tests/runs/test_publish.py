"""Publishing and pulling over HTTP: cards of runs and of bare files, and the way back to a folder."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import scumble
from scumble.errors import ConfigError, FormatError, HubError, ModelError
from scumble.formats import read, write
from scumble.inference.find_base import find_base
from scumble.runs.card import unedited
from scumble.runs.publish import publish
from scumble.runs.pull import pull
from tests.inference.makers import adapter_file
from tests.runs.hub_server import TOKEN, Hub, front_matter_problems, running
from tests.runs.worlds import write_world

WEIGHTS = "pytorch_lora_weights.safetensors"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    from huggingface_hub import constants

    with running() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        template = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny base, pictures, and a run of two steps."""
    folder = write_world(tmp_path_factory.mktemp("world"), 3, caption=None)
    scumble.train(
        base=str(folder / "base"),
        data={"images": str(folder / "pictures"), "caption": "a sks fox"},
        output=folder / "run",
        train={"steps": 2, "batch": 1, "optimizer": {"learning_rate": 0.01}},
        preview={"prompts": ["a sks fox at night"], "steps": 1},
        hub={"license": "creativeml-openrail-m"},
        quiet=True,
    )
    return folder


@pytest.fixture
def run(world: Path, tmp_path: Path) -> Path:
    import shutil

    return Path(shutil.copytree(world / "run", tmp_path / "moved"))


def snippet(card: str) -> str:
    found = re.search(r"load_lora_weights.*?```", card, re.DOTALL)
    assert found
    return found[0]


def matter(card: bytes | str) -> dict[str, Any]:
    text = card.decode() if isinstance(card, bytes) else card
    assert front_matter_problems(text) == []
    found = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
    assert found
    return yaml.safe_load(found[1])


def test_a_run_is_published_with_what_was_measured_since(server: Hub, run: Path) -> None:
    results = {"learned": {"value": 0.91, "low": 0.85, "high": 0.95}, "broke": {"drift": 0.0123}, "page": "x"}
    (run / "evaluation.json").write_text(json.dumps(results))
    assert publish(run, "fox") == f"{server.endpoint}/painter/fox"
    there = server.repos["painter/fox"]
    card = there["README.md"].decode()
    assert unedited(card) and there["README.md"] == (run / "README.md").read_bytes()
    assert "| learned | 0.91 (95 % interval 0.85 to 0.95) |" in card and "| broke: drift | 0.0123 |" in card
    assert matter(card)["license"] == "creativeml-openrail-m"
    assert matter(card)["instance_prompt"] == "a sks fox"
    assert 'load_lora_weights("painter/fox", weight_name=' in card and "--adapter painter/fox" in card
    assert {"README.md", WEIGHTS, "run.toml", "evaluation.json", "report.html"} <= set(there)
    shown = re.findall(r"\]\((previews/[^)]+)\)", card)
    assert len(shown) == 2 and set(shown) <= set(there), "base beside adapter, both uploaded"


def test_a_run_whose_card_was_edited_keeps_it(server: Hub, run: Path) -> None:
    card = run / "README.md"
    card.write_text(card.read_text().replace("# run", "# My fox"))
    publish(run, "fox")
    assert b"# My fox" in server.repos["painter/fox"]["README.md"]
    with pytest.raises(ConfigError, match="was edited, so --license"):
        publish(run, "fox", license="mit")
    publish(run, "fox", license="mit", replace_card=True)
    assert matter(server.repos["painter/fox"]["README.md"])["license"] == "mit"
    assert "# My fox" not in card.read_text()


def test_a_bare_file_gets_a_card_from_its_header(server: Hub, world: Path, run: Path) -> None:
    file = run / WEIGHTS
    before = file.read_bytes()
    publish(file, "studio/fox", license="mit")
    there = server.repos["studio/fox"]
    assert set(there) == {WEIGHTS, "README.md"} and there[WEIGHTS] == before
    card = there["README.md"].decode()
    assert matter(card)["license"] == "mit" and matter(card)["instance_prompt"] == "a sks fox"
    for wanted in ("| layers | 32 |", "| rank | 4 |", "learning_rate = 0.01", str(world / "base"), "ComfyUI"):
        assert wanted in card, wanted
    assert "scumble generate --adapter studio/fox" in card


def test_a_strangers_file_gets_a_card_with_pictures(server: Hub, world: Path, tmp_path: Path) -> None:
    file = adapter_file(tmp_path / "fox.safetensors")
    with pytest.raises(ModelError, match="--base"):
        publish(file, "fox")
    assert not server.commits
    publish(file, "fox", base=str(world / "base"), prompts=["a red fox"])
    there = server.repos["painter/fox"]
    pictures = {name for name in there if name.startswith("pictures/")}
    assert len(pictures) == 2
    card = there["README.md"].decode()
    assert (
        'load_lora_weights("painter/fox", weight_name="fox.safetensors")' in card
        and "/tmp" not in snippet(card)
    )
    assert all(f"({name})" in card for name in pictures) and "a red fox" in card


def test_a_folder_of_peft_is_published_whole(server: Hub, world: Path, tmp_path: Path) -> None:
    state = read(adapter_file(tmp_path / "fox.safetensors")).state
    folder = write(state, tmp_path / "fox", "peft").parent
    publish(folder, "fox", base=str(world / "base"))
    there = server.repos["painter/fox"]
    assert set(there) == {"adapter_model.safetensors", "adapter_config.json", "README.md"}
    card = there["README.md"].decode()  # diffusers' own loader would do nothing with it
    assert "load_lora_weights(" not in card and "scumble.load_adapter(" in card
    assert read(pull("painter/fox", tmp_path / "pulled").adapter).state.equal(state)


def test_how_to_try_again_names_everything(server: Hub, tmp_path: Path) -> None:
    file = adapter_file(tmp_path / "my fox.safetensors", base_name="owner/base")
    server.failures = {"/commit/": 403}
    with pytest.raises(HubError, match=re.escape(f"scumble push '{file}' painter/fox --license mit")):
        publish(file, "painter/fox", license="mit")
    with pytest.raises(HubError, match="no run folder and no file"):
        publish(tmp_path / "gone")
    with pytest.raises(ConfigError, match="for a bare file"):
        (tmp_path / "run.toml").write_text("")
        publish(tmp_path, base="picturebook")


def test_what_was_pushed_is_pulled_and_drawn_from_its_id(
    server: Hub, world: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (run / "notes.pt").write_bytes(b"")
    publish(run, "fox")
    server.repos["painter/fox"]["evil.bin"] = b"\x80\x02"
    got = pull("painter/fox", tmp_path / "here")
    assert got.adapter.read_bytes() == (run / WEIGHTS).read_bytes()
    assert got.verdict.intact and got.base == str(world / "base")
    assert (got.folder / "README.md").read_bytes() == (run / "README.md").read_bytes()
    assert list((got.folder / "previews").glob("*.png"))
    assert {"evil.bin", "report.html"} <= set(got.left_out)
    assert not list(got.folder.rglob("*.html")) and not list(got.folder.rglob("*.bin"))
    pull("painter/fox", tmp_path / "here")  # the same again is nothing new
    (tmp_path / "here" / "README.md").write_text("mine")
    with pytest.raises(ConfigError, match=r"other files of these names: README\.md"):
        pull("painter/fox", tmp_path / "here")
    pull("painter/fox", tmp_path / "here", overwrite=True)
    assert (tmp_path / "here" / "README.md").read_text() != "mine"

    # Offline, from the cache: the sockets are blocked, not only the flag set.
    from huggingface_hub import constants

    from scumble.cli.main import main

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the network was used")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    again = pull("painter/fox", tmp_path / "there")
    assert again.adapter.read_bytes() == got.adapter.read_bytes()
    with pytest.raises(HubError, match="not in the local Hub cache"):
        pull("painter/never-seen", tmp_path / "never")
    with pytest.raises(SystemExit) as stop:
        main(
            [
                "generate",
                "a fox",
                "--adapter",
                "painter/fox",
                "--steps",
                "1",
                "--out",
                str(tmp_path / "a.png"),
            ]
        )
    assert stop.value.code == 0 and (tmp_path / "a.png").stat().st_size > 100


def test_the_base_of_an_id_is_what_the_hub_says_of_its_card(server: Hub, tmp_path: Path) -> None:
    from huggingface_hub import HfApi

    silent = adapter_file(tmp_path / "fox.safetensors")
    publish(silent, "fox", base="owner/base")
    info = HfApi().model_info("painter/fox")
    assert info.card_data is not None
    assert find_base("painter/fox") == info.card_data["base_model"] == "owner/base"
    # a path of the machine that trained it means nothing here: the card's word counts
    foreign = adapter_file(tmp_path / "far.safetensors", base_name="/home/somebody/models/base")
    server.repos["painter/far"] = {
        "far.safetensors": foreign.read_bytes(),
        "README.md": b"---\nbase_model: owner/base\n---\n",
    }
    assert find_base("painter/far") == "owner/base"
    del server.repos["painter/far"]["README.md"]
    assert find_base("painter/far") == "/home/somebody/models/base"


def test_what_is_no_adapter_is_not_pulled(server: Hub, tmp_path: Path) -> None:
    server.repos["owner/base"] = {"model_index.json": b"{}", "unet/diffusion.safetensors": b""}
    with pytest.raises(FormatError, match=r"whole base model.*--base owner/base"):
        pull("owner/base", tmp_path / "x")
    server.repos["owner/two"] = {"a.safetensors": b"", "b.safetensors": b""}
    with pytest.raises(FormatError, match=r"holds 2 \.safetensors"):
        pull("owner/two", tmp_path / "x")
    with pytest.raises(HubError, match="owner/name"):
        pull("no-slash", tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_names_that_lead_out_of_the_folder_are_left_out(server: Hub, tmp_path: Path) -> None:
    weights = adapter_file(tmp_path / "fox.safetensors", base_name="owner/base").read_bytes()
    server.repos["owner/bad"] = {"fox.safetensors": weights, "../up.png": b"x", "a/../../b.png": b"x"}
    got = pull("owner/bad", tmp_path / "deep" / "here")
    assert set(got.left_out) == {"../up.png", "a/../../b.png"}
    assert [path.name for path in (tmp_path / "deep").rglob("*") if path.is_file()] == ["fox.safetensors"]


def test_a_file_that_was_changed_on_the_way_is_told(
    server: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from scumble.cli.main import main

    weights = bytearray(adapter_file(tmp_path / "fox.safetensors", base_name="owner/base").read_bytes())
    weights[-1] ^= 1
    server.repos["owner/fox"] = {"fox.safetensors": bytes(weights)}
    with pytest.raises(SystemExit) as stop:
        main(["pull", "owner/fox", str(tmp_path / "here")])
    assert stop.value.code == 0
    said = capsys.readouterr()
    assert "is not what was written" in said.err and "scumble verify" in said.err
    with pytest.raises(SystemExit) as stop:
        main(["verify", str(tmp_path / "here")])
    assert stop.value.code == 1 and "tensors   CHANGED" in capsys.readouterr().out
