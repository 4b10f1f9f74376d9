"""Make the modules of this folder importable, and provide the server of answering.py as a fixture."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture
def answering(tmp_path: Path) -> Iterator[Callable[..., str]]:
    """Return a function that starts the test server with the given options and returns its URL.

    The server ends with the test.
    """
    with contextlib.ExitStack() as stack:
        from bench_samples import ANSWERING

        def start(*options: str) -> str:
            announce = tmp_path / f"announce-{time.monotonic_ns()}.json"
            process = subprocess.Popen([sys.executable, str(ANSWERING), "--announce", str(announce), *options])
            stack.callback(process.wait)
            stack.callback(process.kill)
            while not announce.is_file():
                assert process.poll() is None, "the answering server did not start"
                time.sleep(0.02)
            return str(json.loads(announce.read_text())["url"])

        yield start
