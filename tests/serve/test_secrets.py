"""Nothing that a server leaves has a text or a key of its clients: files, metrics, errors and core files."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.processes import ServerProcess, python

ROOT = Path(__file__).resolve().parent.parent.parent


def test_a_scan_of_everything_finds_no_text_and_no_key(minilm: Path, tmp_path: Path) -> None:
    file = tmp_path / "found.json"
    script = ROOT / "benchmarks" / "peers" / "secrets_scan.py"
    python(script, "server", "--engine", "echo", "--json", file, timeout=300, code=0)
    found = json.loads(file.read_text())["server"]
    assert {found["statuses"][name] for name in ("valid", "cached", "token ids", "truncated")} == {200}
    assert found["statuses"]["engine fails"] == 500
    assert found["statuses"]["engine crashes"] in (500, 503)
    assert found["files"] > 5
    assert found["events"] > 10


def test_no_process_of_a_server_writes_a_core_file(
    serve: Callable[..., ServerProcess], minilm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INFERCTL_METERING_MODE", "on")
    server = serve("--model", str(minilm), "--engine", "echo")
    children = server.children()
    assert len(children) >= 2, "an engine and a relay"
    for each in (server.process.pid, *children):
        (line,) = re.findall(r"Max core file size +(\S+) +(\S+)", Path(f"/proc/{each}/limits").read_text())
        # The kernel treats 1 like this for programs in core_pattern too, unlike 0.
        assert line == ("1", "1") or (line[1] == "0" and os.geteuid() != 0)
