"""Measure the CPU time that API processes need per request: by their number, by checkout, or by both.

    python benchmarks/peers/api_processes.py [--processes 1,2,4] [--clients 16,64,256] [--with keys] [--json FILE]
    python benchmarks/peers/api_processes.py --checkouts ../older,. --processes 1 [--load "32 texts"]

The engine computes nothing (`--engine echo`), and its process does not count. Clients send single texts of about 50
tokens, or another load, in a closed loop; the servers are measured in alternating order (A B B A). "API" is the CPU
time of all API processes per request, "backend" that of the process with limits, queue and cache. With one process,
"API" is all. Ratios are to the first server, medians of those within one round: other work on the machine affects both.
The CPU that a process needs falls with the requests that it handles at a time, so look at all numbers of clients.
"full at" is the rate at which the backend would take a whole core.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import edge_cost
import peers
from load import requests, run_closed
from recorder import processes

TEXTS = peers.texts(2000, mean_tokens=50)
LOADS: dict[str, list[dict[str, Any]]] = {
    "1 text": [{"input": text} for text in TEXTS],
    "token ids": [{"input": peers.token_ids(text)} for text in TEXTS],
    "32 texts": [{"input": TEXTS[at : at + 32], "encoding_format": "base64"} for at in range(0, len(TEXTS) - 31, 32)],
}


def pids(server: peers.Server) -> tuple[list[int], list[int]]:
    """Return the API processes and the backend. One process for all counts as the former."""
    api = [pid for name, pid in processes(server.process.pid).items() if name.startswith("api process")]
    return (api, [server.process.pid]) if api else ([server.process.pid], [])


def cpu_seconds(server: peers.Server) -> list[float]:
    """Return the CPU seconds of the API processes and of the backend so far."""
    return [peers.cpu_s(part) for part in pids(server)]


def main() -> None:
    parser = peers.options(__doc__ or "")
    parser.set_defaults(rounds=6, seconds=2)
    parser.add_argument("--processes", default="1,2,4", help="numbers of API processes, with commas")
    parser.add_argument("--checkouts", default=str(peers.ROOT), help="folders of this project, with commas")
    parser.add_argument("--clients", default="16,64,256", help="numbers of clients, with commas")
    parser.add_argument("--with", dest="features", default="", help="features of the servers: keys, metering, cache")
    parser.add_argument("--load", default="1 text", choices=LOADS)
    options = parser.parse_args()
    checkouts = [Path(name).resolve() for name in options.checkouts.split(",")]
    kinds = [(checkout, int(count)) for count in options.processes.split(",") for checkout in checkouts]
    names = [f"{count} of {checkout.name}" if len(checkouts) > 1 else f"{count}" for checkout, count in kinds]
    features = [name for name in options.features.split(",") if name]
    figures: dict[str, Any] = {}
    rows = []
    # The relay may still write when its server was killed.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        servers: dict[str, tuple[peers.Server, list[bytes]]] = {}
        try:
            for at, (name, (checkout, count)) in enumerate(zip(names, kinds, strict=True)):
                place, more = Path(folder) / str(at), {"serve": {"api_processes": count}}
                label = f"{name} processes"
                server, headers = edge_cost.serve(place, peers.free_port(), label, features, checkout, more)
                servers[name] = server, requests(server.url, server.path, LOADS[options.load], headers)
            for clients in map(int, options.clients.split(",")):
                found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in names}
                for name in peers.order(names, options.rounds):
                    server, ready = servers[name]
                    before = cpu_seconds(server)
                    outcome = run_closed(server.url, ready, clients, options.seconds, warm=0)
                    after = cpu_seconds(server)
                    assert not outcome.failures, outcome.statuses
                    done = outcome.statuses[200]
                    used = [1e6 * (b - a) / done for a, b in zip(before, after, strict=True)]
                    found[name].append((used[0], used[1], done / options.seconds))
                figures[str(clients)] = found
                for name in names:
                    api, backend, rate = (peers.median(values) for values in zip(*found[name], strict=True))
                    ratio = peers.median([b[0] / a[0] for a, b in zip(found[names[0]], found[name], strict=True)])
                    full = f"{1e6 / backend:,.0f}/s" if backend else ""
                    rows.append((clients, name, api, ratio, backend, full, f"{rate:,.0f}/s"))
        finally:
            for server, _ in servers.values():
                server.end()
    peers.table(("clients", "processes", "API us", "ratio", "backend us", "full at", "rate"), rows)
    peers.write(options.json, {"machine": peers.machine(), "features": features, "clients": figures})


if __name__ == "__main__":
    main()
