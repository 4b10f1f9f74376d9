"""Measure the front end of `inferctl serve` without a model, for requests of 1 to 128 texts.

    python benchmarks/calibration/front_end.py [--seconds 6] [--rounds 4] [--json FILE]

The echo engine responds, so everything except the model runs: HTTP, JSON, tokenization, queue, batches, base64. There
is one API process. Two figures bound its requests per second: what one core allows by its CPU time per request, and the
rate that it reached, because it tokenizes larger requests on two threads. The higher one counts. Other work on the
machine makes both lower, so the best round counts.

Vectors have 8 values, so the figures are a best case for the CPU.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "peers"))

import peers
from load import requests, run_closed

SIZES = (1, 8, 32, 128)
CLIENTS = 32
DIMENSIONS = 8  # of the echo engine: vectors that cost almost nothing to encode


def measure(seconds: float, rounds: int) -> dict[int, list[tuple[float, float]]]:
    """For each number of texts: (CPU seconds of the API process per request, requests per second) of each round."""
    texts = peers.texts(512)
    found: dict[int, list[tuple[float, float]]] = {size: [] for size in SIZES}
    server = peers.inferctl(18521, "--engine", "echo", name="inferctl echo, by size of request")
    try:
        bodies = {
            size: [
                {"input": texts[at : at + size] if size > 1 else texts[at], "encoding_format": "base64"}
                for at in range(0, len(texts), size)
            ]
            for size in SIZES
        }
        for size in peers.order(SIZES, rounds):
            ready = requests(server.url, server.path, bodies[size])
            run_closed(server.url, ready, CLIENTS, 0.5, warm=0.5)
            before = peers.cpu_s([server.process.pid])
            outcome = run_closed(server.url, ready, CLIENTS, seconds, warm=0)
            used = peers.cpu_s([server.process.pid]) - before
            assert not outcome.failures, f"rejected: {outcome.statuses}"
            found[size].append((used / outcome.statuses[200], outcome.rate))
    finally:
        server.end()
    return found


def main() -> None:
    parser = peers.options(__doc__ or "")
    parser.set_defaults(rounds=4, seconds=6)
    options = parser.parse_args()
    lines: list[dict[str, Any]] = []
    for size, rounds in measure(options.seconds, options.rounds).items():
        cpu = min(used for used, _ in rounds)
        rate = max(rate for _, rate in rounds)
        seconds, source = min((cpu, "CPU time of the API process"), (1 / rate, "requests/s reached"))
        lines.append(
            {
                "texts_per_request": size,
                "ms_per_request": round(seconds * 1000, 5),
                "texts_per_s": round(size / seconds, 1),
                "from": source,
                "texts_per_s_reached": round(size * rate, 1),
            }
        )
        print(json.dumps(lines[-1]))
    if options.json:
        head = {"script": "benchmarks/calibration/front_end.py", "machine": peers.machine()}
        what = {"engine": "echo", "mean_tokens": 55, "clients": CLIENTS, "encoding": "base64", "dimensions": DIMENSIONS}
        options.json.write_text(json.dumps({**head, **what, "requests": lines}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
