"""Check the accuracy of TTFT and ITL: compare each percentile with the log of a server that emits tokens.

    python benchmarks/harness/token_accuracy.py [--seconds 20] [--users 1 8 32] [--rate 20] [--json FILE]

`token_server.py` emits tokens at log-normal times (median 40 ms to the first, then 10 ms) and logs the actual times:
the nanoseconds from reading the request to writing each event. It is measured by closed loops of 1, 8 and 32 users, and
by an open loop. Each percentile of inferctl over the measured requests is compared with the same percentile of the log
for the same requests. The check passes if each is within 0.5 ms or 1% of the logged value.

The difference is the time on the way, and of the events that are read together: their times are equal for the client.
"""

from __future__ import annotations

import sys
from typing import Any

import accuracy
import loads
import numpy as np
import token_server

from inferctl.bench.judge import summary
from inferctl.bench.load import records

MOST_MS = 0.5


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
    cpu_ns = result.state["cpu_ns"]
    return {
        "load": label,
        "requests": len(wanted),
        "failed": int(np.sum(part.rows["error"][measured] != records.OK)),
        "tokens": int(np.sum(streams.tokens[measured])),
        "tokens_logged": events,
        "percentiles": [
            accuracy.percentile(name, q, found, truth, MOST_MS)
            for name, (found, truth) in figures.items()
            for q in accuracy.QUANTILES
        ],
        "client_cpu_percent": summary.client_cpu_percent(result.state),
        # With little load, most of it is the cost of the waking process.
        "client_us_per_event": round(cpu_ns / 1e3 / max(1, events), 1),
        "validity": loads.judge(result, part).as_dict(),
    }


def main() -> int:
    options = loads.options(__doc__, seconds=20.0, users=[1, 8, 32], rate=20.0, output_tokens=64)
    generation = {"input_tokens": 64, "output_tokens": options.output_tokens}
    sent: dict[str, dict[str, Any]] = {f"{users} users": {"users": users} for users in options.users}
    if options.rate:
        sent[f"{options.rate:g} requests/s"] = {"mode": "open", "rate": options.rate}
    runs = [
        compare(label, options.seconds, seed, generation=generation, **load)
        for seed, (label, load) in enumerate(sent.items(), 1)
    ]
    return accuracy.finish(options, runs, MOST_MS)


if __name__ == "__main__":
    sys.exit(main())
