"""Starts the servers of inferctl as processes, asks them, waits and ends them, for the tests of all folders."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import httpx
from prometheus_client.parser import text_string_to_metric_families

from inferctl.core.errors import UsageError

START_SECONDS = 120
# `httpx.get` and `httpx.post` load the certificates of all authorities on each call: 7 ms of CPU time. Each request of
# this client opens a connection, as theirs do.
CLIENT = httpx.Client(timeout=60, limits=httpx.Limits(max_keepalive_connections=0))


def until(condition: Callable[[], object], seconds: float = START_SECONDS) -> None:
    """Return when `condition()` is true. Fails after some seconds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "timeout"
        time.sleep(0.02)


def is_ready(url: str) -> bool:
    """Whether a server answers `/readyz` with 200. False before it accepts connections."""
    try:
        return CLIENT.get(f"{url}/readyz").status_code == 200
    except httpx.TransportError:
        return False


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def execute(*command: object, code: int | None = None, **settings: Any) -> subprocess.CompletedProcess[str]:
    """Run a command to its end. With `code`, fails with its output if it ends with another exit code."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False, **settings)
    assert code in (None, done.returncode), f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def python(*arguments: object, **settings: Any) -> subprocess.CompletedProcess[str]:
    return execute(sys.executable, *arguments, **settings)


def inferctl(*arguments: object, **settings: Any) -> subprocess.CompletedProcess[str]:
    return python("-m", "inferctl", *arguments, **{"timeout": 200, **settings})


def several(commands: Sequence[Sequence[str]], **settings: Any) -> list[subprocess.CompletedProcess[str]]:
    """Run commands of inferctl one after the other in one process, which is started once."""
    done = python("-c", _SEVERAL, input=json.dumps(commands), timeout=200, code=0, **settings)
    results = [json.loads(line) for line in done.stdout.splitlines()]
    return [subprocess.CompletedProcess(list(c), *result) for c, result in zip(commands, results, strict=True)]


_SEVERAL = """
import contextlib, io, json, sys
from inferctl import cli
for command in json.load(sys.stdin):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.run(command)
    print(json.dumps([code, out.getvalue(), err.getvalue()]))
"""


@dataclass
class ServerProcess:
    """A process of `inferctl serve` or `gateway`. `log` is the file with its stderr. `url`: when it is ready."""

    process: subprocess.Popen[bytes]
    log: Path
    announced: Path
    url: str = ""

    @classmethod
    def launch(cls, folder: Path, *command: str, name: str = "server", **environment: str) -> Self:
        """Start `python -m COMMAND` in `folder`, where its log is, in its own process group."""
        announced, log = folder / f"{name}-ready.json", folder / f"{name}.log"
        announced.unlink(missing_ok=True)
        with log.open("wb") as stream:
            process = subprocess.Popen(
                [sys.executable, "-m", *command, "--announce", str(announced)],
                stdout=subprocess.DEVNULL,
                stderr=stream,
                cwd=folder,
                env=os.environ | environment,
                start_new_session=True,
            )
        return cls(process, log, announced)

    def wait_announced(self, seconds: float = START_SECONDS) -> Self:
        """Wait until the server is ready. Fails with its log if it ends before."""
        until(lambda: self.announced.exists() or self.process.poll() is not None, seconds)
        assert self.process.poll() is None, self.log.read_text()
        found = json.loads(self.announced.read_text())
        assert found["pid"] == self.process.pid
        self.url = found["url"]
        return self

    def stop(self, number: int = signal.SIGTERM, seconds: float = 60) -> int:
        """Send a signal, wait, and return the exit code."""
        self.process.send_signal(number)
        return self.process.wait(seconds)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def get(self, path: str, key: str | None = None) -> httpx.Response:
        return CLIENT.get(f"{self.url}{path}", headers=_headers(key, {}))

    def post(self, path: str, body: object = None, key: str | None = None, **headers: str | bytes) -> httpx.Response:
        """Send a body as JSON, or bytes as they are, with an API key. A `_` in the name of a header is a `-`."""
        content: Any = {"content" if isinstance(body, bytes) else "json": body}
        return CLIENT.post(f"{self.url}{path}", headers=_headers(key, headers), **content)

    def embed(self, **body: object) -> httpx.Response:
        return self.post("/v1/embeddings", body)

    def readiness(self) -> tuple[int, str]:
        """Return the status and the text of `/readyz`, or 0 and "" if a killed process had accepted the connection."""
        try:
            response = self.get("/readyz")
        except (httpx.ReadError, httpx.RemoteProtocolError):
            return 0, ""
        return response.status_code, response.text

    def metric(self, name: str, **labels: str) -> float:
        for family in text_string_to_metric_families(self.get("/metrics").text):
            for sample in family.samples:
                if sample.name == name and labels.items() <= sample.labels.items():
                    return float(sample.value)
        return 0.0

    def wait_ready(self) -> None:
        until(lambda: self.get("/readyz").status_code == 200)

    def usage(self, *dimensions: str) -> list[dict[str, Any]]:
        """What the ledger has of this server, by `dimensions`; nothing before the relay has made the ledger."""
        from inferctl.tenancy.metering.ledger import Ledger  # which imports SQLAlchemy

        with contextlib.suppress(UsageError):
            ledger = Ledger.read(f"sqlite:///{self.log.parent}/metering/ledger.sqlite")
            try:
                return ledger.usage(dimensions, 0, 2**62)
            finally:
                ledger.close()
        return []

    def children(self, module: str = "") -> list[int]:
        """Return the processes that the server started, the oldest first; with `module`, those that run it."""
        pids = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        found = []
        for pid in map(int, pids.split()):
            with contextlib.suppress(OSError):  # it ended
                if not module or module.encode() in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0"):
                    found.append(pid)
        return found

    def api_pids(self) -> list[int]:
        return self.children("inferctl.serve.processes.api_process")

    def engine_pid(self) -> int:
        api = self.api_pids()
        return next(pid for pid in self.children() if pid not in api)


def _headers(key: str | None, others: dict[str, str | bytes]) -> dict[bytes, bytes]:
    headers = {"authorization": f"Bearer {key}"} | others if key else others
    pairs = ((name, value if isinstance(value, bytes) else value.encode()) for name, value in headers.items())
    return {name.replace("_", "-").encode(): value for name, value in pairs}


def write_spec(folder: Path, source: Path, /, **sections: object) -> str:
    """Write `inferctl.yaml` of a server with the name `echo`, and return its path."""
    file = folder / "inferctl.yaml"
    file.write_text(json.dumps({"name": "echo", "model": {"source": str(source)}, **sections}))
    return str(file)


def start(folder: Path, *arguments: str, **environment: str) -> ServerProcess:
    """Start `inferctl serve` on a free port, and wait until it is ready. `TEST_API_PROCESSES`: how many it has."""
    if processes := os.environ.get("TEST_API_PROCESSES"):
        environment = {"INFERCTL_SERVE_API_PROCESSES": processes, **environment}
    return ServerProcess.launch(folder, "inferctl", "serve", "--port", "0", *arguments, **environment).wait_announced()
