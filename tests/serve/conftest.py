"""Starts real server processes on free ports, for the tests of this folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

from tests.processes import ServerProcess, start
from tests.serve import tiny_models

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
os.environ["HAYSTACK_TELEMETRY_ENABLED"] = "False"


@pytest.fixture(scope="module")
def echo(minilm: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server with the echo engine. Only the model is not real."""
    arguments = ("--model", str(minilm), "--engine", "echo", "--name", "echo", "--max-queue-tokens", "64")
    server = start(tmp_path_factory.mktemp("echo"), *arguments)
    yield server
    server.kill()


@pytest.fixture(scope="session")
def minilm_server(minilm: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server with the real model in fp32. Its tests are the group `minilm`, so one worker of xdist starts it."""
    arguments = ("--model", str(minilm), "--precision", "fp32", "--name", "minilm")
    server = start(tmp_path_factory.mktemp("minilm"), *arguments)
    yield server
    server.kill()


@pytest.fixture(scope="session")
def minilm_reference(minilm: Path) -> dict[str, Any]:
    """The output of the reference implementation for TEXTS."""
    command = [sys.executable, "-m", "inferctl.serve.reference", str(minilm)]
    done = subprocess.run(command, input=json.dumps(TEXTS).encode(), capture_output=True, check=True)
    output: dict[str, Any] = json.loads(done.stdout)
    return output


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., ServerProcess]]:
    """`serve("--model", ...)` starts a server for one test."""
    started: list[ServerProcess] = []

    def run(*arguments: str) -> ServerProcess:
        started.append(start(tmp_path, *arguments))
        return started[-1]

    yield run
    for server in started:
        server.kill()


@pytest.fixture(scope="module")
def tiny(minilm: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`tiny("bert", "mean_tokens")` returns a folder with a small random model of that architecture."""
    return lambda architecture, pooling, normalize=True: tiny_models.make(
        minilm, tmp_path_factory.mktemp(architecture), architecture, pooling, normalize
    )
