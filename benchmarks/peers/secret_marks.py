"""What the scans of `secrets_scan.py` share: marks, a client that sends them everywhere, processes and the search."""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import os
import resource
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import peers

sys.path.insert(0, str(peers.ROOT))
FAILING, CRASHING = 14, 15  # token ids for which the echo engine fails
_CHUNK_BYTES = 64 * 1024 * 1024


class Marks:
    """Texts that must not be found, by name. Each one is random, so that a find is no accident."""

    def __init__(self) -> None:
        self.texts = {name: f"zq{secrets.token_hex(10)}" for name in ("text", "field", "value", "query", "header")}
        self.keys: dict[str, str] = {}
        self.token_ids = [1000 + secrets.randbelow(20_000) for _ in range(16)]

    def add_keys(self, key: str, other: str) -> None:
        """Mark a key that requests use, and keys that are not valid."""
        self.keys |= {"key": key, "secret of the key": key.rpartition("_")[2]}
        self.keys |= {"wrong key": other[:-1] + "x", "query key": f"ik_live_{secrets.token_hex(30)}"}

    def needles(self) -> dict[str, bytes]:
        """Return what to search for: the marks, their usual encodings, and the token ids."""
        found = {}
        for name, text in [*self.texts.items(), *self.keys.items()]:
            raw = text.encode()
            # The middle of a base64 text depends on where the mark begins in what is encoded.
            forms = {"plain": raw, "hex": raw.hex().encode(), "UTF-16": text.encode("utf-16-le")}
            forms |= {f"base64 {skip}": base64.b64encode(raw[skip:])[:-4] for skip in range(3)}
            found |= {f"{name} ({form})": value for form, value in forms.items()}
        found["token ids (int32)"] = b"".join(number.to_bytes(4, "little") for number in self.token_ids)
        found["token ids (JSON)"] = ", ".join(map(str, self.token_ids)).encode()
        found["token ids (short JSON)"] = ",".join(map(str, self.token_ids)).encode()
        return found


class Client:
    """Sends marked requests to a server, and keeps the error responses."""

    def __init__(self, url: str, key: str, marks: Marks) -> None:
        self._url, self._key, self._marks = url, key, marks
        self.errors = b""

    def send(self, path: str, body: Any = None, key: str | None = None, **headers: str) -> int:
        """Send a request (POST with a body), and return its status; 0 if the server ends."""
        raw = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        headers |= {"authorization": f"Bearer {self._key if key is None else key}", "content-type": "application/json"}
        request = urllib.request.Request(f"{self._url}{path}", raw, headers)
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                response.read()
                return int(response.status)
        except urllib.error.HTTPError as error:
            self.errors += b"%s\n%s\n" % (str(error.headers).encode(), error.read())
            return error.code
        except (OSError, http.client.HTTPException):
            return 0

    def send_raw(self, content: bytes) -> None:
        """Send bytes that are no request, or only a part of one, and close the connection."""
        parts = urlsplit(self._url)
        with socket.create_connection((parts.hostname or "", parts.port or 80)) as connection:
            connection.sendall(content)
            connection.settimeout(1)
            with contextlib.suppress(OSError):
                self.errors += connection.recv(65536)

    def traffic(self) -> dict[str, int]:
        """Send everything, and return the statuses."""
        texts, path = self._marks.texts, "/v1/embeddings"
        text, wrong = texts["text"], self._marks.keys["wrong key"]
        found = {
            "valid": self.send(path, {"input": [f"{text} a text", "another one"], "user": texts["value"]}),
            "cached": self.send(path, {"input": f"{text} a text"}),
            "token ids": self.send(path, {"input": self._marks.token_ids}),
            "long": self.send(path, {"input": f"{text} word " * 5000}),
            "truncated": self.send(path, {"input": f"{text} word " * 5000, "truncate": True}),
            "no JSON": self.send(path, f'{{"input": "{text}'.encode()),
            "unknown field": self.send(path, {"input": text, texts["field"]: texts["value"]}),
            "wrong type": self.send(path, {"input": {texts["field"]: texts["value"]}}),
            "unknown model": self.send(path, {"input": text, "model": texts["value"]}),
            "wrong key": self.send(path, {"input": text}, wrong),
            "key in the query": self.send(f"{path}?api_key={self._marks.keys['query key']}&q={texts['query']}", {}),
            "key in the path": self.send(f"/{self._marks.keys['query key']}/{texts['query']}"),
            "unknown header": self.send(path, {"input": text}, x_unknown=texts["header"]),
            "priority": self.send(path, {"input": text}, x_priority=texts["header"]),
            "content type": self.send(path, b"text", content_encoding=texts["header"]),
            "large": self.send(path, text.encode() * 300_000),
            "engine fails": self.send(path, {"input": [FAILING, *self._marks.token_ids]}),
            "engine crashes": self.send(path, {"input": [CRASHING, *self._marks.token_ids]}),
            "surrogates": self.send(path, b'{"input": "\\ud800 %s"}' % text.encode()),
        }
        head = f"POST {path} HTTP/1.1\r\nhost: a\r\nauthorization: Bearer {self._key}\r\n"
        self.send_raw(f"{head}content-length: 1000\r\n\r\n{text}".encode())  # the client leaves
        self.send_raw(f"{text} {wrong} HTTP/9\r\n\r\n".encode())
        self.send_raw(f"{head}{texts['header']}\r\n\r\n".encode())
        return found


