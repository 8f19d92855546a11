"""Hub ids: over real HTTP against a small local server, and what is said when the Hub can't help."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import socket
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from scumble.errors import ModelError
from scumble.models import FAMILIES, describe_base, hub, load_base

HTTP: Any = sys.modules[HTTPError.__module__.partition(".")[0]]
"""The HTTP library that huggingface_hub uses."""
COMMIT = "0123456789012345678901234567890123456789"


@dataclass
class Server:
    """Repositories as folders, and the paths of the files that were fetched."""

    folders: dict[str, Path] = field(default_factory=dict)
    fetched: list[str] = field(default_factory=list)


class Handler(BaseHTTPRequestHandler):
    server_state: Server
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *arguments: Any) -> None:
        """Quiet."""

    def answer(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        api = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?/?.*", path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path)
        folder = self.server_state.folders.get((api or file)[1] if api or file else "")
        if folder is None:
            return self.answer(404, b"{}", X_Error_Code="RepoNotFound")
        names = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
        if api and api[2] == "tree":
            entries = [
                {"type": "file", "path": n, "size": (folder / n).stat().st_size, "oid": COMMIT} for n in names
            ]
            return self.answer(200, json.dumps(entries).encode(), Content_Type="application/json")
        if api:
            info = {"id": api[1], "sha": COMMIT, "siblings": [{"rfilename": name} for name in names]}
            return self.answer(200, json.dumps(info).encode(), Content_Type="application/json")
        assert file is not None
        if file[2] not in names:
            return self.answer(404, b"", X_Error_Code="EntryNotFound")
        data = (folder / file[2]).read_bytes()
        if self.command == "GET":
            self.server_state.fetched.append(file[2])
        self.answer(200, data, ETag=f'"{hashlib.sha256(data).hexdigest()}"', X_Repo_Commit=COMMIT)

    do_HEAD = do_GET


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Server]:
    state = Server()
    http = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"server_state": state}))
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    thread.start()
    endpoint = f"http://127.0.0.1:{http.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield state
    http.shutdown()
    http.server_close()
    thread.join()


@pytest.fixture
def published(server: Server, folders: dict[str, Path], tmp_path: Path) -> Server:
    folder = Path(shutil.copytree(folders["sd1"], tmp_path / "repo"))
    for part in ("unet", "vae", "text_encoder"):
        for path in (folder / part).glob("*.safetensors"):
            path.with_suffix(".fp16.safetensors").write_bytes(path.read_bytes())
            path.with_suffix(".bin").write_bytes(b"a pickle")
    (folder / "safety_checker").mkdir()
    (folder / "safety_checker" / "model.safetensors").write_bytes(b"1.2 GB in earnest")
    server.folders["owner/tiny"] = folder
    return server


def test_a_hub_id_is_described_from_its_configs_and_loaded_from_its_safetensors(
    published: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = describe_base("owner/tiny")
    assert facts.family == "sd1" and facts.problems == ()
    assert published.fetched and not any(
        name.endswith((".safetensors", ".bin")) for name in published.fetched
    )
    base = load_base("owner/tiny", device="cpu")
    assert base.name == "owner/tiny" and base.fingerprint() == FAMILIES.get("sd1").tiny(3).fingerprint()
    weights = [name for name in published.fetched if name.endswith((".safetensors", ".bin"))]
    assert sorted(name.split("/")[0] for name in weights) == ["text_encoder", "unet", "vae"]
    assert not any("fp16" in name or name.endswith(".bin") for name in weights)
    # from now on the cache is enough
    published.folders.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert load_base("owner/tiny", device="cpu").fingerprint() == base.fingerprint()
    with pytest.raises(ModelError, match=r"owner/tiny in variant 'fp16' is not in the local Hub cache"):
        load_base("owner/tiny", variant="fp16", device="cpu")


def test_a_variant_is_all_that_is_downloaded(published: Server) -> None:
    load_base("owner/tiny", variant="fp16", device="cpu")
    weights = [name for name in published.fetched if name.endswith(".safetensors")]
    assert len(weights) == 3 and all(".fp16." in name for name in weights)


def test_what_is_refused_is_not_downloaded(published: Server) -> None:
    index = published.folders["owner/tiny"] / "unet" / "config.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "addition_embed_type": "text_time"}))
    with pytest.raises(ModelError, match=r"is not complete\. Missing: the text_encoder_2 folder"):
        load_base("owner/tiny", device="cpu")
    assert not any(name.endswith(".safetensors") for name in published.fetched)


def test_what_the_hub_does_not_have(server: Server) -> None:
    with pytest.raises(ModelError, match=r"The Hub has no owner/nothing.*hf auth login") as caught:
        load_base("owner/nothing", device="cpu")
    assert "./owner/nothing" in str(caught.value)


def test_a_hub_that_does_not_answer(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{free.getsockname()[1]}")
    with pytest.raises(ModelError, match=r"the Hub can't be reached \(.*hf download owner/tiny"):
        load_base("owner/tiny", device="cpu")


def test_offline_and_not_cached(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match=r"HF_HUB_OFFLINE is set.*hf download owner/tiny --revision v2"):
        load_base("owner/tiny", device="cpu", revision="v2")


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (GatedRepoError, "is gated: accept its licence"),
        (RepositoryNotFoundError, "The Hub has no owner/tiny"),
        (RevisionNotFoundError, "has no revision 'v9'"),
        (HfHubHTTPError, "can't be downloaded from the Hub: went wrong"),
        (LocalEntryNotFoundError, "the Hub can't be reached"),
        (ConnectionError, "the Hub can't be reached"),
        (HTTP.ReadTimeout, "the Hub can't be reached"),
    ],
)
def test_every_error_of_the_client_becomes_one_message(
    kind: type[Exception], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        if issubclass(kind, HfHubHTTPError) and kind is not LocalEntryNotFoundError:
            request = HTTP.Request("GET", "https://huggingface.co/owner/tiny")
            raise kind("went wrong\nat length", response=HTTP.Response(400, request=request))
        raise kind("went wrong")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(ModelError, match=said) as caught:
        load_base("owner/tiny", device="cpu", revision="v9")
    assert "\n" not in str(caught.value)


def test_the_form_of_a_hub_id() -> None:
    assert hub.is_hub_id("stable-diffusion-v1-5/stable-diffusion-v1-5")
    assert not any(map(hub.is_hub_id, ("plain", "a/b/c", "./a", "a b/c", "/a", "a/")))
