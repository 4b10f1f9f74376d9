"""Compare the server of this checkout with that of another one: rate, latency, CPU, memory and time to start.

    git worktree add ../older COMMIT
    python benchmarks/peers/versions.py ../older [--engine encoder] [--serve="--api-processes 2"] [--json FILE]

Each round measures both, in alternating order: 64 clients in a closed loop, then an open loop at 60% of the first rate.
Requests are single texts of log-normal length, mean 55 tokens. CPU and memory (PSS) are those of the main process, so
not of engines and other API processes. `--serve`: more options for the server of this checkout. The older one may be
this one too, to compare options.
"""

from __future__ import annotations

import shlex
import time
from dataclasses import dataclass, field
from pathlib import Path

import peers
from load import requests, run_closed, run_open

CLIENTS, OPEN_SHARE = 64, 0.6


@dataclass
class Checkout:
    """A checkout, the options of its server, and what was measured."""

    name: str
    folder: Path
    arguments: list[str]
    figures: dict[str, list[float]] = field(default_factory=dict)

    def serve(self) -> peers.Server:
        began = time.perf_counter()
        server = peers.inferctl(peers.free_port(), *self.arguments, name=self.name, checkout=self.folder)
        self.add("start s", time.perf_counter() - began)
        return server

    def add(self, name: str, value: float) -> None:
        self.figures.setdefault(name, []).append(value)


def memory_mb(server: peers.Server) -> float:
    """Return the memory of the main process (PSS, MB)."""
    lines = Path(f"/proc/{server.process.pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) * 1024 / 1e6


def main() -> None:
    parser = peers.options(__doc__ or "")
    parser.set_defaults(rounds=6, seconds=6)
    parser.add_argument("older", type=Path, help="folder of the other checkout")
    parser.add_argument("--engine", default="encoder", help="encoder, or echo (no model)")
    parser.add_argument("--starts", type=int, default=3, help="how often the servers start")
    parser.add_argument("--serve", type=shlex.split, default=[], help="more options of the server of this checkout")
    options = parser.parse_args()
    both = [
        Checkout("older", options.older.resolve(), ["--engine", options.engine]),
        Checkout("this", peers.ROOT, ["--engine", options.engine, *options.serve]),
    ]
    bodies = [{"input": text} for text in peers.texts(2000)]
    for turn in range(options.starts - 1):
        for checkout in both[:: -1 if turn % 2 else 1]:
            checkout.serve().end()
    servers: dict[str, peers.Server] = {}
    try:
        for checkout in both[:: 1 if options.starts % 2 else -1]:
            servers[checkout.name] = checkout.serve()
        rate = 0.0
        for checkout in peers.order(both, options.rounds):
            server = servers[checkout.name]
            ready = requests(server.url, server.path, bodies)
            before = server.cpu_seconds()
            closed = run_closed(server.url, ready, CLIENTS, options.seconds, warm=0)
            checkout.add("requests/s", closed.rate)
            checkout.add("CPU ms/request", 1000 * (server.cpu_seconds() - before) / closed.statuses[200])
            checkout.add("closed p99 ms", closed.quantile(0.99))
            if not rate:
                rate = OPEN_SHARE * closed.rate
            opened = run_open(server.url, ready, rate, options.seconds)
            assert not closed.failures + opened.failures, f"{checkout.name}: {closed.statuses} {opened.statuses}"
            checkout.add("open p50 ms", opened.quantile(0.5))
            checkout.add("open p99 ms", opened.quantile(0.99))
        for checkout in both:
            checkout.add("memory MB", memory_mb(servers[checkout.name]))
    finally:
        for server in servers.values():
            server.end()
    rows = []
    for name in both[0].figures:
        older, this = (checkout.figures[name] for checkout in both)
        ratios = [b / a for a, b in zip(older, this, strict=True)]
        rows.append((name, *map(peers.median, (older, this, ratios)), min(ratios), max(ratios)))
    print(f"{CLIENTS} clients; open loop at {rate:.0f} requests/s; {options.rounds} rounds of {options.seconds:g} s")
    peers.table(("", "older", "this", "ratio (median)", "lowest", "highest"), rows)
    peers.write(options.json, {"clients": CLIENTS, "rate": rate, **{found.name: found.figures for found in both}})


if __name__ == "__main__":
    main()
