"""Check the accuracy of TTFT and ITL: compare each percentile with the log of a server that emits tokens.

    python benchmarks/harness/token_accuracy.py [--seconds 20] [--users 1 8 32] [--rate 20] [--json FILE]

`token_server.py` emits tokens at log-normal times (median 40 ms to the first, then 10 ms) and logs the actual times:
the nanoseconds from reading the request to writing each event. It is measured by closed loops of 1, 8 and 32 users, and
by an open loop. Each percentile of inferctl over the measured requests is compared with the same percentile of the log
for the same requests. The check passes if each is within 0.5 ms or 1% of the logged value.

The difference is the time on the way, and of the events that are read together: their times are equal for the client.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import accuracy
import loads
import numpy as np
import token_server

from inferctl.bench.judge import summary
from inferctl.bench.load import records


def compare(label: str, seconds: float, seed: int, **load: Any) -> dict[str, Any]:
    """Measure one load. Return a row per figure and percentile."""
    with token_server.run_server("--seed", str(seed)) as server:
        result, part = loads.measure(
            server.url, seed=seed, task="generate", duration_s=seconds, warmup_s=3, window_s=1, **load
        )
    streams = part.streams
    assert streams  # the task is generate
    log = token_server.truth(server.log, loads.SERIAL)
    measured = part.rows["phase"] == records.MEASURED
    wanted = part.rows["index"][measured].tolist()
    logged = [[ms for ms, _ in log.get(int(index), [])] for index in wanted]
    events = sum(map(len, logged))
    figures = {
        "ttft": (streams.ttft_ms[measured], np.array([times[0] for times in logged if times])),
        "itl": (streams.gaps["ms"][measured[streams.gaps["owner"]]], np.concatenate([np.diff(t) for t in logged])),
    }
    table = []
    for name, (found, truth) in figures.items():
        for q in accuracy.QUANTILES:
            row = accuracy.percentile(q, found, truth, 0.5)
            row |= {"figure": name, "n": len(found), "n_logged": len(truth)}
            table.append(row | {"within": row["within"] and len(found) == len(truth)})
    cpu_ns = result.state["cpu_ns"]
    return {
        "load": label,
        "requests": len(wanted),
        "failed": int(np.sum(part.rows["error"][measured] != records.OK)),
        "tokens": int(np.sum(streams.tokens[measured])),
        "tokens_logged": events,
        "percentiles": table,
        "client_cpu_percent": summary.client_cpu_percent(result.state),
        # With little load, most of it is the cost of the waking process.
        "client_us_per_event": round(cpu_ns / 1e3 / max(1, events), 1),
        "validity": loads.judge(result, part).as_dict(),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--users", type=int, nargs="*", default=[1, 8, 32])
    parser.add_argument("--rate", type=float, default=20)
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    generation = {"input_tokens": 64, "output_tokens": options.output_tokens}
    runs = [
        compare(f"{users} users", options.seconds, users, users=users, generation=generation) for users in options.users
    ]
    if options.rate:
        runs.append(
            compare(
                f"{options.rate:g} requests/s",
                options.seconds,
                7,
                mode="open",
                rate=options.rate,
                generation=generation,
            )
        )
    for run in runs:
        print(
            f"{run['load']}: {run['requests']} requests, {run['failed']} failed, {run['tokens']} tokens "
            f"({run['tokens_logged']} in the log), client {run['client_cpu_percent']}% of a core, "
            f"{run['client_us_per_event']} us per event"
        )
        print(f"{'':>10} {'n':>7} {'truth':>10} {'inferctl':>10} {'error':>8}")
        for row in run["percentiles"]:
            print(
                f"{row['figure']:>5} {row['percentile']:>4} {row['n']:>7} {row['truth_ms']:>10.3f} "
                f"{row['inferctl_ms']:>10.3f} {row['error_ms']:>+8.3f}{'' if row['within'] else ' !'}"
            )
        print(f"validity: {run['validity']}\n")
    passed = all(row["within"] for run in runs for row in run["percentiles"])
    loads.write(options.json, {"seconds": options.seconds, "passed": passed, "runs": runs})
    print(f"each percentile is {'' if passed else 'NOT '}within 0.5 ms or 1% of the truth")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
