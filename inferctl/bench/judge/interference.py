"""How much slower responses are with loaded neighbors, with intervals, from runs without and with them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from inferctl.bench import stats
from inferctl.bench.judge import summary
from inferctl.bench.judge.summary import RunRecords
from inferctl.bench.judge.verdict import RECOMMENDED_REPEATS
from inferctl.bench.load import records

QUANTILES = (0.5, 0.9, 0.99)
# With one or two pairs there is no interval. In simulations of runs that differ by 5% to 10%, one that was widened to
# the factors of the pairs contained the true factor in 25% to 97% of the results. With three pairs, 98% or more did.
_FEWEST_PAIRS = 3
# Two intervals of this confidence are jointly valid with 95% (Bonferroni).
_EACH = 0.975


@dataclass(frozen=True)
class Figures:
    """A percentile without and with loaded neighbors (ms), and the factor between them with its 95% interval.

    `low` and `high` are None with fewer than three pairs of runs.
    """

    without_ms: float
    with_ms: float
    factor: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class NotEnoughSamples:
    """A percentile without figures: it has `n` of the `needed` samples."""

    n: int
    needed: int


@dataclass(frozen=True)
class Inflation:
    """The inflation of p50, p90 and p99 over `pairs` of runs. `interval` says how the intervals were computed."""

    pairs: int
    percentiles: Mapping[str, Figures | NotEnoughSamples]
    interval: str

    def as_dict(self) -> dict[str, Any]:
        """Return the keys of the receipt; the figures of a percentile without enough samples are null."""
        none = dict.fromkeys(("without_ms", "with_ms", "factor", "low", "high"))
        percentiles = {
            key: asdict(figures) if isinstance(figures, Figures) else none | asdict(figures)
            for key, figures in self.percentiles.items()
        }
        return {"pairs": self.pairs, "percentiles": percentiles, "interval": self.interval}


def inflation(without: Sequence[RunRecords], loaded: Sequence[RunRecords]) -> Inflation:
    """Return the factor between latencies `without` loaded neighbors and next to them (`loaded`).

    Run i of one and run i of the other are a pair.
    """
    pairs = min(len(without), len(loaded))
    over_runs = pairs >= RECOMMENDED_REPEATS
    compare = _over_runs if over_runs else _within_runs
    if over_runs:
        how = f"Student's t on the logarithms of the factors of {pairs} pairs of runs"
    elif pairs < _FEWEST_PAIRS:
        how = f"none: an interval needs {RECOMMENDED_REPEATS} pairs of runs"
    else:
        how = (
            "order statistics of the pooled responses, widened to the factors of the single pairs; "
            f"an interval over runs needs {RECOMMENDED_REPEATS} pairs"
        )
    return Inflation(pairs, {f"p{q * 100:g}": compare(without, loaded, q) for q in QUANTILES}, how)


def _within_runs(without: Sequence[RunRecords], loaded: Sequence[RunRecords], q: float) -> Figures | NotEnoughSamples:
    # Other runs must not replace one without good responses.
    single = [(_quantile(a, q), _quantile(b, q)) for a, b in zip(without, loaded, strict=False)]
    if any(value is None for pair in single for value in pair):
        return NotEnoughSamples(0, stats.needed(q, _EACH))
    before, after = (
        stats.quantile(_latencies(runs), q, _EACH, series=[run.latencies for run in runs]) for runs in (without, loaded)
    )
    if before.value is None or after.value is None:
        return NotEnoughSamples(min(before.n, after.n), stats.needed(q, _EACH))
    assert before.low and before.high and after.low is not None and after.high is not None
    if len(single) < _FEWEST_PAIRS:
        return _figures(before.value, after.value, after.value / before.value, None, None)
    # Runs differ by more than the responses within them show: the interval includes the factor of each pair.
    factors = [b / a for a, b in single if a and b]
    low, high = min(after.low / before.high, *factors), max(after.high / before.low, *factors)
    return _figures(before.value, after.value, after.value / before.value, low, high)


def _quantile(run: RunRecords, q: float) -> float | None:
    ascending = _latencies([run])
    return float(ascending[stats.rank(len(ascending), q) - 1]) if len(ascending) else None


def _over_runs(without: Sequence[RunRecords], loaded: Sequence[RunRecords], q: float) -> Figures | NotEnoughSamples:
    each = [
        (stats.quantile(_latencies([a]), q), stats.quantile(_latencies([b]), q))
        for a, b in zip(without, loaded, strict=False)
    ]
    if small := [quantile for pair in each for quantile in pair if quantile.value is None]:
        return NotEnoughSamples(min(quantile.n for quantile in small), stats.needed(q))
    values = [(a.value or 0.0, b.value or 0.0) for a, b in each]
    interval = stats.mean_interval([math.log(b / a) for a, b in values])
    assert interval  # RECOMMENDED_REPEATS is more than three
    mean, half_width = interval
    before, after = (math.exp(math.fsum(math.log(pair[side]) for pair in values) / len(values)) for side in (0, 1))
    return _figures(before, after, math.exp(mean), math.exp(mean - half_width), math.exp(mean + half_width))


def _latencies(runs: Sequence[RunRecords]) -> Any:
    return np.sort(np.concatenate([run.latencies for run in runs]))


def _figures(before: float, after: float, factor: float, low: float | None, high: float | None) -> Figures:
    low, high = (None if end is None else round(end, 4) for end in (low, high))
    return Figures(round(before, 3), round(after, 3), round(factor, 4), low, high)


def achieved(rows: records.Rows, start_ns: int, end_ns: int) -> tuple[float, int, int]:
    """Return good responses per second, and the numbers of failed and of rejected requests, within [start, end)."""
    ended = rows[(rows["end_ns"] >= start_ns) & (rows["end_ns"] < end_ns)]
    good, counts = int(np.sum(ended["error"] == records.OK)), summary.count(ended)
    failed = sum(summary.failures(counts).values())
    return round(good / (end_ns - start_ns) * 1e9, 3), failed, counts["rejected"]
