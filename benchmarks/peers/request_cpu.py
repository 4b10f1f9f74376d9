"""Measure the CPU time that the API process needs per request, in two checkouts of this project.

    git worktree add ../older COMMIT
    python benchmarks/peers/request_cpu.py ../older . [--loads "1 text,32 texts"] [--rounds 5] [--json FILE]

The engine computes nothing (`--engine echo`), and runs in another process, which does not count. 64 clients send
requests in a closed loop: single texts of about 50 tokens, their token ids, 32 texts, and single texts to a server with
keys, metering and a cache (see `edge_cost.py`). The checkouts are measured in alternating order (A B B A). The CPU time
of all threads of the API process is divided by the successful requests. Other work on the machine affects both
checkouts: trust the ratios, which are medians of those within one round.

With `--requests N`, each server first gets N requests, and the table also has the memory (PSS) of the API processes
before and after them.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import edge_cost
import peers
from load import requests, run_closed

CLIENTS = 64
FEATURES = "keys", "metering", "cache"
TEXTS = peers.texts(2000, mean_tokens=50)
# Name -> features of the server, and bodies.
LOADS: dict[str, tuple[Sequence[str], list[dict[str, Any]]]] = {
    "1 text": ((), [{"input": text} for text in TEXTS]),
    "token ids": ((), [{"input": peers.token_ids(text)} for text in TEXTS]),
    "32 texts": (
        (),
        [{"input": TEXTS[at : at + 32], "encoding_format": "base64"} for at in range(0, len(TEXTS) - 31, 32)],
    ),
    "all features": (FEATURES, [{"input": text} for text in TEXTS]),
}


@dataclass
class Api:
    """A server whose API process is measured."""

    name: str
    server: peers.Server
    headers: dict[str, str]
    started_mb: float = 0.0

    def cpu_seconds(self) -> float:
        """Return the CPU seconds of all threads of the API process so far, also of threads that ended."""
        return time.clock_gettime(~self.server.process.pid << 3 | 2)  # as clock_getcpuclockid(3) does

    def requests(self, bodies: list[dict[str, Any]], seconds: float) -> tuple[int, float]:
        """Send requests in a closed loop. Return their number, and the CPU time of each (us)."""
        ready = requests(self.server.url, self.server.path, bodies, self.headers)
        before = self.cpu_seconds()
        outcome = run_closed(self.server.url, ready, CLIENTS, seconds, warm=0)
        assert not outcome.failures, f"{self.name} rejected requests: {outcome.statuses}"
        return outcome.statuses[200], 1e6 * (self.cpu_seconds() - before) / outcome.statuses[200]

    def memory(self) -> float:
        """Return the memory of the API process (PSS, MB)."""
        lines = Path(f"/proc/{self.server.process.pid}/smaps_rollup").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) * 1024 / 1e6


def start(folder: Path, checkouts: Sequence[tuple[str, Path]], features: Sequence[str]) -> list[Api]:
    """Start a server of each checkout with these features, and warm it up."""
    found: list[Api] = []
    try:
        for name, checkout in checkouts:
            label = f"{name} {' '.join(features)}".strip()
            server, headers = edge_cost.serve(folder / name, peers.free_port(), label, features, checkout)
            found.append(Api(name, server, headers))
        for api in found:
            api.started_mb = api.memory()
            api.requests(LOADS["1 text"][1], 1)
    except BaseException:
        for api in found:
            api.server.end()
        raise
    return found


def main() -> None:
    parser = peers.options(__doc__ or "")
    parser.set_defaults(rounds=5, seconds=2)
    parser.add_argument("before", type=Path, help="folder of the checkout to compare with")
    parser.add_argument("after", type=Path, help="folder of the checkout to measure")
    parser.add_argument("--loads", default=",".join(LOADS), help="loads to measure, with commas")
    parser.add_argument("--starts", type=int, default=2, help="how often the servers start again, in reverse order")
    parser.add_argument("--requests", type=int, default=0, help="requests before the first measurement")
    options = parser.parse_args()
    checkouts = [options.before.resolve(), options.after.resolve()]
    figures: dict[str, Any] = {}
    rows = []
    for load in options.loads.split(","):
        features, bodies = LOADS[load]
        cpu_us: dict[str, list[float]] = {"before": [], "after": []}
        pss_mb: dict[str, list[tuple[float, float]]] = {"before": [], "after": []}
        for turn in range(options.starts):
            order = peers.order(list(zip(cpu_us, checkouts, strict=True)), 2)[2 * (turn % 2) :][:2]
            # The relay may still write when its server was killed.
            with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
                apis = start(Path(folder), order, features)
                try:
                    for api in apis:
                        done = 0
                        while done < options.requests:
                            done += api.requests(bodies, options.seconds)[0]
                    for api in peers.order(apis, options.rounds):
                        cpu_us[api.name].append(api.requests(bodies, options.seconds)[1])
                    for api in apis:
                        pss_mb[api.name].append((api.started_mb, api.memory()))
                finally:
                    for api in apis:
                        api.server.end()
        # Both lists are in the order of the rounds.
        ratios = [b / a for a, b in zip(*cpu_us.values(), strict=True)]
        memory_mb = [peers.median(values) for found in pss_mb.values() for values in zip(*found, strict=True)]
        rows.append(
            (load, *map(peers.median, cpu_us.values()), peers.median(ratios), min(ratios), max(ratios), *memory_mb)
        )
        figures[load] = {"cpu_us": cpu_us, "ratios": ratios, "pss_mb": pss_mb}
    memory = ("before MB", "then", "after MB", "then")
    rounds = f"{options.starts} starts, {options.rounds} rounds of {options.seconds} s"
    print(f"CPU (us) of the API process per request, {CLIENTS} clients, {rounds}")
    peers.table(("load", "before", "after", "ratio (median)", "lowest", "highest", *memory), rows)
    peers.write(options.json, {"clients": CLIENTS, "seconds": options.seconds, "loads": figures})


if __name__ == "__main__":
    main()
