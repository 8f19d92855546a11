"""A Hub of our own on localhost: the endpoints that creating, filling and reading a model repository call.

It speaks real HTTP, and checks what the real one checks of a push: the token, the card's front matter, the size
and sha256 of every large file. `failures` makes an endpoint answer with an error instead.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

TOKEN = "hf_test_token"
LARGE = (".safetensors", ".png", ".bin")


@dataclass
class Hub:
    """What the server holds and what it was asked."""

    user: str = "painter"
    role: str = "write"
    """What the token may do."""
    organizations: tuple[str, ...] = ("studio",)
    endpoint: str = ""
    repos: dict[str, dict[str, bytes]] = field(default_factory=dict)
    private: dict[str, bool] = field(default_factory=dict)
    commits: list[str] = field(default_factory=list)
    objects: dict[str, bytes] = field(default_factory=dict)
    verified: set[str] = field(default_factory=set)
    requests: list[tuple[str, str]] = field(default_factory=list)
    failures: dict[str, int] = field(default_factory=dict)
    """Part of a path -> the HTTP status it answers with."""


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *arguments: object) -> None:
        """Quiet: the tests look at `hub.requests`."""

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            parts = []
            while size := int(self.rfile.readline().strip() or b"0", 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _send(self, status: int, answer: Any = None, *, raw: bytes | None = None, **headers: str) -> None:
        data = raw if raw is not None else json.dumps(answer if answer is not None else {}).encode()
        self.send_response(status)
        self.send_header(
            "Content-Type", "application/octet-stream" if raw is not None else "application/json"
        )
        self.send_header("Content-Length", str(len(data)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _error(self, status: int, message: str, code: str = "") -> None:
        self._send(
            status, {"error": message}, X_Error_Message=message, **({"X_Error_Code": code} if code else {})
        )

    def _handle(self) -> None:
        path = unquote(urlsplit(self.path).path)
        body = self._body()
        self.hub.requests.append((self.command, path))
        for part, status in self.hub.failures.items():
            if part in path:
                return self._error(status, f"the test made {part} fail")
        public = path.startswith("/lfs/") or (self.command in ("GET", "HEAD") and "/resolve/" in path)
        if (
            path != "/api/validate-yaml"
            and not public
            and self.headers.get("Authorization") != f"Bearer {TOKEN}"
        ):
            return self._error(401, "Invalid username or password.")
        for method, pattern, function in _ROUTES:
            found = re.fullmatch(pattern, path)
            if found and self.command in method:
                return function(self, body, *found.groups())
        self._error(404, f"no endpoint {self.command} {path}")

    do_GET = do_POST = do_PUT = do_HEAD = _handle

    def _repo(self, repo: str) -> dict[str, bytes] | None:
        if repo not in self.hub.repos:
            self._error(404, "Repository not found", "RepoNotFound")
            return None
        return self.hub.repos[repo]

    def whoami(self, body: bytes) -> None:
        self._send(
            200,
            {
                "type": "user",
                "name": self.hub.user,
                "orgs": [{"name": name} for name in self.hub.organizations],
                "auth": {"accessToken": {"role": self.hub.role}},
            },
        )

    def create(self, body: bytes) -> None:
        asked = json.loads(body)
        owner = asked.get("organization") or self.hub.user
        if owner not in (self.hub.user, *self.hub.organizations):
            return self._error(
                403, f"You don't have the rights to create a model under the namespace {owner!r}"
            )
        repo = f"{owner}/{asked['name']}"
        answer = {"url": f"{self.hub.endpoint}/{repo}", "id": repo}
        if repo in self.hub.repos:
            return self._send(409, {**answer, "error": "You already created this model repo"})
        self.hub.repos[repo] = {}
        self.hub.private[repo] = asked.get("private") is True or asked.get("visibility") == "private"
        self._send(200, answer)

    def validate(self, body: bytes) -> None:
        problems = front_matter_problems(json.loads(body)["content"])
        if problems:
            return self._send(400, {"errors": [{"message": problem} for problem in problems]})
        self._send(200, {"errors": [], "warnings": []})

    def info(self, body: bytes, repo: str) -> None:
        files = self._repo(repo)
        if files is not None:
            siblings = [{"rfilename": name} for name in sorted(files)]
            answer = {"id": repo, "sha": self._head(), "siblings": siblings, "private": False, "tags": []}
            found = re.match(r"---\n(.*?)\n---\n", files.get("README.md", b"").decode(), re.DOTALL)
            self._send(200, {**answer, "cardData": yaml.safe_load(found[1]) if found else None})

    def preupload(self, body: bytes, repo: str, revision: str) -> None:
        there = self._repo(repo)
        if there is not None:
            files = json.loads(body)["files"]
            for file in files:
                assert base64.b64decode(file["sample"]) is not None
            answers = []
            for path in [file["path"] for file in files]:
                large = path.endswith(LARGE)
                answer = {"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
                if path in there:  # by which a client leaves out what has not changed
                    blob = there[path] if large else b"blob %d\0" % len(there[path]) + there[path]
                    answer["oid"] = (hashlib.sha256 if large else hashlib.sha1)(blob).hexdigest()
                answers.append(answer)
            self._send(200, {"files": answers})

    def batch(self, body: bytes, repo: str) -> None:
        if self._repo(repo) is None:
            return
        objects = []
        for item in json.loads(body)["objects"]:
            answer: dict[str, Any] = {"oid": item["oid"], "size": item["size"]}
            if item["oid"] not in self.hub.objects:
                answer["actions"] = {
                    "upload": {"href": f"{self.hub.endpoint}/lfs/{item['oid']}"},
                    "verify": {"href": f"{self.hub.endpoint}/lfs/verify"},
                }
            objects.append(answer)
        self._send(200, {"transfer": "basic", "objects": objects})

    def put(self, body: bytes, oid: str) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            return self._error(400, "sha256 does not match")
        self.hub.objects[oid] = body
        self._send(200)

    def verify(self, body: bytes) -> None:
        asked = json.loads(body)
        if len(self.hub.objects.get(asked["oid"], b"")) != asked["size"]:
            return self._error(422, "size does not match")
        self.hub.verified.add(asked["oid"])
        self._send(200)

    def commit(self, body: bytes, repo: str, revision: str) -> None:
        files = self._repo(repo)
        if files is None:
            return
        fresh = dict(files)
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                message = value["summary"]
            elif entry["key"] == "file":
                fresh[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                if value["oid"] not in self.hub.objects:
                    return self._error(400, f"{value['path']} was not uploaded")
                fresh[value["path"]] = self.hub.objects[value["oid"]]
            else:
                return self._error(400, f"operation {entry['key']}")
        self.hub.repos[repo] = fresh
        self.hub.commits.append(message)
        self._send(
            200,
            {
                "commitUrl": f"{self.hub.endpoint}/{repo}/commit/{self._head()}",
                "commitOid": self._head(),
                "success": True,
            },
        )

    def resolve(self, body: bytes, repo: str, revision: str, path: str) -> None:
        files = self._repo(repo)
        if files is None:
            return
        if path not in files:
            return self._error(404, f"{path} not found", "EntryNotFound")
        data = files[path]
        digest = hashlib.sha256(data).hexdigest()
        self._send(
            200, raw=data, ETag=f'"{digest}"', X_Repo_Commit=self._head(), X_Linked_Size=str(len(data))
        )

    def _head(self) -> str:
        return hashlib.sha1(f"commit {len(self.hub.commits)}".encode()).hexdigest()


_REPO = r"([\w.-]+/[\w.-]+)"
_ROUTES = [
    (("GET",), r"/api/whoami-v2", _Handler.whoami),
    (("POST",), r"/api/repos/create", _Handler.create),
    (("POST",), r"/api/validate-yaml", _Handler.validate),
    (("GET",), rf"/api/models/{_REPO}(?:/revision/[^/]+)?", _Handler.info),
    (("POST",), rf"/api/models/{_REPO}/preupload/([^/]+)", _Handler.preupload),
    (("POST",), rf"/{_REPO}\.git/info/lfs/objects/batch", _Handler.batch),
    (("PUT",), r"/lfs/([0-9a-f]{64})", _Handler.put),
    (("POST",), r"/lfs/verify", _Handler.verify),
    (("POST",), rf"/api/models/{_REPO}/commit/([^/]+)", _Handler.commit),
    (("GET", "HEAD"), rf"/{_REPO}/resolve/([^/]+)/(.+)", _Handler.resolve),
]


def front_matter_problems(card: str) -> list[str]:
    """What the Hub refuses in a model card's YAML: no front matter, or a base_model that is no repository
    name."""
    found = re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)
    if not found:
        return ["the card has no YAML front matter"]
    data = yaml.safe_load(found[1])
    bases = data.get("base_model", [])
    bases = bases if isinstance(bases, list) else [bases]
    problems = [
        f'"base_model" {b!r} must be a repository'
        for b in bases
        if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", b)
    ]
    if not isinstance(data.get("tags", []), list):
        problems.append('"tags" must be a list')
    return problems


@contextmanager
def running() -> Iterator[Hub]:
    """A server on a free port until the block ends."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
