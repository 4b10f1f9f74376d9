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


@dataclass(frozen=True)
class Figures:
    """A percentile without and with loaded neighbors (ms), and the factor between them with its 95% interval.

    `low` and `high` are None with fewer than five pairs of runs.
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
    compare = _over_runs if over_runs else _pooled
    how = f"none: an interval needs {RECOMMENDED_REPEATS} pairs of runs"
    if over_runs:
        how = f"Student's t on the logarithms of the factors of {pairs} pairs of runs"
    return Inflation(pairs, {f"p{q * 100:g}": compare(without, loaded, q) for q in QUANTILES}, how)


def _pooled(without: Sequence[RunRecords], loaded: Sequence[RunRecords], q: float) -> Figures | NotEnoughSamples:
    """Return the factor of all runs together. An interval would need to know how runs differ."""
    # Other runs must not replace one without good responses.
    if not all(len(run.latencies) for run in (*without, *loaded)):
        return NotEnoughSamples(0, stats.needed(q))
    before, after = (
        stats.quantile(_latencies(runs), q, series=[run.latencies for run in runs]) for runs in (without, loaded)
    )
    if before.value is None or after.value is None:
        return NotEnoughSamples(min(before.n, after.n), stats.needed(q))
    return _figures(before.value, after.value, after.value / before.value, None, None)


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
