"""Search everything that a server leaves for API keys and texts of its clients.

    python benchmarks/peers/secrets_scan.py [--engine echo] [--json FILE]

Starts a server with keys, JSON logs, metering, a ledger and a cache in an empty folder, where core files of any size
are allowed. Sends marked texts and keys in valid requests and in all kinds of wrong ones, and makes the engine fail.
Then it kills engine and server with SIGSEGV, and searches all files, the metrics and the error responses, also for
encoded forms of the marks and for token ids. Exits with 1 if it finds any.

At last, a second server runs without its limit of core files, and is killed. What its core file has is shown: it is
what the limit prevents.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import resource
import secrets
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
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
        except OSError:
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


def serve(folder: Path, engine: str | None) -> tuple[subprocess.Popen[bytes], str]:
    """Start a server in `folder`, which may write core files of any size as far as its parent is concerned."""
    file = folder / "inferctl.yaml"
    spec = {
        "name": "minilm",
        "model": {"source": str(peers.MODEL)},
        "access": {"keys": str(folder / "keys.json")},
        "metering": {"mode": "on", "data": str(folder / "metering")},
        "cache": {"size": "16MiB"},
    }
    file.write_text(json.dumps(spec))
    announce = folder / "ready.json"
    command = [sys.executable, "-m", "inferctl", "serve", "--spec", str(file), "--port", "0", "--log", "json"]
    command += ["--announce", str(announce), *(["--engine", engine] if engine else [])]
    hard = resource.getrlimit(resource.RLIMIT_CORE)[1]
    environment = {**peers.environment(), "TMPDIR": str(folder), "PYTHONPATH": f"{folder}:{peers.ROOT}"}
    with (folder / "server.log").open("wb") as stream:
        process = subprocess.Popen(
            ["sh", "-c", f'ulimit -c {"unlimited" if hard < 0 else hard}; exec "$0" "$@"', *command],
            cwd=folder,
            env=environment,
            stdout=stream,
            stderr=stream,
            start_new_session=True,
        )
    limit = time.monotonic() + peers.START_SECONDS
    while not announce.exists():
        if process.poll() is not None or time.monotonic() > limit:
            sys.exit(f"error: the server did not start\n{(folder / 'server.log').read_text()}")
        time.sleep(0.1)
    return process, json.loads(announce.read_text())["url"]


def children(pid: int) -> list[int]:
    return [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def create_key(folder: Path) -> str:
    """Return a new API key of the folder's key file."""
    command = [sys.executable, "-m", "inferctl", "keys", "create", "team-a", "--admin", "--file", "keys.json"]
    environment = {**os.environ, "PYTHONPATH": str(peers.ROOT)}
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=True
    ).stdout.strip()


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


def events(folder: Path) -> int:
    """Return how many events the ledger has; 0 before the worker made it."""
    try:
        with contextlib.closing(sqlite3.connect(f"file:{folder}/metering/ledger.sqlite?mode=ro", uri=True)) as ledger:
            return int(ledger.execute("select count(*) from usage_events").fetchone()[0])
    except sqlite3.OperationalError:
        return 0


def run(folder: Path, engine: str | None, marks: Marks) -> dict[str, Any]:
    """Run a server, send everything, kill it, and return what was found where."""
    key = create_key(folder)
    marks.keys = {"key": key, "secret of the key": key.rpartition("_")[2]}
    marks.keys |= {"wrong key": create_key(folder)[:-1] + "x", "query key": f"ik_live_{secrets.token_hex(30)}"}
    process, url = serve(folder, engine)
    client = Client(url, key, marks)
    try:
        statuses = client.traffic()
        limit = time.monotonic() + 60
        while events(folder) < len(statuses) - 4 and time.monotonic() < limit:  # those with a valid key
            time.sleep(0.2)
        request = urllib.request.Request(f"{url}/metrics", headers={"authorization": f"Bearer {key}"})
        with urllib.request.urlopen(request) as response:
            (folder / "metrics.txt").write_bytes(response.read())
        stored = events(folder)
        for pid in children(process.pid):
            if b"inferctl.worker" not in Path(f"/proc/{pid}/cmdline").read_bytes():
                os.kill(pid, signal.SIGSEGV)  # the engine
        time.sleep(1)
        process.send_signal(signal.SIGSEGV)
        process.wait(60)
        time.sleep(2)  # the worker ends by itself
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    found = {}
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    for file in files:
        if names := search(file, marks.needles()):
            found[str(file.relative_to(folder))] = sorted(names)
    # Errors may quote a text of the request, to the client that sent it, but no key.
    responses = folder / "responses"
    responses.write_bytes(client.errors)
    keys = {name: needle for name, needle in marks.needles().items() if name.rpartition(" (")[0] in marks.keys}
    if names := search(responses, keys):
        found["error responses"] = sorted(names)
    cores = [file.name for file in files if file.name.startswith("core")]
    return {"statuses": statuses, "events": stored, "files": len(files), "found": found, "core_files": cores}


def forced_core(folder: Path, engine: str | None, marks: Marks) -> list[str] | None:
    """Return what the core file of a server without the limit has; None if the kernel writes none here."""
    key = create_key(folder)
    marks.keys = {"key": key}
    (folder / "sitecustomize.py").write_text("from inferctl import core_files\ncore_files.disable = lambda: None\n")
    process, url = serve(folder, engine)
    client = Client(url, key, marks)
    for _ in range(5):
        client.send("/v1/embeddings", {"input": f"{marks.texts['text']} a text"})
        client.send("/v1/embeddings", {"input": marks.token_ids})
    process.send_signal(signal.SIGSEGV)
    process.wait(120)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    cores = [file for file in folder.iterdir() if file.name.startswith("core")]
    return sorted({name for core in cores for name in search(core, marks.needles())}) if cores else None


def main() -> int:
    parser = peers.options(__doc__ or "")
    parser.add_argument("--engine", choices=["echo"], help="run without the model, which also injects failures")
    parser.add_argument("--no-core", action="store_true", help="do not force a core file")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="secrets-scan-") as first, tempfile.TemporaryDirectory() as second:
        result = run(Path(first), options.engine, Marks())
        forced = None if options.no_core else forced_core(Path(second), options.engine, Marks())
    pattern = Path("/proc/sys/kernel/core_pattern").read_text().strip()
    print(f"{result['files']} files, {result['events']} events in the ledger; statuses: {result['statuses']}")
    print(f"core files of a server that was killed: {result['core_files'] or 'none'} (core_pattern: {pattern})")
    for place, names in result["found"].items():
        print(f"FOUND in {place}: {', '.join(names)}")
    if forced is not None:
        print(f"a core file, without the limit, has: {', '.join(forced) or 'none of the marks'}")
    peers.write(options.json, {**result, "forced_core_file_has": forced, "core_pattern": pattern})
    return 1 if result["found"] or result["core_files"] else 0


if __name__ == "__main__":
    sys.exit(main())
