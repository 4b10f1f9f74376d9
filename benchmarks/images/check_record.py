"""Measure how long a server takes to start with and without a record of the checks at its start.

    benchmarks/images/check_record.py [--model DIR] [--older CHECKOUT] [--rounds N] [--json FILE]

Each round starts four servers, in alternating order, on the CPU: of another checkout (`--older`, with a .venv), of this
one without a record, with the fp32 results of a record (as on other hardware than that of the record), and with the
whole record. Seconds are those until the server is ready.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
import time
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent / "peers"))
import peers

VARIABLE = "INFERCTL_SERVE_CHECK_RECORD"


def start(model: Path, record: Path | None, checkout: Path = peers.ROOT) -> float:
    """Start a server and return its seconds until it is ready."""
    os.environ.pop(VARIABLE, None)
    if record is not None:
        os.environ[VARIABLE] = str(record)
    began = time.perf_counter()
    server = peers.inferctl(peers.free_port(), "--model", str(model), "--device", "cpu", checkout=checkout)
    seconds = time.perf_counter() - began
    server.end()
    return seconds


def without_engines(record: Path, target: Path) -> None:
    """Write the record with its fp32 results alone."""
    document = json.loads(record.read_text())
    del document["seal"]
    document["engines"] = {}
    seal = hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()
    target.write_text(json.dumps({**document, "seal": seal}))


def main() -> None:
    parser = peers.options(__doc__ or "")
    parser.set_defaults(rounds=5)
    parser.add_argument("--model", type=Path, default=peers.MODEL, help="model folder")
    parser.add_argument("--older", type=Path, help="another checkout")
    given = parser.parse_args()
    model = given.model.resolve()
    with tempfile.TemporaryDirectory() as folder:
        whole, fp32 = Path(folder, "whole.json"), Path(folder, "fp32.json")
        start(model, whole)  # writes it
        kinds = ["without a record", "fp32 of a record", "record"]
        if given.older:
            kinds.insert(0, "older")
        seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
        for kind in peers.order(kinds, given.rounds):
            if kind == "fp32 of a record":
                without_engines(whole, fp32)  # a start adds its engine to it
            record = {"record": whole, "fp32 of a record": fp32}.get(kind)
            seconds[kind].append(start(model, record, given.older.resolve() if kind == "older" else peers.ROOT))
    peers.table(("start", "seconds"), [(kind, peers.median(seconds[kind])) for kind in kinds])
    peers.write(given.json, {"model": model.name, "seconds": seconds})


if __name__ == "__main__":
    main()
