"""Measure what API processes beside one backend cost: CPU time per request, by process, next to one process for all.

    python benchmarks/peers/api_processes.py [--processes 1,2,4] [--clients 16,64,256] [--with keys] [--json FILE]

The engine computes nothing (`--engine echo`), and its process does not count. Clients send single texts of about 50
tokens in a closed loop; the servers are measured in alternating order (A B B A). "API" is the CPU time of all API
processes per request, "backend" that of the process with limits, queue and cache. With one process, "API" is all.
The CPU that a process needs falls with the requests that it handles at a time, so look at all numbers of clients.
"full at" is the rate at which the backend would take a whole core.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import edge_cost
import peers
from load import requests, run_closed
from recorder import processes

BODIES = [{"input": text} for text in peers.texts(2000, mean_tokens=50)]


def cpu_seconds(server: peers.Server) -> tuple[float, float]:
    """Return the CPU seconds of the API processes and of the backend so far. One process for all counts as the former."""
    api = [pid for name, pid in processes(server.process.pid).items() if name.startswith("api process")]
    own = _seconds(server.process.pid)
    return (sum(map(_seconds, api)), own) if api else (own, 0.0)


def _seconds(pid: int) -> float:
    return time.clock_gettime(~pid << 3 | 2)  # as clock_getcpuclockid(3) does


def main() -> None:
    parser = peers.options(__doc__ or "")
    parser.set_defaults(rounds=6, seconds=2)
    parser.add_argument("--processes", default="1,2,4", help="numbers of API processes, with commas")
    parser.add_argument("--clients", default="16,64,256", help="numbers of clients, with commas")
    parser.add_argument("--with", dest="features", default="", help="features of the servers: keys, metering, cache")
    options = parser.parse_args()
    counts = [int(count) for count in options.processes.split(",")]
    features = [name for name in options.features.split(",") if name]
    figures: dict[str, Any] = {}
    rows = []
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        servers = {}
        try:
            for count in counts:
                spec: dict[str, Any] = {"serve": {"api_processes": count}}
                headers: dict[str, str] = {}
                place = Path(folder) / str(count)
                place.mkdir()
                for feature in features:
                    sections, more = edge_cost.FEATURES[feature](place)
                    spec |= sections
                    headers |= more
                servers[count] = edge_cost.start(place, peers.free_port(), f"{count} processes", spec), headers
            for clients in map(int, options.clients.split(",")):
                found: dict[int, list[tuple[float, float, float]]] = {count: [] for count in counts}
                for count in peers.order(counts, options.rounds):
                    server, headers = servers[count]
                    ready = requests(server.url, server.path, BODIES, headers)
                    before = cpu_seconds(server)
                    outcome = run_closed(server.url, ready, clients, options.seconds, warm=0)
                    assert not outcome.failures, outcome.statuses
                    done = outcome.statuses[200]
                    used = [1e6 * (b - a) / done for a, b in zip(before, cpu_seconds(server), strict=True)]
                    found[count].append((used[0], used[1], done / options.seconds))
                figures[str(clients)] = found
                for count in counts:
                    api, backend, rate = (peers.median(values) for values in zip(*found[count], strict=True))
                    ratio = peers.median([b[0] / a[0] for a, b in zip(found[counts[0]], found[count], strict=True)])
                    full = f"{1e6 / backend:,.0f}/s" if backend else ""
                    rows.append((clients, count, api, ratio, backend, full, f"{rate:,.0f}/s"))
        finally:
            for server, _ in servers.values():
                server.end()
    peers.table(("clients", "processes", "API us", "ratio", "backend us", "full at", "rate"), rows)
    peers.write(options.json, {"machine": peers.machine(), "features": features, "clients": figures})


if __name__ == "__main__":
    main()
