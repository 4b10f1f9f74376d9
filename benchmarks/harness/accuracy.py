"""Check the accuracy of the percentiles: compare them with those that the server logs itself.

    python benchmarks/harness/accuracy.py [--rate 100] [--seconds 60] [--repeats 1] [--json FILE]

An open loop sends requests at `--rate` to a server with a known latency distribution: log-normal with a median of
20 ms, 3% of the responses 300 ms slower, fixed seed. For each request, the server logs the nanoseconds from reading it
to writing its response. Each percentile of inferctl is compared with the same percentile of the log for the same
requests. The check passes if each is within 0.2 ms or 1% of the logged value.

The difference to the log is the time on the way: two passes through the loopback interface, two wake-ups, and the delay
of the send.
"""

from __future__ import annotations

import sys
from typing import Any

import known_server
import loads
import numpy as np

from inferctl.bench import stats
from inferctl.bench.judge import summary
from inferctl.bench.load import records

QUANTILES = (0.5, 0.9, 0.95, 0.99)
MOST_MS = 0.2


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
    return {
        "load": f"{rate:g} requests/s",
        "requests": len(rows),
        "failed": int(np.sum(rows["error"] != records.OK)),
        "not_logged": len(missing),
        "percentiles": [percentile("latency", q, measured, truth, MOST_MS) for q in QUANTILES],
        "added_ms": {
            name: round(float(bound(measured - truth)), 3) for name, bound in (("least", np.min), ("most", np.max))
        }
        | {f"p{q * 100:g}": round(float(np.quantile(measured - truth, q)), 3) for q in QUANTILES},
        "lateness_ms": {f"p{q * 100:g}": round(float(np.quantile(lateness, q)), 3) for q in QUANTILES},
        "client_cpu_percent": summary.client_cpu_percent(result.state),
        "validity": loads.judge(result, part).as_dict(),
    }


def percentile(figure: str, q: float, measured: Any, truth: Any, most_ms: float) -> dict[str, Any]:
    """Return a percentile of measured and of logged times; `within`: by `most_ms` or 1% of the logged one, and each
    measured time has one in the log.
    """
    value, exact = (float(np.sort(times)[stats.rank(len(times), q) - 1]) for times in (measured, truth))
    error = value - exact
    within = abs(error) <= max(most_ms, 0.01 * exact) and len(measured) == len(truth)
    found = {"figure": figure, "percentile": f"p{q * 100:g}", "n": len(measured), "n_logged": len(truth)}
    times = {"truth_ms": round(exact, 3), "inferctl_ms": round(value, 3), "error_ms": round(error, 3)}
    return found | times | {"within": within}


def finish(options: Any, runs: list[dict[str, Any]], most_ms: float) -> int:
    """Print the runs, write them to `--json`, and return the exit code."""
    for run in runs:
        print(", ".join(f"{name} {run[name]}" for name in run if name not in ("percentiles", "validity")))
        print(f"{'':>12} {'n':>7} {'truth':>10} {'inferctl':>10} {'error':>8}")
        for row in run["percentiles"]:
            print(
                f"{row['figure']:>7} {row['percentile']:>4} {row['n']:>7} {row['truth_ms']:>10.3f} "
                f"{row['inferctl_ms']:>10.3f} {row['error_ms']:>+8.3f}{'' if row['within'] else ' !'}"
            )
        print(f"validity: {run['validity']}\n")
    passed = all(row["within"] for run in runs for row in run["percentiles"])
    loads.write(options.json, {"rate": options.rate, "seconds": options.seconds, "passed": passed, "runs": runs})
    print(f"each percentile is {'' if passed else 'NOT '}within {most_ms:g} ms or 1% of the truth")
    return 0 if passed else 1


def main() -> int:
    options = loads.options(__doc__, rate=100.0, seconds=60.0, repeats=1)
    runs = [compare(options.rate, options.seconds, seed) for seed in range(1, options.repeats + 1)]
    return finish(options, runs, MOST_MS)


if __name__ == "__main__":
    sys.exit(main())
