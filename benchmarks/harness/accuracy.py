"""How exact are the percentiles? Ours and Locust's own beside the truth, which the measured server logs itself.

    python benchmarks/harness/accuracy.py [--rate 100] [--seconds 60] [--repeats 1] [--json FILE]

A server with a known distribution (log-normal with a median of 20 ms, and three answers in a hundred 300 ms slower; fixed seed) logs for each
request the nanoseconds from reading it to writing its answer. An open loop sends at `--rate`. A percentile of ours is compared with the same
percentile of what the server logged for the same requests. It passes when each is within 0.2 ms or 1 % of the truth.

Locust's own figures are those of its statistics, which got the same response times: what differs is its rounding (to 1 ms below 100 ms,
10 ms below 1 s, 100 ms above).

What is on top of the truth is the way there and back: two passes through the loopback interface, two wake-ups, and how late the request left.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import known_server
import loads
import numpy as np

from inferctl.bench import stats
from inferctl.bench.judge import summary
from inferctl.bench.load import records

QUANTILES = (0.5, 0.9, 0.95, 0.99)


def compared(rate: float, seconds: float, seed: int) -> dict[str, Any]:
    """One run: a row a percentile, and what the load generator and the way there added, request by request (ms)."""
    with known_server.running("--slow-share", "0.03", "--seed", str(seed)) as server:
        done, part = loads.measure(
            server.url, seed=seed, mode="open", rate=rate, duration_s=seconds, warmup_s=5, window_s=1
        )
    logged = server.truth_ms(loads.SERIAL)
    rows = part.measured
    missing = [int(index) for index in rows["index"] if int(index) not in logged]
    truth = np.array([logged.get(int(index), np.nan) for index in rows["index"]])
    ours = records.latency_ms(rows)
    lateness = (rows["sent_ns"].astype(np.int64) - rows["intended_ns"].astype(np.int64)) / 1e6
    table = []
    for q in QUANTILES:
        own, exact = (float(np.sort(times)[stats.rank(len(times), q) - 1]) for times in (ours, truth))
        locust = float(done.state["locust_percentiles_ms"][f"p{q * 100:g}"])
        table.append(
            {
                "percentile": f"p{q * 100:g}",
                "truth_ms": round(exact, 3),
                "inferctl_ms": round(own, 3),
                "inferctl_error_ms": round(own - exact, 3),
                "inferctl_within": within(own, exact),
                "locust_ms": locust,
                "locust_error_ms": round(locust - exact, 3),
                "locust_within": within(locust, exact),
            }
        )
    return {
        "requests": len(rows),
        "failed": int(np.sum(rows["error"] != records.OK)),
        "not_logged": len(missing),
        "percentiles": table,
        "added_ms": {"least": round(float(np.min(ours - truth)), 3)}
        | {f"p{q * 100:g}": round(float(np.quantile(ours - truth, q)), 3) for q in QUANTILES},
        "lateness_ms": {f"p{q * 100:g}": round(float(np.quantile(lateness, q)), 3) for q in QUANTILES},
        "client_cpu_percent": summary.client_cpu_percent(done.state),
        "validity": loads.judged(done, part).as_dict(),
    }


def within(value: float, truth: float) -> bool:
    """0.2 ms or 1 %, whichever is more."""
    return abs(value - truth) <= max(0.2, 0.01 * truth)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=float, default=100)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    runs = [compared(options.rate, options.seconds, seed) for seed in range(1, options.repeats + 1)]
    for run in runs:
        print(
            f"{run['requests']} requests, {options.rate:g}/s, open loop; {run['failed']} failed, {run['not_logged']} not logged"
        )
        print(f"{'':>6} {'truth':>10} {'inferctl':>10} {'off by':>8}   {'Locust':>8} {'off by':>8}")
        for row in run["percentiles"]:
            marks = ["" if row[f"{who}_within"] else " !" for who in ("inferctl", "locust")]
            print(
                f"{row['percentile']:>6} {row['truth_ms']:>10.3f} {row['inferctl_ms']:>10.3f} {row['inferctl_error_ms']:>+8.3f}{marks[0]:2} "
                f"{row['locust_ms']:>8g} {row['locust_error_ms']:>+8.3f}{marks[1]}"
            )
        print(f"added to a request, ms: {run['added_ms']}; of that lateness: {run['lateness_ms']}")
        print(f"validity: {run['validity']}\n")
    passed = all(row["inferctl_within"] for run in runs for row in run["percentiles"])
    loads.write(options.json, {"rate": options.rate, "seconds": options.seconds, "passed": passed, "runs": runs})
    print(
        "every percentile is within 0.2 ms or 1 % of the truth"
        if passed
        else "NOT every percentile is within 0.2 ms or 1 %"
    )
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
