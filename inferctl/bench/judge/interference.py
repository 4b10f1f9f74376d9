"""How much slower answers get beside busy neighbours: figures and intervals out of runs without and with them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from inferctl.bench import stats
from inferctl.bench.judge import summary
from inferctl.bench.load import records

QUANTILES = (0.5, 0.9, 0.99)
# Fewer pairs than this say too little of how runs differ; the interval then comes from within the runs.
PAIRS_NEEDED = 5
# Two intervals of this confidence hold together with 95 % (Bonferroni).
_EACH = 0.975


def inflation(without: Sequence[summary.Part], beside: Sequence[summary.Part]) -> dict[str, Any]:
    """Latency `without` and `beside` busy neighbours, run i of one next to run i of the other, and the factor between them.

    `percentiles` maps p50, p90 and p99 to `without_ms`, `with_ms`, `factor` and its 95 % interval `low`, `high`; all None where n is too
    small. `interval` says where the intervals come from.
    """
    pairs = min(len(without), len(beside))
    over_runs = pairs >= PAIRS_NEEDED
    found = {
        f"p{q * 100:g}": _over_runs(without, beside, q) if over_runs else _within_runs(without, beside, q)
        for q in QUANTILES
    }
    how = (
        f"Student's t on the logarithms of the factors of {pairs} pairs of runs"
        if over_runs
        else "order statistics of the pooled answers, widened to the factors of the single pairs; "
        f"an interval over runs needs {PAIRS_NEEDED} pairs"
    )
    return {"pairs": pairs, "percentiles": found, "interval": how}


def _within_runs(without: Sequence[summary.Part], beside: Sequence[summary.Part], q: float) -> dict[str, Any]:
    # Other runs must not stand in for one that answered nothing.
    single = [(_point(a, q), _point(b, q)) for a, b in zip(without, beside, strict=False)]
    if any(point is None for pair in single for point in pair):
        return _none(0, stats.needed(q, _EACH))
    before, after = (
        stats.quantile(_latencies(parts), q, _EACH, series=[part.latencies for part in parts])
        for parts in (without, beside)
    )
    if before.value is None or after.value is None:
        return _none(min(before.n, after.n), stats.needed(q, _EACH))
    assert before.low and before.high and after.low is not None and after.high is not None
    # Runs differ by more than their answers show: a pair that lies outside has seen it.
    factors = [b / a for a, b in single if a and b]
    low, high = min(after.low / before.high, *factors), max(after.high / before.low, *factors)
    return _figures(before.value, after.value, after.value / before.value, low, high)


def _point(part: summary.Part, q: float) -> float | None:
    ascending = _latencies([part])
    return float(ascending[stats.rank(len(ascending), q) - 1]) if len(ascending) else None


def _over_runs(without: Sequence[summary.Part], beside: Sequence[summary.Part], q: float) -> dict[str, Any]:
    each = [
        (stats.quantile(_latencies([a]), q), stats.quantile(_latencies([b]), q))
        for a, b in zip(without, beside, strict=False)
    ]
    if small := [one for pair in each for one in pair if one.value is None]:
        return _none(min(one.n for one in small), stats.needed(q))
    values = [(a.value or 0.0, b.value or 0.0) for a, b in each]
    factors = [math.log(b / a) for a, b in values]
    found = stats.mean_interval(factors)
    assert found  # PAIRS_NEEDED is more than three
    mean, half = found
    before, after = (math.exp(math.fsum(math.log(pair[side]) for pair in values) / len(values)) for side in (0, 1))
    return _figures(before, after, math.exp(mean), math.exp(mean - half), math.exp(mean + half))


def _latencies(parts: Sequence[summary.Part]) -> Any:
    return np.sort(np.concatenate([part.latencies for part in parts]))


def _figures(before: float, after: float, factor: float, low: float, high: float) -> dict[str, Any]:
    return {
        "without_ms": round(before, 3),
        "with_ms": round(after, 3),
        "factor": round(factor, 4),
        "low": round(low, 4),
        "high": round(high, 4),
    }


def _none(n: int, needed: int) -> dict[str, Any]:
    none: dict[str, Any] = dict.fromkeys(("without_ms", "with_ms", "factor", "low", "high"))
    return none | {"n": n, "needed": needed}


def achieved(rows: records.Rows, start_ns: int, end_ns: int) -> dict[str, Any]:
    """What a neighbour did within [start, end): good answers a second, and failures."""
    ended = rows[(rows["end_ns"] >= start_ns) & (rows["end_ns"] < end_ns)]
    good = int(np.sum(ended["error"] == records.OK))
    return {"requests_per_s": round(good / (end_ns - start_ns) * 1e9, 3), "failed": len(ended) - good}
