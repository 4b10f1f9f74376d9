"""What the cache of vectors saves: hits next to misses.

    python benchmarks/peers/cache.py [--seconds 4] [--rounds 6] [--json FILE]

One server with the model and a cache receives single texts of log-normal length (mean 55 tokens), with base64 vectors:
in alternating order texts that the cache has, and others. Latency: one client in a closed loop. CPU time: 16 clients,
of all processes of the server, so that a miss has the benefit of batching.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import peers
from load import requests, run_closed

CLIENTS, HOT = 16, 200


def counters(server: peers.Server) -> tuple[float, float]:
    """Return the hits and the misses of a server so far. Equal inputs of one request count as hits, but the first."""
    found = peers.metrics(server)
    hits = sum(found.get(f"inferctl_cache_{name}", 0.0) for name in ("hits_total", "coalesced_total"))
    return hits, found["inferctl_cache_misses_total"]


def measure(server: peers.Server, texts: Sequence[str], seconds: float) -> dict[str, float]:
    """Return p50 and p99 of one client, and the CPU time and the rate of several. No text is sent twice if it lasts."""
    ready = requests(server.url, server.path, [{"input": text, "encoding_format": "base64"} for text in texts])
    half = len(ready) // 2
    alone = run_closed(server.url, ready[:half], 1, seconds, warm=0)
    before = server.cpu_seconds()
    many = run_closed(server.url, ready[half:], CLIENTS, seconds, warm=0)
    cpu_s = server.cpu_seconds() - before
    assert not alone.failures + many.failures, f"{server.name} rejected requests: {alone.statuses}, {many.statuses}"
    return {
        "p50_ms": alone.quantile(0.5),
        "p99_ms": alone.quantile(0.99),
        "cpu_us": 1e6 * cpu_s / len(many.latencies),
        "rate": many.rate,
    }


def main() -> None:
    parser = peers.options(__doc__ or "")
    parser.set_defaults(seconds=4, rounds=6)
    options = parser.parse_args()
    hot = peers.texts(HOT)
    figures: dict[str, list[dict[str, float]]] = {"hit": [], "miss": []}
    os.environ["INFERCTL_CACHE_SIZE"] = str(1 << 30)
    server = peers.inferctl(18541, name="cached")
    try:
        measure(server, hot, options.seconds)
        for number, name in enumerate(peers.order(list(figures), options.rounds)):
            # A client needs at least half a millisecond for a miss.
            new = peers.texts(int(4000 * options.seconds) + 1000, seed=1000 + number) if name == "miss" else hot
            texts = [f"{number} {at} {text}" for at, text in enumerate(new)] if name == "miss" else hot
            before = counters(server)
            figures[name].append(measure(server, texts, options.seconds))
            hits, misses = (b - a for a, b in zip(before, counters(server), strict=True))
            assert hits / (hits + misses) > 0.999 if name == "hit" else hits / (hits + misses) < 0.01
    finally:
        server.end()
    medians = {
        name: {key: peers.median([each[key] for each in found]) for key in found[0]} for name, found in figures.items()
    }
    peers.table(
        ("request", "p50 (ms)", "p99 (ms)", "CPU (us)", "requests/s"),
        [(name, *values.values()) for name, values in medians.items()],
    )
    peers.write(options.json, {"single_texts": medians})


if __name__ == "__main__":
    main()
