"""Figures for each stage of a load (before, during and after a spike), and how long it takes until latency is back to what it was."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from inferctl.bench import stats
from inferctl.bench.judge import summary
from inferctl.bench.load import records
from inferctl.bench.plan.shape import Load, Stage

# Quantiles, best first, and how many answers are looked at together with each; so many such groups in a row must be as before.
GROUPS = {0.99: 50, 0.95: 25, 0.9: 25}
CALM = 3


@dataclass(frozen=True)
class Recovery:
    """Seconds from the end of a disturbance until latency is as it was before.

    `seconds` is None when it is not back by the end, or when nothing can be said: then `reason` says why. `percentile` is the one that was looked
    at, `limit_ms` the upper end of its interval before, and `resolution_s` how long a group of answers lasts: so fine is the answer.
    """

    seconds: float | None
    percentile: str | None = None
    limit_ms: float | None = None
    resolution_s: float | None = None
    reason: str = ""

    def as_dict(self) -> dict[str, Any]:
        return {
            "seconds": None if self.seconds is None else round(self.seconds, 3),
            "percentile": self.percentile,
            "limit_ms": self.limit_ms and round(self.limit_ms, 3),
            "resolution_s": self.resolution_s and round(self.resolution_s, 3),
            "reason": self.reason,
        }


def summarise(parts: Sequence[summary.Part], load: Load) -> list[dict[str, Any]]:
    """One row a stage of `load`, over all `parts` together; empty for a load of one stage.

    A request belongs to the stage in which it should have left. `answered_per_s` counts good answers that arrived while the stage lasted.
    """
    timeline = load.timeline
    if len(timeline) < 2:
        return []
    rows, begun = [], 0.0
    for stage in timeline:
        rows.append(_stage(parts, stage, begun))
        begun += stage.duration_s
    return rows


def _stage(parts: Sequence[summary.Part], stage: Stage, begun: float) -> dict[str, Any]:
    end = begun + stage.duration_s
    chosen, latencies, arrived = [], [], 0
    for part in parts:
        measured = part.measured
        at = offsets_s(part, measured["intended_ns"])
        chosen.append(measured[(at >= begun) & (at < end)])
        latencies.append(records.latency_ms(chosen[-1][chosen[-1]["error"] == records.OK]))
        ends = offsets_s(part, part.completed["end_ns"])
        arrived += int(np.sum((ends >= begun) & (ends < end)))
    rows = np.concatenate(chosen)
    sent = rows[rows["error"] != records.DROPPED]
    late = (sent["sent_ns"].astype(np.int64) - sent["intended_ns"].astype(np.int64)) / 1e6 > summary.LATE_MS
    seconds = stage.duration_s * len(parts)
    return {
        "name": stage.name,
        "start_s": round(begun, 6),
        "end_s": round(end, 6),
        "rate": stage.rate,
        "users": stage.users,
        "requests": len(rows),
        "offered_per_s": round(len(rows) / seconds, 3),
        "answered_per_s": round(arrived / seconds, 3),
        "errors": {
            name: count for code, name in records.ERROR_NAMES.items() if (count := int(np.sum(rows["error"] == code)))
        },
        "late": int(np.sum(late)),
        "dropped": int(np.sum(rows["error"] == records.DROPPED)),
        "latency_ms": summary.latency_summary(latencies),
    }


def recovery(part: summary.Part, load: Load) -> Recovery:
    """How long after the busiest stage of one run the p99 is back to what it was in the stages before it; p95 or p90 where n is too small for it.

    Before the disturbance one answer in a hundred takes longer than the p99. Afterwards answers are looked at in groups of fifty (of 25 with p95
    and p90), in the order of their intended sends: a group is as before when no more of them exceed the upper end of that percentile's interval
    than chance allows (97.5 %, binomial), and latency is back where three groups in a row are. A failed request counts as one that took longer.
    """
    timeline = load.timeline
    levels = [stage.rate if load.mode == "open" else stage.users for stage in timeline]
    peak = max(range(len(timeline)), key=lambda number: levels[number] or 0)
    if not 0 < peak < len(timeline) - 1:
        return Recovery(None, reason="the busiest stage has none before it and after it")
    begun = math.fsum(stage.duration_s for stage in timeline[:peak])
    over = begun + timeline[peak].duration_s
    rows = part.measured
    at = offsets_s(part, rows["intended_ns"])
    latency = np.where(rows["error"] == records.OK, records.latency_ms(rows), np.inf)
    ordered = latency[at < begun]
    quiet = np.sort(ordered)
    each = (stats.quantile(quiet, q, series=[ordered]) for q in GROUPS)
    before = next((found for found in each if found.high is not None), None)
    if before is None or before.high is None:
        return Recovery(None, reason=f"n too small before it: {len(quiet)} of {stats.needed(min(GROUPS))} answers")
    if not math.isfinite(before.high):
        return Recovery(None, reason="requests failed before it")
    return _back(at[at >= over] - over, latency[at >= over] > before.high, before.q, before.high)


def _back(at: npt.NDArray[np.float64], longer: npt.NDArray[np.bool_], q: float, limit_ms: float) -> Recovery:
    name, size = f"p{q * 100:g}", GROUPS[q]
    order = np.argsort(at, kind="stable")
    groups = len(order) // size
    if groups < CALM:
        return Recovery(None, name, limit_ms, reason=f"n too small after it: {len(order)} of {CALM * size} answers")
    times = at[order][: groups * size].reshape(groups, size)
    calm = longer[order][: groups * size].reshape(groups, size).sum(axis=1) <= _allowed(size, q)
    resolution = float(np.median(times[:, -1] - times[:, 0]))
    for number in range(groups - CALM + 1):
        if calm[number : number + CALM].all():
            # With the first calm group it was back at the end already, as far as can be seen.
            return Recovery(float(times[number][0]) if number else 0.0, name, limit_ms, resolution)
    return Recovery(None, name, limit_ms, resolution, "it was not back by the end of the run")


def _allowed(n: int, q: float) -> int:
    """Answers of n that may exceed the q-quantile by chance, 97.5 % of the time."""
    chance, total, count = q**n, 0.0, 0
    while (total := total + chance) < 1 - (1 - stats.CONFIDENCE) / 2:
        chance *= (n - count) / (count + 1) * (1 - q) / q
        count += 1
    return count


def offsets_s(part: summary.Part, times_ns: npt.NDArray[np.uint64]) -> npt.NDArray[np.float64]:
    """Seconds after the start of the measurement, shape (n,)."""
    return (times_ns.astype(np.int64) - part.start_ns) / 1e9
