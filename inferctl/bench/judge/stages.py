"""Figures of each stage of a load: before, during and after a spike."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from inferctl.bench.judge import summary
from inferctl.bench.judge.summary import RunRecords
from inferctl.bench.judge.summary_types import Counts
from inferctl.bench.load import records
from inferctl.bench.plan.shape import Load, Stage
from inferctl.receipts.receipt import JsonObject


class StageSummary(Counts):
    """The figures of one stage, as in a receipt. Latencies are in ms."""

    name: str | None
    start_s: float
    end_s: float
    rate: float | None
    users: int | None
    offered_per_s: float
    answered_per_s: float
    latency_ms: JsonObject


def summarize(runs: Sequence[RunRecords], load: Load) -> list[StageSummary]:
    """Return one summary per stage of `load`, over all `runs` together; empty for a load with one stage.

    A request belongs to the stage of its intended send. `answered_per_s` counts good responses that arrived during the
    stage.
    """
    timeline = load.timeline
    if len(timeline) < 2:
        return []
    stages, start = [], 0.0
    for stage in timeline:
        stages.append(_summarize(runs, stage, start))
        start += stage.duration_s
    return stages


def _summarize(runs: Sequence[RunRecords], stage: Stage, start: float) -> StageSummary:
    end = start + stage.duration_s
    chosen, latencies, arrived = [], [], 0
    for run in runs:
        measured = run.measured
        at = offsets_s(run, measured["intended_ns"])
        inside = measured[(at >= start) & (at < end)]
        chosen.append(inside)
        latencies.append(records.latency_ms(inside[inside["error"] == records.OK]))
        ends = offsets_s(run, run.completed["end_ns"])
        arrived += int(np.sum((ends >= start) & (ends < end)))
    rows = np.concatenate(chosen)
    seconds = stage.duration_s * len(runs)
    return {
        **summary.count(rows),
        "name": stage.name,
        "start_s": round(start, 6),
        "end_s": round(end, 6),
        "rate": stage.rate,
        "users": stage.users,
        "offered_per_s": round(len(rows) / seconds, 3),
        "answered_per_s": round(arrived / seconds, 3),
        "latency_ms": summary.latency_summary(latencies),
    }


def offsets_s(run: RunRecords, times_ns: npt.NDArray[np.uint64]) -> npt.NDArray[np.float64]:
    """Return seconds after the start of the measurement, shape (n,)."""
    return (times_ns.astype(np.int64) - run.start_ns) / 1e9
