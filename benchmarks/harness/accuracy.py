"""Check the accuracy of the percentiles: compare inferctl's and Locust's with those that the server logs itself.

    python benchmarks/harness/accuracy.py [--rate 100] [--seconds 60] [--repeats 1] [--json FILE]

An open loop sends requests at `--rate` to a server with a known latency distribution: log-normal with a median of
20 ms, 3% of the responses 300 ms slower, fixed seed. For each request, the server logs the nanoseconds from reading it
to writing its response. Each percentile of inferctl is compared with the same percentile of the log for the same
requests. The check passes if each is within 0.2 ms or 1% of the logged value.

Locust's figures are those of its own statistics, which receive the same response times. They differ by rounding: to
1 ms below 100 ms, to 10 ms below 1 s, and to 100 ms above.

The difference to the log is the time on the way: two passes through the loopback interface, two wake-ups, and the delay
of the send.
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


def compare(rate: float, seconds: float, seed: int) -> dict[str, Any]:
    """Measure one run. Return a row per percentile, and the time that client and network add to each request (ms)."""
    with known_server.run_server("--slow-share", "0.03", "--seed", str(seed)) as server:
        result, part = loads.measure(
            server.url, seed=seed, mode="open", rate=rate, duration_s=seconds, warmup_s=5, window_s=1
        )
    logged = server.truth_ms(loads.SERIAL)
    rows = part.measured
    missing = [int(index) for index in rows["index"] if int(index) not in logged]
    truth = np.array([logged.get(int(index), np.nan) for index in rows["index"]])
    measured = records.latency_ms(rows)
    lateness = (rows["sent_ns"].astype(np.int64) - rows["intended_ns"].astype(np.int64)) / 1e6
    table = []
    for q in QUANTILES:
        row = percentile(q, measured, truth, 0.2)
        locust = float(result.state["locust_percentiles_ms"][row["percentile"]])
        table.append(row | {"locust_ms": locust, "locust_error_ms": round(locust - row["truth_ms"], 3)})
    return {
        "requests": len(rows),
        "failed": int(np.sum(rows["error"] != records.OK)),
        "not_logged": len(missing),
        "percentiles": table,
        "added_ms": {
            name: round(float(bound(measured - truth)), 3) for name, bound in (("least", np.min), ("most", np.max))
        }
        | {f"p{q * 100:g}": round(float(np.quantile(measured - truth, q)), 3) for q in QUANTILES},
        "lateness_ms": {f"p{q * 100:g}": round(float(np.quantile(lateness, q)), 3) for q in QUANTILES},
        "client_cpu_percent": summary.client_cpu_percent(result.state),
        "validity": loads.judge(result, part).as_dict(),
    }


def percentile(q: float, measured: Any, truth: Any, most_ms: float) -> dict[str, Any]:
    """Return a percentile of measured and of logged times; `within`: by `most_ms` or 1% of the logged one."""
    value, exact = (float(np.sort(times)[stats.rank(len(times), q) - 1]) for times in (measured, truth))
    error = value - exact
    found = {"percentile": f"p{q * 100:g}", "truth_ms": round(exact, 3), "inferctl_ms": round(value, 3)}
    return {**found, "error_ms": round(error, 3), "within": abs(error) <= max(most_ms, 0.01 * exact)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=float, default=100)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    runs = [compare(options.rate, options.seconds, seed) for seed in range(1, options.repeats + 1)]
    for run in runs:
        print(
            f"{run['requests']} requests, {options.rate:g}/s, open loop; {run['failed']} failed, "
            f"{run['not_logged']} not in the log"
        )
        print(f"{'':>6} {'truth':>10} {'inferctl':>10} {'error':>8}   {'Locust':>8} {'error':>8}")
        for row in run["percentiles"]:
            print(
                f"{row['percentile']:>6} {row['truth_ms']:>10.3f} {row['inferctl_ms']:>10.3f} "
                f"{row['error_ms']:>+8.3f}{'' if row['within'] else ' !':2} "
                f"{row['locust_ms']:>8g} {row['locust_error_ms']:>+8.3f}"
            )
        print(f"added per request (ms): {run['added_ms']}; of that send delay: {run['lateness_ms']}")
        print(f"validity: {run['validity']}\n")
    passed = all(row["within"] for run in runs for row in run["percentiles"])
    loads.write(options.json, {"rate": options.rate, "seconds": options.seconds, "passed": passed, "runs": runs})
    print(
        "each percentile is within 0.2 ms or 1% of the truth"
        if passed
        else "at least one percentile is NOT within 0.2 ms or 1% of the truth"
    )
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
