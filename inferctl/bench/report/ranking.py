"""Which configuration is best, and whether the difference is clear.

A winner requires five repeats and a verdict (`verdict.decide`) on each pair of configurations. The pairs share one
error rate: of equal configurations, one wins in fewer than 5% of all results. With fewer repeats, the finding only says
which configuration was fastest in these runs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from inferctl.bench.judge import verdict
from inferctl.bench.receipt import JsonObject
from inferctl.bench.report.rows import MeasuredRow

# A smaller difference is not a clear one, whatever its interval: the same system differs by this much between runs.
MIN_DIFFERENCE = 0.05
# Fewer repeats do not show enough of how runs differ.
REPEATS = 5
# The finding names this many slower configurations. The table has all of them.
NAMED = 4


@dataclass(frozen=True)
class _Comparison:
    """The best configuration compared with another one (`row`).

    `faster` is True if the difference is clear. `interval` is the interval of the ratio in words; empty with too few
    repeats. If the comparison is inconclusive, `repeats_needed` would decide it; None if it would take too many.
    """

    row: MeasuredRow
    faster: bool
    interval: str = ""
    inconclusive: bool = False
    repeats_needed: int | None = None


def eligible(rows: Sequence[MeasuredRow], error_budget_percent: float) -> list[MeasuredRow]:
    """Return the configurations that can win: those that pass the quality check and do not reject requests.

    If all of them reject more than the error budget, rejections do not count.
    """
    passing = [row for row in rows if row.quality.get("passes") is not False]
    accepting = [row for row in passing if (row.rejected_percent or 0) <= error_budget_percent]
    return accepting or passing


def winner(rows: Sequence[MeasuredRow], mode: str, pairs: int) -> str:
    """Return the finding on the eligible configurations `rows`.

    `mode` is that of the load: a closed loop compares throughput, an open loop the p99. `pairs` is the number of all
    pairs in the result, which share one error rate.
    """
    if not rows:
        return "No configuration passes the quality check, so none is recommended."
    best, *others = sorted(rows, key=lambda row: cost(row, mode))
    if not others:
        return f"{best.configuration} is the only eligible configuration: {_figure(best, mode)}, {_quality(best)}."
    repeats = min(len(_run_costs(row, mode)) for row in rows)
    searched = any(row.search for row in rows)
    judged = repeats >= REPEATS and not searched
    compared = [_compare(best, row, mode, pairs) if judged else _compare_once(best, row, mode) for row in others]
    slower = [comparison for comparison in compared if comparison.faster]
    tied = [comparison.row for comparison in compared if not comparison.faster and not comparison.inconclusive]
    runs = "this run" if repeats <= 1 else f"these {repeats} runs"
    sentences = []
    if slower:
        verb = f"is fastest in {runs}" if not judged else "wins" if len(slower) == len(others) else "is faster"
        sentences.append(f"{best.configuration} {verb}: {_ratios(best, slower, mode)}, {_at_quality(best)}.")
    if tied:
        sentences.append(_no_difference(best, tied, mode, "" if judged else f" in {runs}"))
    sentences += [_inconclusive(best, comparison) for comparison in compared if comparison.inconclusive]
    if not judged and not searched:
        sentences.append(f"A winner requires {REPEATS} repeats.")
    return " ".join(sentences)


def _ratios(best: MeasuredRow, slower: Sequence[_Comparison], mode: str) -> str:
    named = ", ".join(
        f"{ratio(comparison.row, best, mode)} of {_name(comparison.row)}{comparison.interval}"
        for comparison in slower[:NAMED]
    )
    return named + (f", and faster than {len(slower) - NAMED} more" if len(slower) > NAMED else "")


def _no_difference(best: MeasuredRow, tied: Sequence[MeasuredRow], mode: str, runs: str) -> str:
    """Name configurations without a clear difference, the one with the best quality first."""
    group, quality = [best, *tied], ""
    if all(row.quality.get("checked") for row in group):
        group.sort(key=lambda row: (-(row.cosine_mean or 0.0), -(row.recall_at_10 or 0.0)))
        if len({_quality(row) for row in group}) > 1:
            quality = f"; {group[0].configuration} has the better quality: {_quality(group[0])}"
    names = " and ".join(row.configuration for row in group)
    return f"No clear difference between {names}{runs} ({_figure(best, mode)}){quality}."


def _inconclusive(best: MeasuredRow, comparison: _Comparison) -> str:
    needed = (
        f"{comparison.repeats_needed} repeats" if comparison.repeats_needed else f"over {verdict.MAX_REPEATS} repeats"
    )
    return f"{best.configuration} against {comparison.row.configuration} is inconclusive: needs {needed}."


def _run_costs(row: MeasuredRow, mode: str) -> dict[int, float]:
    """Return the cost of each run by its repeat (see `cost`). The result of a search has no repeats."""
    if mode == "closed":
        return {run.repeat: 1 / run.requests_per_s for run in row.runs if run.requests_per_s}
    use_p99 = all(run.p99_ms for run in row.runs)
    values = {run.repeat: run.p99_ms if use_p99 else run.p50_ms for run in row.runs}
    return {repeat: float(value) for repeat, value in values.items() if value}


def _compare(best: MeasuredRow, other: MeasuredRow, mode: str, pairs: int) -> _Comparison:
    """Compare two configurations over their repeats, which were measured in alternating order."""
    if mode == "open" and not all(run.p99_ms for row in (best, other) for run in row.runs):
        best, other = (replace(row, runs=[replace(run, p99_ms=None) for run in row.runs]) for row in (best, other))
    best_costs, other_costs = _run_costs(best, mode), _run_costs(other, mode)
    repeats = sorted(best_costs.keys() & other_costs.keys())
    effect = verdict.paired([best_costs[key] for key in repeats], [other_costs[key] for key in repeats])
    base = math.exp(math.fsum(math.log(best_costs[key]) for key in repeats) / len(repeats))
    found = verdict.decide(effect, base, True, verdict.Tolerance(MIN_DIFFERENCE), pairs)
    low, high = 1 + found.low, 1 + found.high
    interval = f"{low:.2f}x to {high:.2f}x" if mode == "closed" else f"{1 / high:.0%} to {1 / low:.0%}"
    return _Comparison(
        other,
        found.outcome == "regression",
        f" ({interval}, {len(repeats)} repeats)",
        found.outcome == "not enough evidence",
        found.repeats_needed,
    )


def _compare_once(best: MeasuredRow, other: MeasuredRow, mode: str) -> _Comparison:
    return _Comparison(other, not no_clear_difference(best, other, mode))


def _name(row: MeasuredRow) -> str:
    emulated = row.precision.get("level") == "emulated"
    return f"{row.configuration} (emulated)" if emulated else row.configuration


def cost(row: MeasuredRow, mode: str) -> float:
    """Return the figure that is compared; smaller is better.

    It is seconds per request for a closed loop, and at the highest rate within the SLO for a search. For an open loop
    it is the p99, or the p50 if there is no p99.
    """
    if row.search:
        best = row.search["max_goodput_rps"]
        return 1 / best if best else math.inf
    if mode == "closed":
        return 1 / row.requests_per_s if row.requests_per_s else math.inf
    value = row.p99_ms or row.p50_ms
    return float(value) if value else math.inf


def no_clear_difference(row: MeasuredRow, other: MeasuredRow, mode: str) -> bool:
    """Return whether two configurations differ by less than 5%, or have intervals that overlap."""
    if row.search and other.search:
        (low, high), (other_low, other_high) = _band(row.search), _band(other.search)
        return (high is None or other_low <= high) and (other_high is None or low <= other_high)
    if abs(cost(other, mode) / cost(row, mode) - 1) < MIN_DIFFERENCE:
        return True
    if mode == "closed":
        span, other_span = row.requests_per_s_interval, other.requests_per_s_interval
        if span is None or other_span is None:
            return True
        return bool(span["low"] <= other_span["high"] and other_span["low"] <= span["high"])
    use_p99 = row.p99_ms and other.p99_ms
    (start, end), (other_start, other_end) = (
        each.p99_interval_ms if use_p99 else each.p50_interval_ms for each in (row, other)
    )
    if start is None or end is None or other_start is None or other_end is None:
        return True
    return start <= other_end and other_start <= end


def _band(search: JsonObject) -> tuple[float, float | None]:
    """Return the rates between which the highest rate within the SLO lies. Older receipts have probed rates only."""
    if band := search.get("band_rps"):
        return band[0], band[1]
    return search["max_goodput_rps"] or 0.0, search["first_failing_rps"]


def ratio(slower: MeasuredRow, best: MeasuredRow, mode: str) -> str:
    """Return how two configurations differ, in words such as `2.00x the requests/s`."""
    if best.search:
        factor = cost(slower, mode) / cost(best, mode)
        return "requests/s within the SLO instead of none" if math.isinf(factor) else f"{factor:.2f}x the goodput"
    if mode == "closed":
        return f"{cost(slower, mode) / cost(best, mode):.2f}x the requests/s"
    return f"{cost(best, mode) / cost(slower, mode):.0%} of the {'p99' if slower.p99_ms else 'p50'}"


def _figure(row: MeasuredRow, mode: str) -> str:
    if row.search:
        best = row.search["max_goodput_rps"]
        return f"{best:.1f} requests/s within the SLO" if best else "no rate met the SLO"
    if mode == "closed" or not row.p99_ms:
        return f"{row.requests_per_s:.1f} requests/s"
    return f"p99 {row.p99_ms:.1f} ms"


def _quality(row: MeasuredRow) -> str:
    if not row.quality.get("checked"):
        return f"quality not checked ({row.quality.get('reason')})"
    return f"cosine {row.cosine_mean:.5f} and recall@10 {row.recall_at_10:.3f} to fp32"


def _at_quality(row: MeasuredRow) -> str:
    return f"at {_quality(row)}" if row.quality.get("checked") else _quality(row)
