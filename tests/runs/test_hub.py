"""Uploading over real HTTP to a Hub on localhost: what arrives, what is refused, what a failure leaves."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from scumble.errors import HubError
from scumble.runs import hub
from scumble.runs.card import CardFacts, write_card
from scumble.runs.folder import RunFolder
from tests.runs.hub_server import TOKEN, Hub, running

CARD = write_card(CardFacts(name="fox", base="owner/base", dataset="owner/pictures", prompt="a fox"))


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    from huggingface_hub import constants

    with running() as hub_server:
        monkeypatch.setattr(constants, "ENDPOINT", hub_server.endpoint)
        template = hub_server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
            monkeypatch.delenv(name, raising=False)
        yield hub_server


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "my fox"
    (folder / "checkpoint-000005").mkdir(parents=True)
    (folder / "checkpoint-000005" / "optimizer.safetensors").write_bytes(b"not for others")
    (folder / "previews").mkdir()
    (folder / "previews" / "a.png").write_bytes(b"\x89PNG" * 300)
    (folder / "pytorch_lora_weights.safetensors").write_bytes(bytes(range(256)) * 40)
    (folder / "README.md").write_text(CARD)
    (folder / "run.toml").write_text('base = "owner/base"\n')
    (folder / "notes.txt").write_text("private")
    return folder


def test_a_run_arrives_whole_and_nothing_else_does(server: Hub, run: Path) -> None:
    url = hub.push(run, "fox", files=RunFolder(run).published(), token=TOKEN)
    assert url == f"{server.endpoint}/painter/fox"
    assert server.repos["painter/fox"] == {
        name: (run / name).read_bytes()
        for name in ("pytorch_lora_weights.safetensors", "README.md", "run.toml", "previews/a.png")
    }
    assert len(server.commits) == 1
    assert server.verified, "large files went through LFS, and were verified"
    # The same again, after a change: only the change is uploaded, the rest is known.
    (run / "README.md").write_text(CARD + "more\n")
    before = len(server.objects)
    hub.push(run, "painter/fox", files=RunFolder(run).published(), token=TOKEN)
    assert server.repos["painter/fox"]["README.md"].endswith(b"more\n")
    assert len(server.objects) == before


def test_what_was_uploaded_can_be_downloaded(server: Hub, run: Path, tmp_path: Path) -> None:
    hub.push(run, "fox", files=RunFolder(run).published(), token=TOKEN)
    name = "pytorch_lora_weights.safetensors"
    code = f"import huggingface_hub as h; print(h.hf_hub_download('painter/fox', {name!r}))"
    environment = os.environ | {
        "HF_ENDPOINT": server.endpoint,
        "HF_HOME": str(tmp_path),
        "HF_HUB_DISABLE_XET": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert Path(done.stdout.strip().splitlines()[-1]).read_bytes() == (run / name).read_bytes()


def test_prepare_creates_the_repository_and_says_its_full_name(server: Hub) -> None:
    assert hub.prepare("fox", CARD, private=True, token=TOKEN) == "painter/fox"
    assert hub.prepare("studio/fox", CARD, token=TOKEN) == "studio/fox"
    assert hub.prepare("fox", CARD, token=TOKEN) == "painter/fox", "an existing repository is fine"
    assert server.private == {"painter/fox": True, "studio/fox": False}
    assert server.repos["painter/fox"] == {}, "nothing is uploaded yet"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"token": None}, r"hf auth login"),
        ({"token": "hf_wrong"}, r"401.*hf auth login"),
        ({"token": TOKEN, "repo": "stranger/fox"}, r"403.*You may write to: painter, studio"),
        (
            {"token": TOKEN, "card": CARD.replace("owner/base", "./my/local/base")},
            r"base_model.*must be a repository",
        ),
    ],
)
def test_prepare_refuses_what_would_fail_later(server: Hub, arguments: dict[str, str], message: str) -> None:
    values = {"repo": "fox", "card": CARD, **arguments}
    with pytest.raises(HubError, match=re.compile(message, re.DOTALL)):
        hub.prepare(values["repo"], values["card"], token=values["token"])


def test_no_connection_is_told(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(HubError, match="could not check the token"):
        hub.prepare("fox", CARD, token=TOKEN)


@pytest.mark.parametrize("part", ["preupload", "/lfs/objects", "/commit/"])
def test_a_failed_upload_keeps_everything_and_says_how_to_try_again(
    server: Hub, run: Path, part: str
) -> None:
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    server.failures = {part: 403}
    with pytest.raises(HubError) as raised:
        hub.push(run, "painter/fox", files=RunFolder(run).published(), private=True, token=TOKEN)
    text = str(raised.value)
    assert f"scumble push '{run}' painter/fox --private" in text
    assert str(run) in text and "403" in text
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    server.failures = {}
    hub.push(run, "painter/fox", files=RunFolder(run).published(), token=TOKEN)
    assert server.commits


def test_the_command_line_uploads_a_run(
    server: Hub, run: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:  # type: ignore[no-untyped-def]
    from scumble.cli.main import main

    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with pytest.raises(SystemExit) as stop:
        main(["push", str(run), "studio/fox"])
    assert stop.value.code == 0
    assert "studio/fox" in capsys.readouterr().out
    assert "pytorch_lora_weights.safetensors" in server.repos["studio/fox"]


def test_a_folder_without_an_adapter_is_not_uploaded(server: Hub, tmp_path: Path) -> None:
    with pytest.raises(HubError, match="no adapter"):
        hub.push(tmp_path, "fox", files=["*"], token=TOKEN)
    assert not server.requests


@pytest.mark.parametrize("name", ["a/b/c", "-fox", "fox..", "my fox"])
def test_names_that_are_no_repository(name: str) -> None:
    with pytest.raises(ValueError, match="Repo id"):
        hub.HubSettings(push=True, id=name)


def test_an_upload_that_failed_half_way_goes_on_where_it_ended(server: Hub, run: Path) -> None:
    picture = hashlib.sha256((run / "previews/a.png").read_bytes()).hexdigest()
    weights = hashlib.sha256((run / "pytorch_lora_weights.safetensors").read_bytes()).hexdigest()
    server.failures = {f"/lfs/{picture}": 403}
    with pytest.raises(HubError, match="goes on where it ended"):
        hub.push(run, "fox", files=RunFolder(run).published(), token=TOKEN)
    assert set(server.objects) == {weights} and not server.commits
    server.failures, server.requests = {}, []
    hub.push(run, "fox", files=RunFolder(run).published(), token=TOKEN)
    sent = [path for method, path in server.requests if method == "PUT"]
    assert sent == [f"/lfs/{picture}"], "the weights were there already"
    assert "previews/a.png" in server.repos["painter/fox"]
    server.requests = []
    hub.push(run, "fox", files=RunFolder(run).published(), token=TOKEN)
    assert not [path for method, path in server.requests if method == "PUT"]
    assert len(server.commits) == 1, "nothing has changed, so nothing is committed"


def test_a_card_that_was_edited_on_the_hub_is_kept(server: Hub, run: Path) -> None:
    said: list[str] = []
    files = RunFolder(run).published()
    hub.push(run, "fox", files=files, token=TOKEN, say=said.append)
    newer = write_card(CardFacts(name="fox", base="owner/base", steps=7))
    (run / "README.md").write_text(newer)
    hub.push(run, "fox", files=files, token=TOKEN, say=said.append)
    assert server.repos["painter/fox"]["README.md"].decode() == newer, "ours is written anew"
    edited = newer.replace("# fox", "# My best fox").encode()
    server.repos["painter/fox"]["README.md"] = edited
    server.commits.append("by hand")
    (run / "README.md").write_text(CARD)
    hub.push(run, "fox", files=files, token=TOKEN, say=said.append)
    assert server.repos["painter/fox"]["README.md"] == edited
    assert len(said) == 1 and "was edited there, and is kept" in said[0]
    hub.push(run, "fox", files=files, token=TOKEN, say=said.append, replace_card=True)
    assert server.repos["painter/fox"]["README.md"].decode() == CARD
    server.repos["painter/fox"]["README.md"] = edited
    server.commits.append("by hand")
    (run / "README.md").write_text("---\ntags: [lora]\n---\nwritten here by hand\n")
    hub.push(run, "fox", files=files, token=TOKEN)
    assert b"written here by hand" in server.repos["painter/fox"]["README.md"], (
        "what a person wrote here wins"
    )


def test_prepare_looks_at_a_repository_that_exists(server: Hub) -> None:
    server.repos["stranger/fox"] = {"README.md": b"theirs"}
    server.organizations = ("studio",)
    with pytest.raises(HubError, match="You may write to: painter, studio"):
        hub.prepare("stranger/fox", CARD, token=TOKEN)
    server.repos["painter/old"] = {"README.md": b"mine"}
    assert hub.prepare("painter/old", CARD, token=TOKEN) == "painter/old"
    assert server.repos["painter/old"] == {"README.md": b"mine"}, "kept with all that is in it"
    server.role = "read"
    with pytest.raises(HubError, match="may only read"):
        hub.prepare("painter/old", CARD, token=TOKEN)
