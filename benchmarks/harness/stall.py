"""Check that an open loop shows a stall of the server, and that a closed loop hides it.

The server sends no response for 1 s in every 10 s.

    python benchmarks/harness/stall.py [--rate 100] [--periods 3] [--every 10] [--stall 1] [--users 4] [--json FILE]

The expected p99 of an open loop. The server responds after b. In each period of length T, it sends no response during
the first S. A request that is due at a time u after the start of a period waits b if u + b >= S, and S - u otherwise.
Requests are due evenly over the period, independent of the server, so for b <= x <= S

    P(latency > x) = P(u < S - x) = (S - x) / T

The p99 is the x with (S - x) / T = 0.01, that is x = S - 0.01 T: 900 ms for S = 1 s and T = 10 s.

The expected p99 of a closed loop. One request per period and user is delayed, and the user sends no other request in
that time. In the rest of the period it receives (T - S) / b responses. With b = 10 ms, one request in 901 is slow
(0.11%), so the p99 is b. The p99 does not show the stall, because the closed loop sends no requests during it. The
maximum shows it, and so does the p99.9 of a long run.

The check passes if the p99 of the open loop is within 5% of the analytic value and that of the closed loop is below 10%
of it.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import known_server
import loads

from inferctl.bench.judge import summary

MEDIAN_MS = 10.0


def analytic_p99_ms(every_s: float, stall_s: float) -> float:
    """Return the p99 of an open loop (ms), as derived above. It requires a stall of more than 1% of a period."""
    return 1e3 * (stall_s - 0.01 * every_s)


def measure_stall(every_s: float, stall_s: float, periods: int, label: str, **load: Any) -> dict[str, Any]:
    """Return the latencies under one loop, over whole periods."""
    options = (
        "--sigma",
        "0",
        "--median-ms",
        str(MEDIAN_MS),
        "--stall-every",
        str(every_s),
        "--stall-for",
        str(stall_s),
    )
    with known_server.run_server(*options) as server:
        done, part = loads.measure(server.url, duration_s=every_s * periods, warmup_s=0, **load)
    found = summary.summarize([part])
    return {
        "loop": label,
        "requests": found["requests"],
        "requests_per_s": found["requests_per_s"],
        "latency_ms": found["latency_ms"],
        "late": found["late"],
        "validity": loads.judge(done, part).as_dict(),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=float, default=100)
    parser.add_argument("--periods", type=int, default=3)
    parser.add_argument("--every", type=float, default=10, help="seconds")
    parser.add_argument("--stall", type=float, default=1, help="seconds")
    parser.add_argument("--users", type=int, default=4)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    shape = (options.every, options.stall, options.periods)
    opened = measure_stall(
        *shape,
        f"open loop, {options.rate:g} requests/s, latency from the intended send time",
        mode="open",
        arrivals="constant",
        rate=options.rate,
    )
    closed = measure_stall(*shape, f"closed loop, {options.users} users", users=options.users)
    expected = analytic_p99_ms(options.every, options.stall)
    print(
        f"no response for {options.stall:g} s of every {options.every:g} s; "
        f"analytic p99 of an open loop: {expected:.0f} ms"
    )
    for run in (opened, closed):
        figures = {name: run["latency_ms"][name]["value"] for name in ("p50", "p90", "p99", "p99.9")}
        print(f"{run['loop']}: {run['requests']} requests, {figures}, max {run['latency_ms']['max']} ms")
        print(f"  validity: {run['validity']}")
    p99, hidden = (run["latency_ms"]["p99"]["value"] for run in (opened, closed))
    passed = (
        p99 is not None and abs(p99 - expected) <= 0.05 * expected and hidden is not None and hidden < 0.1 * expected
    )
    loads.write(options.json, {"analytic_p99_ms": expected, "open": opened, "closed": closed, "passed": passed})
    if p99 is not None:
        print(f"open loop: {100 * (p99 / expected - 1):+.1f}% of the analytic value; closed loop: p99 of {hidden} ms")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
