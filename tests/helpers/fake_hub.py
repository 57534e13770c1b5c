"""A small hub on 127.0.0.1, with which huggingface_hub talks for real.

It serves what a download uses: the model's listing, its tree, and files by HEAD, GET and Range. Every answer is
written down, so that a test can say what was asked for and how many bytes went out.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest


@dataclass
class Repository:
    """A model: the files at each commit, and the branches that name commits."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    gated: bool = False
    token: str | None = None


@dataclass(frozen=True)
class Served:
    """One answer: what was asked for, with which headers, and how many bytes of body went out."""

    method: str
    path: str
    range: str | None
    token: str | None
    status: int
    nbytes: int


class FakeHub:
    """The hub's repositories, its faults, and the list of what it served."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.served: list[Served] = []
        self.cut_once: dict[str, int] = {}
        self.cut_always: dict[str, int] = {}
        self.status_of: dict[str, int] = {}
        self.always_status: int | None = None
        self.knows_ranges = True
        self.knows_sizes = True
        self.url = ""

    def add(self, model: str, files: dict[str, bytes], *, branch: str = "main") -> Repository:
        """Puts a commit of a model on a branch."""
        repository = self.repositories.setdefault(model, Repository())
        commit = hashlib.sha1(repr((model, branch, sorted(files.items()))).encode()).hexdigest()
        repository.commits[commit] = files
        repository.branches[branch] = commit
        return repository

    def fetched(self, method: str = "GET") -> list[str]:
        """The files whose bytes were asked for, in order."""
        return [each.path.split("/resolve/")[1].split("/", 1)[1] for each in self.files_served(method)]

    def files_served(self, method: str = "GET") -> list[Served]:
        """The answers about files."""
        return [each for each in self.served if each.method == method and "/resolve/" in each.path]

    @contextmanager
    def running(self) -> Iterator[FakeHub]:
        """Serves until the block ends."""
        server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        self.url = f"http://127.0.0.1:{server.server_port}"
        try:
            yield self
        finally:
            server.shutdown()
            server.server_close()
            thread.join()


@contextmanager
def connected(hub: FakeHub, cache: Path, patch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A running hub, and huggingface_hub sent to it with an empty cache and no token."""
    from huggingface_hub import constants

    with hub.running():
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
            patch.delenv(name, raising=False)
        patch.setenv("NO_PROXY", "127.0.0.1")
        patch.setattr(constants, "ENDPOINT", hub.url)
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr(constants, "HF_HUB_CACHE", str(cache))
        patch.setattr(constants, "HF_TOKEN_PATH", str(cache / "token"))
        yield hub


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: FakeHub

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if self.hub.always_status is not None:
            return self._send(self.hub.always_status, b"", {})
        if path.startswith("/api/models/"):
            model, _, rest = path.removeprefix("/api/models/").partition("/revision/")
            if not rest:
                model, _, rest = path.removeprefix("/api/models/").partition("/tree/")
            revision, what = rest or "main", "tree" if "/tree/" in path else "info"
        else:
            model, _, rest = path[1:].partition("/resolve/")
            revision, _, what = rest.partition("/")
        refused = self._refusal(model, revision)
        if refused is not None:
            status, code = refused
            return self._send(status, b"", {"X-Error-Code": code} if code else {})
        repository = self.hub.repositories[model]
        commit = repository.branches.get(revision, revision)
        if path.startswith("/api/"):
            return self._send_listing(model, commit, repository.commits[commit], what)
        return self._send_file(commit, repository.commits[commit], what)

    def _refusal(self, model: str, revision: str) -> tuple[int, str] | None:
        repository = self.hub.repositories.get(model)
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        if repository is None:
            return (404 if token else 401), "RepoNotFound"
        if repository.token is not None and token != repository.token:
            if not repository.gated:
                return 401, "RepoNotFound"
            if "/resolve/" in self.path:  # what a gated repository holds may be listed by anyone
                return (403 if token else 401), "GatedRepo"
        if repository.branches.get(revision, revision) not in repository.commits:
            return 404, "RevisionNotFound"
        return None

    def _send_listing(self, model: str, commit: str, files: dict[str, bytes], what: str) -> None:
        entries: list[dict[str, Any]] = []
        for name, data in files.items():
            big = name.endswith((".safetensors", ".bin", ".gguf"))
            lfs = {"size": len(data), "sha256": _etag(data), "oid": _etag(data), "pointerSize": 130}
            size = {"size": len(data)} if self.hub.knows_sizes or what == "tree" else {}
            names = {"type": "file", "path": name, "rfilename": name, "oid": _etag(data), "blobId": _etag(data)}
            entries.append({**names, **size, **({"lfs": lfs} if big else {})})
        body = entries if what == "tree" else {"id": model, "sha": commit, "siblings": entries}
        self._send(200, json.dumps(body).encode(), {"Content-Type": "application/json"})

    def _send_file(self, commit: str, files: dict[str, bytes], name: str) -> None:
        if name not in files:
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        if name in self.hub.status_of:
            return self._send(self.hub.status_of[name], b"", {})
        data = files[name]
        headers = {"ETag": f'"{_etag(data)}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        asked = self.headers.get("Range")
        if asked is None or not self.hub.knows_ranges:
            cut = self.hub.cut_always.get(name) or (
                self.hub.cut_once.pop(name, None) if self.command == "GET" else None
            )
            return self._send(200, data, headers, cut)
        first, last = asked.removeprefix("bytes=").split("-")
        begin, end = int(first), min(int(last or len(data)) + 1, len(data))
        headers["Content-Range"] = f"bytes {begin}-{end - 1}/{len(data)}"
        return self._send(206, data[begin:end], headers)

    def _send(self, status: int, body: bytes, headers: dict[str, str], cut: int | None = None) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        sent = b"" if self.command == "HEAD" else body[:cut]
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        path = unquote(urlsplit(self.path).path)
        self.hub.served.append(Served(self.command, path, self.headers.get("Range"), token, status, len(sent)))
        self.wfile.write(sent)
        if cut is not None:
            self.close_connection = True


def _etag(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
