"""How much can the load generator send, and when does it say that it is the bottleneck itself?

    python benchmarks/harness/ceiling.py [--seconds 6] [--users 32] [--workers 1 2] [--rates 1000 2000 ...] [--json FILE]

A bare server answers every request at once with the same 600 bytes (asyncio on uvloop). Both share this machine, so with two cores the
server has the one and the load generator the other; more workers than that only share.

1. Closed loop with 1 and more workers: requests/s, and requests/s for each core that the load generator used.
2. Stock Locust (a FastHttpUser that posts one text) against the same server, for comparison.
3. Open loop at rising rates until `validity` gives a reason or a caution of the load generator's own: the highest rate that passes without
   one, and the first at which it says so, in its own words.
"""

from __future__ import annotations

import argparse
import csv
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import known_server
import loads

from inferctl.bench.judge import summary
from inferctl.bench.load import generator, locust

OWN = "load generator"


def closed(seconds: float, users: int, workers: int) -> dict[str, Any]:
    """As many requests as it goes."""
    with known_server.running("--bare") as server:
        done, part = loads.measure(
            server.url, users=users, duration_s=seconds, warmup_s=2, window_s=0.5, workers=workers
        )
    found, cores = summary.summarize([part]), generator.cores_used(done.state) or 0.0
    return {
        "workers": workers,
        "requests_per_s": found["requests_per_s"],
        "errors": found["errors"],
        "cores": round(cores, 3),
        "requests_per_s_per_core": round(found["requests_per_s"] / cores, 1),
        "busiest_worker_percent": summary.client_cpu_percent(done.state),
        "p50_ms": found["latency_ms"]["p50"]["value"],
        "validity": loads.judged(done, part).as_dict(),
    }


def stock(seconds: float, users: int) -> dict[str, Any]:
    """The same by Locust as people use it; its own count over the time that it ran, ramp included."""
    with known_server.running("--bare") as server, tempfile.TemporaryDirectory() as folder:
        arguments = [
            sys.executable,
            "-m",
            "locust",
            "-f",
            str(Path(__file__).with_name("stock_locustfile.py")),
            "--headless",
        ]
        options = [
            "--users",
            str(users),
            "--spawn-rate",
            str(users),
            "--run-time",
            f"{round(seconds)}s",
            "--csv",
            "stock",
        ]
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        # The server is another child, but not waited for yet, so its time is not in the figure.
        subprocess.run(
            [*arguments, *options, "--only-summary", "--loglevel", "ERROR"],
            check=True,
            cwd=folder,
            env={**locust.clean_environment(), "STOCK_URL": server.url},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        with (Path(folder) / "stock_stats.csv").open() as file:
            total = next(row for row in csv.DictReader(file) if row["Name"] == "Aggregated")
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    count = int(total["Request Count"])
    return {
        "requests_per_s": round(float(total["Requests/s"]), 1),
        "requests": count,
        "requests_per_cpu_s": round(count / cpu, 1),
    }


def opened(rate: float, seconds: float, workers: int) -> dict[str, Any]:
    """One rate, at Poisson times."""
    with known_server.running("--bare") as server:
        done, part = loads.measure(
            server.url,
            mode="open",
            rate=rate,
            duration_s=seconds,
            warmup_s=2,
            window_s=0.5,
            workers=workers,
            timeout_s=10,
        )
    found, verdict = summary.summarize([part]), loads.judged(done, part)
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=6)
    parser.add_argument("--users", type=int, default=32)
    parser.add_argument("--workers", type=int, nargs="*", default=[1, 2])
    parser.add_argument(
        "--rates", type=float, nargs="*", default=[2000, 5000, 10_000, 15_000, 20_000, 25_000, 30_000, 40_000, 60_000]
    )
    parser.add_argument("--no-stock", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    document: dict[str, Any] = {"cores": len(os.sched_getaffinity(0)), "closed": [], "open": [], "stock": None}
    for workers in options.workers:
        run = closed(options.seconds, options.users, workers)
        document["closed"].append(run)
        print(
            f"closed loop, {options.users} clients, {workers} worker(s): {run['requests_per_s']:,.0f} requests/s on {run['cores']:.2f} cores, "
            f"{run['requests_per_s_per_core']:,.0f} per core; {run['validity']['reasons'] or 'no reason against it'}",
            flush=True,
        )
    if not options.no_stock:
        document["stock"] = stock(options.seconds, options.users)
        print(f"stock FastHttpUser: {document['stock']}", flush=True)
    for rate in options.rates:
        run = opened(rate, options.seconds, 1)
        document["open"].append(run)
        said = [*run["reasons"], *run["cautions"]]
        print(
            f"open loop at {rate:,.0f}/s: {run['requests_per_s']:,.0f}/s, {run['busiest_worker_percent']} % of its core, "
            f"{run['late']} late, p99 {run['p99_ms']} ms: {said or 'valid'}",
            flush=True,
        )
        if run["declares_itself"]:
            break
    calm = [run["rate"] for run in document["open"] if not run["declares_itself"] and not run["warns_of_itself"]]
    loud = [run for run in document["open"] if run["declares_itself"]]
    document["highest_calm_rate"] = max(calm, default=None)
    document["declares_itself_at"] = loud[0]["rate"] if loud else None
    document["declares_itself_with"] = next((r for r in loud[0]["reasons"] if OWN in r), None) if loud else None
    loads.write(options.json, document)
    print(
        f"highest rate without a word: {document['highest_calm_rate']}; says at {document['declares_itself_at']}: {document['declares_itself_with']}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
