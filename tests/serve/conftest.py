"""Starts real server processes on free ports, for the tests of this folder."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import hypothesis
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.serve import tiny_models

START_SECONDS = 120
TEXTS = [
    "Which river flows through Vienna?",
    "The Danube\nflows through Vienna.",
    "int main(void) { return 0; }",
    "ok",
    "naïve café, 北京, 🚀 " * 30,
    "a long text that will be truncated " * 100,
]
# Other load on the machine must not fail a test, so none has a deadline.
hypothesis.settings.register_profile("untimed", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("untimed")
# Tests run in parallel, and OpenMP threads that spin while they wait would take cores from each other. torch reads this
# when it loads.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


# `httpx.get` and `httpx.post` load the certificates of all authorities on each call: 7 ms of CPU time. Each request of
# this client opens a connection, as theirs do.
CLIENT = httpx.Client(timeout=60, limits=httpx.Limits(max_keepalive_connections=0))


@dataclass
class Running:
    """A ready server. `log` is the file with its stderr."""

    url: str
    process: subprocess.Popen[bytes]
    log: Path

    def embed(self, **body: object) -> httpx.Response:
        return CLIENT.post(f"{self.url}/v1/embeddings", json=body)

    def get(self, path: str) -> httpx.Response:
        return CLIENT.get(f"{self.url}{path}")

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

    def engine_pid(self) -> int:
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return int(children[0])


def until(condition: Callable[[], bool], seconds: float = START_SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "timeout"
        time.sleep(0.02)


def start(folder: Path, *arguments: str) -> Running:
    announce, log = folder / "ready.json", folder / "server.log"
    command = [sys.executable, "-m", "inferctl", "serve", "--port", "0", "--announce", str(announce), *arguments]
    with log.open("wb") as stream:
        # In its own process group, so that a test can signal the whole group.
        process = subprocess.Popen(
            command, stderr=stream, stdout=subprocess.DEVNULL, cwd=folder, env=dict(os.environ), start_new_session=True
        )
    until(lambda: announce.exists() or process.poll() is not None)
    assert process.poll() is None, log.read_text()
    announced = json.loads(announce.read_text())
    assert announced["pid"] == process.pid
    return Running(announced["url"], process, log)


def stop(server: Running) -> None:
    if server.process.poll() is None:
        server.process.send_signal(signal.SIGKILL)
    server.process.wait()


@pytest.fixture(scope="module")
def echo(minilm: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server with the echo engine. Only the model is not real."""
    arguments = ("--model", str(minilm), "--engine", "echo", "--name", "echo", "--max-queue-tokens", "64")
    server = start(tmp_path_factory.mktemp("echo"), *arguments)
    yield server
    stop(server)


@pytest.fixture(scope="session")
def minilm_server(minilm: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server with the real model in fp32. Its tests are in the group `minilm`, so that only one relay starts it."""
    arguments = ("--model", str(minilm), "--precision", "fp32", "--name", "minilm")
    server = start(tmp_path_factory.mktemp("minilm"), *arguments)
    yield server
    stop(server)


@pytest.fixture(scope="session")
def minilm_reference(minilm: Path) -> dict[str, Any]:
    """The output of the reference implementation for TEXTS."""
    command = [sys.executable, "-m", "inferctl.serve.reference", str(minilm)]
    done = subprocess.run(command, input=json.dumps(TEXTS).encode(), capture_output=True, check=True)
    output: dict[str, Any] = json.loads(done.stdout)
    return output


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Running]]:
    """`serve("--model", ...)` starts a server for one test."""
    started: list[Running] = []

    def run(*arguments: str) -> Running:
        started.append(start(tmp_path, *arguments))
        return started[-1]

    yield run
    for server in started:
        stop(server)


@pytest.fixture(scope="module")
def tiny(minilm: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`tiny("bert", "mean_tokens")` returns a folder with a small random model of that architecture."""
    return lambda architecture, pooling, normalize=True: tiny_models.make(
        minilm, tmp_path_factory.mktemp(architecture), architecture, pooling, normalize
    )
