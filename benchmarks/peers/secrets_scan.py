"""Search everything that servers leave for API keys, tokens, passwords and texts of clients.

    python benchmarks/peers/secrets_scan.py [--engine echo] [--vllm MODEL] [--json FILE] [PART ...]

The parts are `server` and `fleet`; default: both. Exits with 1 if anything is found.

server: keys, JSON logs, metering, a ledger and a cache in an empty folder, where core files of any size are allowed.
Marked texts and keys go in valid requests and in all kinds of wrong ones, and the engine is made to fail. Then engine
and server are killed with SIGSEGV, and all files, the metrics and the error responses are searched, also for encoded
forms of the marks and for token ids.

fleet: a server of embeddings and one of generation, each behind a gateway, with keys in PostgreSQL and SQLite,
passwords with characters like / and @ in all addresses, NATS for limits, keys and usage events, a ledger in PostgreSQL,
an HTTP sink and OpenTelemetry traces. Commands get addresses that are rejected. Then the stores fail, and all processes
are killed. Searched are the files of all parts, the logs, all that Envoy's admin interface and the metrics say, traces,
what the sink got, and error responses.
For each of them, the scan checks that it finds there what may be there, such as ids of keys. Generation is the stand-in
of the tests for vLLM, or with `--vllm`, the real one. The log of PostgreSQL has all statements and their values.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

import peers
import secrets_fleet
from recorder import processes
from secret_marks import Client, Marks, search_all, serve

PARTS = ("server", "fleet")
_FAILURES = ("found", "core_files", "unseen")


def start(folder: Path, engine: str | None) -> tuple[subprocess.Popen[bytes], str]:
    """Start a server with everything that one machine has."""
    file = folder / "inferctl.yaml"
    spec = {
        "name": "minilm",
        "model": {"source": str(peers.MODEL)},
        "access": {"keys": str(folder / "keys.json")},
        "metering": {"mode": "on", "data": str(folder / "metering")},
        "cache": {"size": "16MiB"},
    }
    file.write_text(json.dumps(spec))
    return serve(folder, "server", "--spec", str(file), *(["--engine", engine] if engine else []))


def events(folder: Path) -> int:
    """Return how many events the ledger has; 0 before the relay made it."""
    try:
        with contextlib.closing(sqlite3.connect(f"file:{folder}/metering/ledger.sqlite?mode=ro", uri=True)) as ledger:
            return int(ledger.execute("select count(*) from usage_events").fetchone()[0])
    except sqlite3.OperationalError:
        return 0


def run(folder: Path, engine: str | None, marks: Marks) -> dict[str, Any]:
    """Run a server, send everything, kill it, and return what was found where."""
    file = folder / "keys.json"
    marks.add_keys(peers.create_key(file, "--admin"), peers.create_key(file))
    process, url = start(folder, engine)
    key = marks.keys["key"]
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
        os.kill(processes(process.pid)["engine"], signal.SIGSEGV)
        time.sleep(1)
        process.send_signal(signal.SIGSEGV)
        process.wait(60)
        time.sleep(2)  # the relay ends by itself
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return {"statuses": statuses, "events": stored, **search_all(folder, client.errors, marks)}


def main() -> int:
    parser = peers.options(__doc__ or "")
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)}; default: both")
    parser.add_argument("--engine", choices=["echo"], help="run without the model, which also injects failures")
    parser.add_argument("--vllm", type=Path, metavar="MODEL", help="run the real vLLM with this model in the fleet")
    options = parser.parse_args()
    figures: dict[str, Any] = {}
    for part in options.parts or PARTS:
        with tempfile.TemporaryDirectory(prefix="secrets-scan-", ignore_cleanup_errors=True) as name:
            folder = Path(name)
            if part == "server":
                found = run(folder, options.engine, Marks())
            else:
                found = secrets_fleet.run(folder, options.engine, options.vllm, Marks())
        figures[part] = found
        print(f"{part}: {found['files']} files, {found['events']} events in the ledger; statuses: {found['statuses']}")
        print(f"core files: {', '.join(found['core_files']) or 'none'}")
        for place, names in found["found"].items():
            print(f"FOUND in {place}: {', '.join(names)}")
        if unseen := found.get("unseen"):
            print(f"NOT SEARCHED, because what must be there was not found: {', '.join(unseen)}")
    peers.write(options.json, figures)
    return 1 if any(found.get(what) for found in figures.values() for what in _FAILURES) else 0


if __name__ == "__main__":
    sys.exit(main())
