"""Real servers for the check: start, ask, end."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from results import STAND_IN

from inferctl.bench.load import process_usage

# The stand-in may run on a busy machine, beside other tests.
PATIENCE = 6.0 if STAND_IN else 1.0


class Server:
    """A running server of `inferctl serve`. `seconds`: from its start until it was ready. `log`: its stderr."""

    def __init__(self, url: str, process: subprocess.Popen[bytes], log: Path, seconds: float) -> None:
        self.url, self.process, self.log, self.seconds = url, process, log, seconds

    def get(self, path: str) -> str:
        with urllib.request.urlopen(f"{self.url}{path}", timeout=10 * PATIENCE) as response:
            return str(response.read().decode())

    def info(self) -> Any:
        return json.loads(self.get("/info"))

    def metric(self, name: str) -> float:
        """Return the sum over all labels. Raises `KeyError` if there is no such metric."""
        lines = re.findall(rf"^inferctl_{name}(?:\{{.*\}})? (\S+)$", self.get("/metrics"), re.MULTILINE)
        if not lines:
            raise KeyError(name)
        return sum(map(float, lines))

    def ready(self) -> bool:
        with suppress(OSError):
            return bool(self.get("/readyz"))
        return False

    def embed(self, texts: Any) -> int:
        """Return the status of a request for embeddings; 0 without a response."""
        return self.answers([texts])[0][0]

    def embed_many(self, bodies: list[Any], clients: int = 16) -> list[int]:
        """Return the statuses of requests that are sent at the same time."""
        return [status for status, _ in self.answers(bodies, clients)]

    def answers(self, bodies: list[Any], clients: int = 16) -> list[tuple[int, Any]]:
        """Return what `post` returns for requests that are sent at the same time."""
        with ThreadPoolExecutor(clients) as pool:
            return list(pool.map(lambda texts: post(f"{self.url}/v1/embeddings", {"input": texts}), bodies))

    def engines(self) -> list[int]:
        """Return the process ids of the engines."""
        return [pid for pid in process_usage.tree(self.process.pid) if b"engine_process.engine_main" in _command(pid)]


def post(url: str, body: Any, timeout: float = 120) -> tuple[int, Any]:
    """Return the status and the JSON of the response; 0 and the error without one."""
    request = urllib.request.Request(url, json.dumps(body).encode(), {"content-type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=timeout) as response:
            return response.status, json.loads(response.read())
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode(errors="replace")
    except OSError as error:
        return 0, str(error)


@contextmanager
def serving(
    work: Path, name: str, *arguments: str, seconds: float = 120, environment: Mapping[str, str] = os.environ
) -> Iterator[Server]:
    """Run `inferctl serve ARGUMENTS` until the block ends. Raises `RuntimeError` if it is not ready in time."""
    announce, log = work / f"{name}.json", work / f"{name}.log"
    announce.unlink(missing_ok=True)
    command = [sys.executable, "-m", "inferctl", "serve", "--port", "0", "--announce", str(announce), *arguments]
    started = time.monotonic()
    with log.open("wb") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=stream, env=dict(environment), cwd=work)
    try:
        while not announce.exists():
            if process.poll() is not None:
                raise RuntimeError(f"the server ended with exit code {process.returncode}: {tail(log)}")
            if time.monotonic() - started > seconds * PATIENCE:
                raise RuntimeError(f"the server was not ready after {seconds:.0f} s: {tail(log)}")
            time.sleep(0.05)
        yield Server(json.loads(announce.read_text())["url"], process, log, time.monotonic() - started)
    finally:
        process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(15)
        process.kill()
        process.wait()


def refused(work: Path, *arguments: str, environment: Mapping[str, str]) -> tuple[int, str]:
    """Return the exit code and the message of a server that should not start. It is ended after a minute."""
    command = [sys.executable, "-m", "inferctl", "serve", "--port", "0", *arguments]
    try:
        limit = 60 * PATIENCE
        ran = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=limit, env=dict(environment), cwd=work
        )
    except subprocess.TimeoutExpired:
        return 0, "it started"
    return ran.returncode, " ".join(ran.stderr.split())[-400:]


def until(condition: Any, seconds: float) -> bool:
    """Wait until `condition()` is true, and return whether it was in time."""
    end = time.monotonic() + seconds * PATIENCE
    while time.monotonic() < end:
        with suppress(OSError):
            if condition():
                return True
        time.sleep(0.1)
    return False


def tail(log: Path) -> str:
    return " ".join(log.read_text(errors="replace").split())[-500:]


def _command(pid: int) -> bytes:
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""
