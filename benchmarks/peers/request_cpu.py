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
from dataclasses import dataclass, field
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
    """A server, and what was measured of its API process."""

    name: str
    server: peers.Server
    headers: dict[str, str]
    cpu_us: list[float] = field(default_factory=list)
    pss_mb: list[float] = field(default_factory=list)

    def cpu_seconds(self) -> float:
        """Return the CPU seconds of all threads of the API process so far, also of threads that ended."""
        return time.clock_gettime(~self.server.process.pid << 3 | 2)  # as clock_getcpuclockid(3) does

    def measure(self, bodies: list[dict[str, Any]], seconds: float) -> int:
        """Measure the CPU time per request in a closed loop, and return the number of requests."""
        ready = requests(self.server.url, self.server.path, bodies, self.headers)
        before = self.cpu_seconds()
        outcome = run_closed(self.server.url, ready, CLIENTS, seconds, warm=0)
        assert not outcome.failures, f"{self.name} rejected requests: {outcome.statuses}"
        self.cpu_us.append(1e6 * (self.cpu_seconds() - before) / outcome.statuses[200])
        return outcome.statuses[200]

    def measure_memory(self) -> None:
        """Measure the memory of the API process (PSS)."""
        lines = Path(f"/proc/{self.server.process.pid}/smaps_rollup").read_text().splitlines()
        self.pss_mb.append(next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) * 1024 / 1e6)


def start(folder: Path, checkouts: Sequence[Path], features: Sequence[str]) -> list[Api]:
    """Start a server of each checkout with these features, and warm it up."""
    found: list[Api] = []
    try:
        for name, checkout in zip(("before", "after"), checkouts, strict=True):
            label, port = f"{name} {'+'.join(features)}".strip(), peers.free_port()
            server, headers = edge_cost.serve(folder / label, port, label, features, checkout)
            found.append(Api(name, server, headers))
            found[-1].measure_memory()
            found[-1].measure(LOADS["1 text"][1], 1)
            found[-1].cpu_us.clear()
    except BaseException:
        for api in found:
            api.server.end()
        raise
    return found


def main() -> None:
    parser = peers.options(__doc__ or "")
    parser.set_defaults(rounds=5, seconds=3)
    parser.add_argument("before", type=Path, help="folder of the checkout to compare with")
    parser.add_argument("after", type=Path, help="folder of the checkout to measure")
    parser.add_argument("--loads", default=",".join(LOADS), help="loads to measure, with commas")
    parser.add_argument("--requests", type=int, default=0, help="requests before the first measurement")
    options = parser.parse_args()
    checkouts = [options.before.resolve(), options.after.resolve()]
    figures: dict[str, Any] = {}
    rows = []
    for load in options.loads.split(","):
        features, bodies = LOADS[load]
        # The relay may still write when its server was killed.
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            apis = start(Path(folder), checkouts, features)
            try:
                for api in apis:
                    done = 0
                    while done < options.requests:
                        done += api.measure(bodies, options.seconds)
                    api.cpu_us.clear()
                for api in peers.order(apis, options.rounds):
                    api.measure(bodies, options.seconds)
                for api in apis:
                    api.measure_memory()
            finally:
                for api in apis:
                    api.server.end()
        before, after = apis
        ratios = [b / a for a, b in zip(before.cpu_us, after.cpu_us, strict=True)]
        rows.append(
            (
                load,
                *(peers.median(api.cpu_us) for api in apis),
                peers.median(ratios),
                min(ratios),
                max(ratios),
                *(mb for api in apis for mb in api.pss_mb),
            )
        )
        figures[load] = {api.name: {"cpu_us": api.cpu_us, "pss_mb": api.pss_mb} for api in apis} | {"ratios": ratios}
    memory = ("before MB", "then", "after MB", "then")
    print(f"CPU (us) of the API process per request, {CLIENTS} clients, {options.rounds} rounds of {options.seconds} s")
    peers.table(("load", "before", "after", "ratio (median)", "lowest", "highest", *memory), rows)
    peers.write(options.json, {"clients": CLIENTS, "seconds": options.seconds, "loads": figures})


if __name__ == "__main__":
    main()
