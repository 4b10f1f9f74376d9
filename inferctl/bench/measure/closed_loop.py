"""The closed loop before each open loop whose rate is a share of the capacity: `rate: 60%` in a plan.

    run 1:      closed loop ─► requests/s, which is the capacity ─► open loop at 60% of it ─► latency
    other runs: closed loop ─► requests/s                        ─► open loop at the same rate ─► latency

A closed loop sends less to a server that stalls, and so hardly shows the stall: latency needs an open loop. An open
loop receives what it sends: throughput needs a closed loop.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from inferctl.bench.judge import summary
from inferctl.bench.load import records
from inferctl.bench.measure.measured_server import MeasuredServer
from inferctl.bench.measure.outcome import Measurement
from inferctl.bench.plan import workload
from inferctl.bench.plan.plan import Run
from inferctl.bench.plan.shape import Load
from inferctl.bench.plan.tokens import Tokenizer
from inferctl.core.errors import InferctlError
from inferctl.receipts import rejections


def measure(
    server: MeasuredServer,
    load: Load,
    corpus: str,
    seed: int,
    run: Run,
    folder: Path,
    tokenizer: Tokenizer | None = None,
) -> Measurement:
    """Run the closed loop. Its records are in a folder of their own.

    Raises `InferctlError` if the server completed no request, or rejected too many of them.
    """
    loop = load.as_single_stage(duration_s=load.capacity_s)
    work = workload.draw(loop, corpus, seed, tokenizer)
    measurement = server.labeled("closed loop, {phase}").measure(work, run, folder / "closed-loop")
    if reason := rejections.reason(measurement.summary):
        raise InferctlError(f"closed loop with {loop.users} users: {reason}")
    if not measurement.summary["requests_per_s"]:
        raise InferctlError(
            f"the server completed no request of a closed loop with {loop.users} users",
            "set `rate` in requests/s, or give the loop more time with `capacity_s`",
        )
    return measurement


def weighted_rate(part: summary.RunRecords) -> float:
    """Return requests/s of a short closed loop, where each request counts by its share inside the window.

    Responses come in batches. In a short window the number of whole responses depends on where the window ends.
    """
    good = part.rows[part.rows["error"] == records.OK]
    starts, ends = (good[name].astype(np.float64) for name in ("intended_ns", "end_ns"))
    inside = np.minimum(ends, part.end_ns) - np.maximum(starts, part.start_ns)
    shares = np.maximum(inside, 0) / np.maximum(ends - starts, 1)
    return float(shares.sum()) / part.seconds


def pooled(measurements: Sequence[Measurement]) -> dict[str, Any] | None:
    """Return the `closed_loop` key of a receipt, over all runs; None if there was no closed loop."""
    loops = [run.closed_loop for run in measurements if run.closed_loop]
    if not loops:
        return None
    figures = summary.summarize([loop.records for loop in loops])
    return {
        "users": loops[0].load and loops[0].load.users,
        "reference_rps": measurements[0].capacity_rps,
        "summary": figures,
    }


def of_run(measurement: Measurement) -> dict[str, Any] | None:
    """Return the `closed_loop` key of one run in a receipt."""
    if not (loop := measurement.closed_loop):
        return None
    return {
        "users": loop.load and loop.load.users,
        "serial": loop.serial,
        "summary": loop.summary,
        "resources": loop.resources,
        "records": records.digests(loop.folder),
    }
