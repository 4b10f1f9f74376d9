"""Measure how many requests the load generator can send, and at which rate it reports that it is the bottleneck.

    python benchmarks/harness/ceiling.py [--seconds 6] [--users 32] [--workers 1 2] [--rates 1000 2000 ...]
                                         [--json FILE]

A bare server (asyncio on uvloop) responds to every request at once with the same 600 bytes. Both share this machine.
With two cores, the server uses one and the load generator the other, so more workers compete for the same cores.

1. A closed loop with 1 and more workers: requests/s, and requests/s per core that the load generator used.
2. An open loop at rising rates, until the validity check gives a reason or a warning about the load generator: the
   highest rate without a message, and the first rate with one and its text.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import known_server
import loads

from inferctl.bench.judge import summary
from inferctl.bench.load import load_run

OWN = "load generator"


def measure_closed(seconds: float, users: int, workers: int) -> dict[str, Any]:
    """Measure a closed loop."""
    with known_server.run_server("--bare") as server:
        done, part = loads.measure(
            server.url, users=users, duration_s=seconds, warmup_s=2, window_s=0.5, workers=workers
        )
    found, cores = summary.summarize([part]), load_run.cores_used(done.state) or 0.0
    return {
        "workers": workers,
        "requests_per_s": found["requests_per_s"],
        "errors": found["errors"],
        "cores": round(cores, 3),
        "requests_per_s_per_core": round(found["requests_per_s"] / cores, 1),
        "busiest_worker_percent": summary.client_cpu_percent(done.state),
        "p50_ms": found["latency_ms"]["p50"]["value"],
        "validity": loads.judge(done, part).as_dict(),
    }


def measure_open(rate: float, seconds: float, workers: int) -> dict[str, Any]:
    """Measure an open loop at one rate, with Poisson arrivals."""
    with known_server.run_server("--bare") as server:
        settings = {"mode": "open", "rate": rate, "duration_s": seconds, "timeout_s": 10}
        done, part = loads.measure(server.url, warmup_s=2, window_s=0.5, workers=workers, **settings)
    found, verdict = summary.summarize([part]), loads.judge(done, part)
    return {
        "rate": rate,
        "workers": workers,
        "requests_per_s": found["requests_per_s"],
        "busiest_worker_percent": summary.client_cpu_percent(done.state),
        "late": found["late"],
        "requests": found["requests"],
        "p50_ms": found["latency_ms"]["p50"]["value"],
        "p99_ms": found["latency_ms"]["p99"]["value"],
        "reasons": verdict.reasons,
        "cautions": verdict.cautions,
        "declares_itself": any(OWN in reason for reason in verdict.reasons),
        "warns_of_itself": any(OWN in caution for caution in verdict.cautions),
    }


def main() -> int:
    rates = [2000.0, 5000, 10_000, 15_000, 20_000, 25_000, 30_000, 40_000, 60_000]
    options = loads.options(__doc__, seconds=6.0, users=32, workers=[1, 2], rates=rates)
    document: dict[str, Any] = {"cores": len(os.sched_getaffinity(0)), "closed": [], "open": []}
    for workers in options.workers:
        run = measure_closed(options.seconds, options.users, workers)
        document["closed"].append(run)
        print(
            f"closed loop, {options.users} users, {workers} worker(s): {run['requests_per_s']:,.0f} requests/s on "
            f"{run['cores']:.2f} cores, "
            f"{run['requests_per_s_per_core']:,.0f} per core; {run['validity']['reasons'] or 'valid'}",
            flush=True,
        )
    for rate in options.rates:
        run = measure_open(rate, options.seconds, 1)
        document["open"].append(run)
        messages = [*run["reasons"], *run["cautions"]]
        print(
            f"open loop at {rate:,.0f}/s: {run['requests_per_s']:,.0f}/s, "
            f"{run['busiest_worker_percent']}% of its core, "
            f"{run['late']} late, p99 {run['p99_ms']} ms: {messages or 'valid'}",
            flush=True,
        )
        if run["declares_itself"]:
            break
    silent = [run["rate"] for run in document["open"] if not run["declares_itself"] and not run["warns_of_itself"]]
    declaring = [run for run in document["open"] if run["declares_itself"]]
    document["highest_calm_rate"] = max(silent, default=None)
    document["declares_itself_at"] = declaring[0]["rate"] if declaring else None
    document["declares_itself_with"] = (
        next((r for r in declaring[0]["reasons"] if OWN in r), None) if declaring else None
    )
    loads.write(options.json, document)
    print(
        f"highest rate without a message: {document['highest_calm_rate']}; "
        f"first message at {document['declares_itself_at']}: {document['declares_itself_with']}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