def launch(folder: Path, log: str, *arguments: str, **environment: str) -> subprocess.Popen[bytes]:
    """Start `inferctl` with its output in a file. It may write core files as far as its parent is concerned."""
    command = [sys.executable, "-m", "inferctl", *arguments]
    hard = resource.getrlimit(resource.RLIMIT_CORE)[1]
    paths = os.pathsep.join([str(folder), *filter(None, [environment.pop("PYTHONPATH", "")]), str(peers.ROOT)])
    with (folder / log).open("wb") as stream:
        return subprocess.Popen(
            ["sh", "-c", f'ulimit -c {"unlimited" if hard < 0 else hard}; exec "$0" "$@"', *command],
            cwd=folder,
            env={**peers.environment(), **environment, "TMPDIR": str(folder), "PYTHONPATH": paths},
            stdout=stream,
            stderr=stream,
            start_new_session=True,
        )


def url_of(process: subprocess.Popen[bytes], announce: Path) -> str:
    """Return the URL of a server or a gateway when it is ready."""
    limit = time.monotonic() + peers.START_SECONDS
    while not announce.exists():
        if process.poll() is not None or time.monotonic() > limit:
            logs = "".join(file.read_text() for file in announce.parent.glob("*.log"))
            sys.exit(f"error: {announce.stem} did not start\n{logs}")
        time.sleep(0.1)
    return str(json.loads(announce.read_text())["url"])


def serve(folder: Path, name: str, *arguments: str, **environment: str) -> tuple[subprocess.Popen[bytes], str]:
    """Start a server with JSON logs. Files are named after `name`."""
    announce = folder / f"{name}.json"
    command = ["serve", "--port", "0", "--log", "json", "--announce", str(announce), *arguments]
    process = launch(folder, f"{name}.log", *command, **environment)
    try:
        return process, url_of(process, announce)
    except BaseException:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        raise


def search(file: Path, needles: dict[str, bytes]) -> set[str]:
    """Return the names of the needles that a file has."""
    found, kept = set(), b""
    longest = max(map(len, needles.values()))
    with file.open("rb") as stream:
        while part := stream.read(_CHUNK_BYTES):
            data = kept + part
            found |= {name for name, needle in needles.items() if needle in data}
            kept = data[-longest:]
    return found


def search_all(folder: Path, errors: bytes, marks: Marks) -> dict[str, Any]:
    """Return the number of files, the names of the needles by file, and the core files."""
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    needles = marks.needles()
    found = {str(file.relative_to(folder)): sorted(search(file, needles)) for file in files}
    found = {name: names for name, names in found.items() if names} | search_errors(folder, errors, marks)
    cores = [file.name for file in files if file.name.startswith("core")]
    return {"files": len(files), "found": found, "core_files": cores}


def search_errors(folder: Path, errors: bytes, marks: Marks) -> dict[str, list[str]]:
    """Search error responses. They may quote a text of the request, to the client that sent it, but no key."""
    responses = folder / "responses"
    responses.write_bytes(errors)
    keys = {name: needle for name, needle in marks.needles().items() if name.rpartition(" (")[0] in marks.keys}
    names = search(responses, keys)
    return {"error responses": sorted(names)} if names else {}
