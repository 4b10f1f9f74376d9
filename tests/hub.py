"""A small Hugging Face hub on 127.0.0.1 that serves folders as model repositories.

It implements the part of the hub's HTTP API that `huggingface_hub` uses: model information, tree, files with ETag,
X-Repo-Commit, Content-Length and Range. It returns 403 for a gated model and 401 for a missing one, as the real hub.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

from inferctl.core.errors import UsageError
from inferctl.models.model import ModelFolder

BRANCH = "main"
_CHUNK = 64 * 1024


@dataclass
class Repository:
    """A model repository. `gated`: requires a token. `counted`: the hub knows the number of parameters.

    `commit` is by default a hash of the names and sizes of the files.
    """

    folder: Path
    gated: bool = False
    counted: bool = True
    commit: str = ""

    def __post_init__(self) -> None:
        if not self.commit:
            listed = "\n".join(f"{name} {file.stat().st_size}" for name, file in self.files().items())
            self.commit = hashlib.sha1(listed.encode()).hexdigest()

    def files(self) -> dict[str, Path]:
        """Return the files by name in the repository."""
        found = (file for file in self.folder.rglob("*") if file.is_file())
        return {file.relative_to(self.folder).as_posix(): file for file in sorted(found)}


@dataclass
class Hub:
    """A running hub. `requests`: received requests, such as `GET /api/models/org/m`. `sent`: bytes of sent files.

    `status`: status of every response. `bytes_per_second`: speed of files, None for no limit.
    """

    repositories: dict[str, Repository]
    url: str = ""
    requests: list[str] = field(default_factory=list)
    sent: int = 0
    status: int | None = None
    bytes_per_second: float | None = None

    def downloads(self) -> list[str]:
        """Names of the sent files, in order."""
        return [
            line.split("/resolve/", 1)[1].split("/", 1)[1]
            for line in self.requests
            if line.startswith("GET") and "/resolve/" in line
        ]


@contextmanager
def serving(repositories: dict[str, Repository | Path]) -> Iterator[Hub]:
    """Run a hub on a free port of 127.0.0.1."""
    found = {name: one if isinstance(one, Repository) else Repository(one) for name, one in repositories.items()}
    hub = Hub(found)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def online(hub: Hub | str, home: Path) -> dict[str, str]:
    """Return the environment of a command that uses `hub` and a separate cache."""
    url = hub if isinstance(hub, str) else hub.url
    return {**{k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE"}, "HF_HOME": str(home), "HF_ENDPOINT": url}


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:  # named by http.server
        self._respond(body=False)

    def do_GET(self) -> None:
        self._respond(body=True)

    def log_message(self, format: str, *arguments: object) -> None:
        pass

    def _respond(self, body: bool) -> None:
        self.hub.requests.append(f"{self.command} {self.path}")
        if self.hub.status:
            self._error(self.hub.status, None, "the hub has a bad day")
            return
        path = unquote(urlsplit(self.path).path)
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?", path):
            name, what, revision = found.groups()
            if (repository := self._repository(name, revision or BRANCH)) is not None:
                self._json(_tree(repository) if what == "tree" else _info(name, repository))
        elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            name, revision, file = found.groups()
            if (repository := self._repository(name, revision)) is None:
                return
            if repository.gated and "authorization" not in self.headers:
                self._error(403, "GatedRepo", f"Access to model {name} is restricted.")
            elif file not in repository.files():
                self._error(404, "EntryNotFound", f"{file} does not exist", repository.commit)
            else:
                self._file(repository, repository.files()[file], body)
        else:
            self._error(404, None, "no such page")

    def _repository(self, name: str, revision: str) -> Repository | None:
        repository = self.hub.repositories.get(name)
        if repository is None:
            self._error(401, "RepoNotFound", "Invalid username or password.")
        elif revision not in (BRANCH, repository.commit):
            self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        else:
            return repository
        return None

    def _json(self, value: object) -> None:
        data = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _error(self, status: int, code: str | None, message: str, commit: str | None = None) -> None:
        data = json.dumps({"error": message}).encode()
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        if commit:
            self.send_header("X-Repo-Commit", commit)
        self.send_header("X-Error-Message", message)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _file(self, repository: Repository, file: Path, body: bool) -> None:
        size = file.stat().st_size
        start, end = 0, size
        if asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, end = int(asked[1]), min(int(asked[2]) + 1, size) if asked[2] else size
        self.send_response(206 if asked else 200)
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{size}")
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("ETag", f'"{_etag(file)}"')
        self.send_header("X-Repo-Commit", repository.commit)
        self.send_header("Content-Length", str(end - start))
        self.end_headers()
        if not body:
            return
        with file.open("rb") as stream:
            stream.seek(start)
            while (left := end - stream.tell()) > 0:
                chunk = stream.read(min(_CHUNK, left))
                try:
                    self.wfile.write(chunk)
                except OSError:
                    self.close_connection = True
                    return
                self.hub.sent += len(chunk)
                if self.hub.bytes_per_second:
                    time.sleep(len(chunk) / self.hub.bytes_per_second)


_ETAGS: dict[tuple[Path, int, int], str] = {}


def _etag(file: Path) -> str:
    stat = file.stat()
    key = (file, stat.st_size, stat.st_mtime_ns)
    if key not in _ETAGS:
        with file.open("rb") as stream:
            _ETAGS[key] = hashlib.file_digest(stream, "sha256").hexdigest()
    return _ETAGS[key]


def _info(name: str, repository: Repository) -> dict[str, object]:
    siblings = [
        {"rfilename": path, "size": file.stat().st_size, "blobId": _etag(file)[:40]}
        for path, file in repository.files().items()
    ]
    gated = "manual" if repository.gated else False
    info = {"_id": name, "id": name, "modelId": name, "sha": repository.commit, "private": False, "gated": gated}
    if repository.counted:
        try:
            total = ModelFolder(repository.folder).parameters
        except UsageError:  # a hostile folder
            total = 1
        info["safetensors"] = {"total": total, "parameters": {}}
    return {**info, "siblings": siblings}


def _tree(repository: Repository) -> list[dict[str, object]]:
    return [
        {"type": "file", "path": path, "size": file.stat().st_size, "oid": _etag(file)[:40]}
        for path, file in repository.files().items()
    ]
