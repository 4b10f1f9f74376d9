"""Check in a long run with requests of mixed sizes whether memory grows or latencies drift.

    python benchmarks/peers/soak.py [--minutes 20] [--load 0.5] [--json FILE]

An open loop at a share of the measured capacity sends mostly single texts, some requests of 8 and of 64 texts, some
token ids, and some invalid requests. The first tenth (at least one minute) is the warm-up. Growth and drift are slopes
of a least squares fit to the rest, in percent over its whole duration.
"""

from __future__ import annotations

import random
import shlex
import statistics
import sys
import time

import peers
from load import requests, run_closed
from recorder import OpenLoop, memory, processes, quantile, slope, statuses

WINDOW = 15.0


def mixed(count: int) -> list[tuple[str, object]]:
    """Return bodies with their kind: 80% single texts, 10% of 8 texts, 2% of 64 texts, 5% token ids, 3% invalid."""
    random_, texts = random.Random(3), iter(peers.texts(12 * count))
    made: list[tuple[str, object]] = []
    for _ in range(count):
        draw = random_.random()
        if draw < 0.80:
            made.append(("single", {"input": next(texts)}))
        elif draw < 0.90:
            made.append(("8 texts", {"input": [next(texts) for _ in range(8)], "encoding_format": "base64"}))
        elif draw < 0.92:
            made.append(("64 texts", {"input": [next(texts) for _ in range(64)]}))
        elif draw < 0.97:
            made.append(
                ("token ids", {"input": [random_.randrange(1000, 30000) for _ in range(random_.randrange(1, 200))]})
            )
        else:
            made.append(
                ("wrong", random_.choice([{"input": []}, {"input": [1.5]}, {"input": "a", "dimensions": 3}, {}]))
            )
    return made


def main() -> None:
    parser = peers.options(__doc__ or "")
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--load", type=float, default=0.5, help="share of the measured capacity")
    parser.add_argument("--serve", type=shlex.split, default=[], help="more options of `inferctl serve`")
    options = parser.parse_args()
    command = [sys.executable, "-m", "inferctl", "serve", "--model", peers.MODEL, "--port", "18523", *options.serve]
    server = peers.start("inferctl-soak", command, 18523, "/v1/embeddings", "/readyz", pausable=False)
    try:
        bodies = mixed(2000)
        raw = requests(server.url, server.path, [body for _, body in bodies])
        ready = [(kind, request) for (kind, _), request in zip(bodies, raw, strict=True)]
        peak = run_closed(server.url, raw, 16, 10, warm=20)
        rate = sum(peak.statuses.values()) / peak.seconds
        pids = processes(server.process.pid)
        samples: list[tuple[float, dict[str, float]]] = []
        with OpenLoop(server.url, ready, options.load * rate, 60 * options.minutes) as load:
            while (now := time.monotonic() - load.start_s) < 60 * options.minutes:
                samples.append((now, {name: memory(pid) for name, pid in pids.items()}))
                time.sleep(min(2.0, max(0.0, 60 * options.minutes - now)))
    finally:
        server.end()
    warm = max(60.0, 6 * options.minutes) if options.minutes > 2 else 6 * options.minutes
    length = 60 * options.minutes - warm
    rows, figures = [], {}
    for name in pids:
        points = [(at, mib[name]) for at, mib in samples if at >= warm]
        growth = 100 * slope(points) * length / statistics.mean(y for _, y in points)
        rows.append((f"memory of the {name}, MiB", f"{points[0][1]:.0f} -> {points[-1][1]:.0f}", f"{growth:+.2f}%"))
        figures[f"{name}_memory_growth_percent"] = growth
    steady = [
        r
        for r in load.records
        if r.intended - load.start_s >= warm and r.kind == "single" and r.status == 200 and r.ended
    ]
    for q in (0.5, 0.99):
        windows: dict[int, list[float]] = {}
        for r in steady:
            windows.setdefault(int((r.intended - load.start_s) / WINDOW), []).append(
                1000 * ((r.ended or 0) - r.intended)
            )
        points = [(WINDOW * at, quantile(values, q)) for at, values in sorted(windows.items()) if len(values) > 20]
        typical = statistics.median(y for _, y in points)
        # The scatter of the windows shows how much of a slope is chance.
        drift, scatter = 100 * slope(points) * length / typical, 100 * statistics.pstdev(y for _, y in points) / typical
        error = scatter * (12 / len(points)) ** 0.5
        rows.append((f"single texts, p{100 * q:g}, ms", typical, f"{drift:+.1f}% +- {2 * error:.1f}"))
        figures[f"p{100 * q:g}_drift_percent"], figures[f"p{100 * q:g}_drift_error_percent"] = drift, 2 * error
    seen = {
        kind: statuses(r for r in load.records if r.kind == kind) for kind in sorted({r.kind for r in load.records})
    }
    rows += [(kind, str(counts), "") for kind, counts in seen.items()]
    peers.table((f"{options.minutes:g} minutes, {options.load * rate:.1f} requests/s", "", "over the run"), rows)
    peers.write(
        options.json,
        {"minutes": options.minutes, "rate": options.load * rate, "statuses": seen, "memory_mib": samples, **figures},
    )


if __name__ == "__main__":
    main()
