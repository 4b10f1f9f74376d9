"""Does a stall show? A server that answers nothing for one second in every ten, under an open and under a closed loop.

    python benchmarks/harness/stall.py [--rate 100] [--periods 3] [--every 10] [--stall 1] [--users 4] [--json FILE]

What the p99 of an open loop must be. The server answers after b; within each period of length T nothing is answered for the first S.
A request that is due u after the start of a period waits b when u + b >= S, and S - u otherwise. Requests are due evenly over the period,
whatever the server does, so for b <= x <= S

    P(latency > x) = P(u < S - x) = (S - x) / T

The p99 is the x with (S - x) / T = 0.01, that is x = S - 0.01 T: 900 ms for S = 1 s and T = 10 s.

What a closed loop shows. Each of its clients is held up by one request a period and sends nothing more meanwhile; before and after it gets
(T - S) / b answers. With b = 10 ms that is one slow request among 901: a ninth of a per cent, so the p99 is b. The stall is not in it:
the closed loop stopped asking. (It is in the maximum, and in the p99.9 of a run that is long enough.)

It passes when the open loop's p99 is within 5 % of the analytic value and the closed loop's is under a tenth of it.
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
    """The p99 of an open loop, ms; the derivation is above. Only where more than one request in a hundred is due during a stall."""
    return 1e3 * (stall_s - 0.01 * every_s)


def stalled(every_s: float, stall_s: float, periods: int, label: str, **load: Any) -> dict[str, Any]:
    """Latencies under one loop, over whole periods."""
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
    with known_server.running(*options) as server:
        done, part = loads.measure(server.url, duration_s=every_s * periods, warmup_s=0, **load)
    found = summary.summarize([part])
    return {
        "loop": label,
        "requests": found["requests"],
        "requests_per_s": found["requests_per_s"],
        "latency_ms": found["latency_ms"],
        "late": found["late"],
        "validity": loads.judged(done, part).as_dict(),
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
    opened = stalled(
        *shape,
        f"open loop, {options.rate:g} requests/s whatever the server does, latency from the intended send",
        mode="open",
        arrivals="constant",
        rate=options.rate,
    )
    closed = stalled(*shape, f"closed loop, {options.users} clients that wait for their answers", users=options.users)
    expected = analytic_p99_ms(options.every, options.stall)
    print(
        f"nothing is answered for {options.stall:g} s of every {options.every:g} s; analytic p99 of an open loop: {expected:.0f} ms"
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
        print(f"open loop: {100 * (p99 / expected - 1):+.1f} % of the analytic value; closed loop: p99 of {hidden} ms")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
