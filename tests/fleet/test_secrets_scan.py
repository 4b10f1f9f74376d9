"""Nothing that a fleet leaves has a text, a key, a token or a password: files of all parts, logs, traces, metrics."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

from tests.processes import python
from tests.required import missing

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.mark.slow
def test_a_scan_of_a_fleet_finds_no_text_and_no_key(minilm: Path, tmp_path: Path) -> None:
    if not shutil.which("nats-server"):
        missing("services", "nats-server is not installed")
    if not list(Path("/usr/lib/postgresql").glob("*/bin/initdb")):
        missing("services", "PostgreSQL is not installed")
    if not Path(sys.executable).with_name("envoy").exists() and not shutil.which("envoy"):
        missing("services", "Envoy is not installed")
    file = tmp_path / "found.json"
    script = ROOT / "benchmarks" / "peers" / "secrets_scan.py"
    python(script, "fleet", "--engine", "echo", "--json", file, timeout=280, code=0)
    found = json.loads(file.read_text())["fleet"]
    accepted = ("valid", "token ids", "key: rotated key", "key: new key", "chat: valid", "chat: stream")
    assert {name: found["statuses"][name] for name in (*accepted, "without a consumer", "without stores")} == (
        dict.fromkeys((*accepted, "without a consumer", "without stores"), 200)
    )
    rejected = ("wrong key", "key: revoked key", "chat: wrong key")
    assert {found["statuses"][name] for name in rejected} == {401}
    assert found["events"] >= 25
