"""Figures of each stage of a load (before, during and after a spike), and the time until the latency has recovered."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from inferctl.bench import stats
from inferctl.bench.judge import summary
from inferctl.bench.judge.summary import RunRecords
from inferctl.bench.judge.summary_types import Counts
from inferctl.bench.load import records
from inferctl.bench.plan.shape import Load, Stage
from inferctl.receipts.receipt import JsonObject

# Quantiles in order of preference, with the number of consecutive responses in a group.
GROUP_SIZES = {0.99: 50, 0.95: 25, 0.9: 25}
# Consecutive groups that must be as before the disturbance.
RECOVERED_GROUPS = 3


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


@dataclass(frozen=True)
class Recovery:
    """The time from the end of a disturbance until latency is as it was before.

    `seconds` is None if the latency did not recover, or if that is unknown: `reason` says which. `percentile` is the
    one that was compared, `limit_ms` the upper end of its interval before the disturbance. `resolution_s` is the
    duration of a group of responses, and so the resolution of `seconds`.
    """

    seconds: float | None
    percentile: str | None = None
    limit_ms: float | None = None
    resolution_s: float | None = None
    reason: str = ""

    def as_dict(self) -> dict[str, float | str | None]:
        """Return the recovery as it is in a receipt."""
        return {
            "seconds": None if self.seconds is None else round(self.seconds, 3),
            "percentile": self.percentile,
            "limit_ms": self.limit_ms and round(self.limit_ms, 3),
            "resolution_s": self.resolution_s and round(self.resolution_s, 3),
            "reason": self.reason,
        }


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


def recovery(run: RunRecords, load: Load) -> Recovery:
    """Return how long after the busiest stage of a run the p99 is back to its value in the stages before.

    The p95 or the p90 is used where there are too few samples for the p99. Before the disturbance, one response in a
    hundred takes longer than the p99. After it, responses are checked in groups of 50 (25 for p95 and p90), in the
    order of their intended sends. A group is as before if no more of them exceed the upper end of the percentile's
    interval than chance allows (binomial, 97.5% for three groups together, widened by the variance inflation factor
    before the disturbance). The latency has recovered at the first of three such groups in a row. A failed
    request counts as one that took longer.
    """
    timeline = load.timeline
    levels = [stage.rate if load.mode == "open" else stage.users for stage in timeline]
    peak = max(range(len(timeline)), key=lambda number: levels[number] or 0)
    if not 0 < peak < len(timeline) - 1:
        return Recovery(None, reason="there is no stage before or after the busiest one")
    start = math.fsum(stage.duration_s for stage in timeline[:peak])
    end = start + timeline[peak].duration_s
    rows = run.measured
    at = offsets_s(run, rows["intended_ns"])
    latency = np.where(rows["error"] == records.OK, records.latency_ms(rows), np.inf)
    series = latency[at < start]
    ascending = np.sort(series)
    each = (stats.quantile(ascending, q, series=[series]) for q in GROUP_SIZES)
    before = next((quantile for quantile in each if quantile.high is not None), None)
    if before is None or before.high is None:
        needed = stats.needed(min(GROUP_SIZES))
        return Recovery(None, reason=f"not enough samples before it: {len(ascending)} of {needed} responses")
    if not math.isfinite(before.high):
        return Recovery(None, reason="requests failed before it")
    return _recovery(at[at >= end] - end, latency[at >= end] > before.high, before)


def _recovery(at: npt.NDArray[np.float64], longer: npt.NDArray[np.bool_], before: stats.Quantile) -> Recovery:
    """Return the recovery from times after the disturbance, and whether each response took longer than the limit."""
    q, limit_ms = before.q, before.high
    name, size = f"p{q * 100:g}", GROUP_SIZES[q]
    order = np.argsort(at, kind="stable")
    groups = len(order) // size
    if groups < RECOVERED_GROUPS:
        needed = RECOVERED_GROUPS * size
        return Recovery(None, name, limit_ms, reason=f"not enough samples after it: {len(order)} of {needed} responses")
    times = at[order][: groups * size].reshape(groups, size)
    as_before = longer[order][: groups * size].reshape(groups, size).sum(axis=1) <= _allowed(
        size, q, before.variance_inflation or 1.0
    )
    resolution = float(np.median(times[:, -1] - times[:, 0]))
    for number in range(groups - RECOVERED_GROUPS + 1):
        if as_before[number : number + RECOVERED_GROUPS].all():
            # If the first group is as before, the latency had recovered at the end of the disturbance.
            return Recovery(float(times[number][0]) if number else 0.0, name, limit_ms, resolution)
    return Recovery(None, name, limit_ms, resolution, "the latency did not recover by the end of the run")


def _allowed(n: int, q: float, variance_inflation: float = 1.0) -> int:
    """Return how many of n responses may exceed the q-quantile by chance.

    The counts of `RECOVERED_GROUPS` groups are all within it with a probability of 97.5% or more (Bonferroni).
    If the responses are autocorrelated, the distance from the mean count is multiplied by the square root of
    `variance_inflation`.
    """
    chance, total, count = q**n, 0.0, 0
    while (total := total + chance) < 1 - (1 - stats.CONFIDENCE) / 2 / RECOVERED_GROUPS:
        chance *= (n - count) / (count + 1) * (1 - q) / q
        count += 1
    mean = n * (1 - q)
    return min(n, math.ceil(mean + math.sqrt(variance_inflation) * (count - mean)))


def offsets_s(run: RunRecords, times_ns: npt.NDArray[np.uint64]) -> npt.NDArray[np.float64]:
    """Return seconds after the start of the measurement, shape (n,)."""
    return (times_ns.astype(np.int64) - run.start_ns) / 1e9
