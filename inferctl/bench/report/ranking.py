"""Which configuration is best, and whether the difference is clear.

One figure (`Criterion`) ranks the configurations, is tested and is named in the sentence. A winner requires five
repeats and a verdict (`verdict.decide`) on each other configuration. With fewer repeats, the finding only says which
configuration was fastest in these runs.

To win is one claim: it is wrong only if at least one of the verdicts is (an intersection-union test; R. L. Berger,
Technometrics 24, 1982). To be faster than some of the others is one claim for each pair, and all pairs share the error
rate (Bonferroni).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import geometric_mean
from typing import Literal

from inferctl.bench import stats
from inferctl.bench.judge import validity, verdict
from inferctl.bench.report import search_findings
from inferctl.bench.report.rows import MeasuredRow, RunFigures
from inferctl.receipts import shares
from inferctl.receipts.noise import Noise
from inferctl.receipts.receipt import JsonObject

# A smaller difference is not a clear one, whatever its interval: the same system differs by this much between runs.
MIN_DIFFERENCE = 0.05
# The share of results in which one of two equal configurations wins. It is up to 0.2 percentage points higher if the
# machine drifts, and is to stay under 5% (benchmarks/harness/winners.py).
ERROR_RATE = 0.035
# The finding names this many slower configurations. The table has all of them.
NAMED = 4
_P99_NEEDS = stats.needed(0.99)

Figure = Literal["goodput", "requests_per_s", "output_tokens_per_s", "p99", "p50"]
_LATENCIES: tuple[Figure, ...] = ("p99", "p50")
# How the figures of throughput are called.
_RATES: Mapping[Figure, str] = {"requests_per_s": "requests/s", "output_tokens_per_s": "output tokens/s"}


@dataclass(frozen=True)
class Criterion:
    """The figure by which a group of configurations is compared, and the repeats that all of them have.

    `goodput` is the highest rate within the SLO of a search. With the recommended repeats or more (`tested`), the
    figure is that of each run. With fewer, it is that of all runs of a configuration together.
    """

    figure: Figure
    repeats: Sequence[int] = ()

    @property
    def tested(self) -> bool:
        return len(self.repeats) >= verdict.RECOMMENDED_REPEATS

    def cost(self, row: MeasuredRow) -> float:
        """Return the compared figure, so that smaller is better: seconds per request, or ms. Infinity if unknown.

        Over the runs it is the geometric mean, which is also the center of the test.
        """
        if self.tested:
            return geometric_mean(self.costs_of_runs(row))
        if self.figure == "goodput":
            best = row.search and row.search["max_goodput_rps"]
            return 1 / best if best else math.inf
        if self.figure in _RATES:
            rate = rate_of(row, self)
            return 1 / rate if rate else math.inf
        return (row.p99_ms if self.figure == "p99" else row.p50_ms) or math.inf

    def costs_of_runs(self, row: MeasuredRow) -> list[float]:
        """Return the figure of each common repeat, in their order."""
        by_repeat = {run.repeat: _cost_of_run(run, self.figure) for run in row.runs}
        return [by_repeat[repeat] or math.inf for repeat in self.repeats]


def criterion(rows: Sequence[MeasuredRow]) -> Criterion:
    """Return how to compare `rows`, which received the same load.

    A closed loop compares requests/s, or output tokens/s of generation. An open loop compares the p99 if every run has
    one, else the p50. With fewer than the recommended repeats, it is enough if all runs of a row together have a p99.
    The result of a search has no repeats.
    """
    if any(row.search for row in rows):
        return Criterion("goodput")
    if rows[0].mode == "closed":
        figure: Figure = "output_tokens_per_s" if any(row.generation for row in rows) else "requests_per_s"
        return Criterion(figure, _common_repeats(rows, figure))
    found = Criterion("p50", _common_repeats(rows, "p50"))
    if found.tested:
        have_p99 = all(run.p99_ms for row in rows for run in row.runs if run.repeat in found.repeats)
    else:
        have_p99 = all(row.p99_ms for row in rows)
    return replace(found, figure="p99") if have_p99 else found


def _common_repeats(rows: Sequence[MeasuredRow], figure: Figure) -> list[int]:
    """Return the repeats in which each row has the figure."""
    known = [{run.repeat for run in row.runs if _cost_of_run(run, figure)} for row in rows]
    return sorted(set.intersection(*known)) if known else []


def _cost_of_run(run: RunFigures, figure: Figure) -> float | None:
    if figure in _RATES:
        rate = run.output_tokens_per_s if figure == "output_tokens_per_s" else run.requests_per_s
        return 1 / rate if rate else None
    return run.p99_ms if figure == "p99" else run.p50_ms


@dataclass(frozen=True)
class Comparison:
    """The faster configuration compared with the other one (`row`).

    [`low`, `high`] is the 95% interval of the ratio of their costs (`Criterion.cost`); None without one. `faster` is
    True if the difference is clear, `equal` if a difference over 5% is ruled out. If neither is, `repeats_needed`
    would decide it; None if it would take too many, or with too few repeats for a test.
    """

    row: MeasuredRow
    faster: bool = False
    equal: bool = False
    low: float | None = None
    high: float | None = None
    repeats_needed: int | None = None


def eligible(rows: Sequence[MeasuredRow], error_budget_percent: float) -> list[MeasuredRow]:
    """Return the configurations that can win: those that pass the quality check and do not reject requests.

    If all of them reject more than the error budget, those with a p99 of all requests can win. Latencies of the others
    are of the requests that their servers selected, and cannot be compared.
    """
    passing = [row for row in rows if row.quality.get("passes") is not False]
    accepting = [row for row in passing if (row.rejected_percent or 0) <= error_budget_percent]
    return accepting or [row for row in passing if (row.rejected_percent or 0) <= 100 * shares.P99_SHARE]


def none_eligible(rows: Sequence[MeasuredRow]) -> str:
    """Return why none of the configurations can win."""
    if all(row.quality.get("passes") is False for row in rows):
        return "No configuration passes the quality check, so none is recommended."
    limit = f"{shares.P99_SHARE:.0%}"
    return (
        f"Each configuration that passes the quality check rejects over {limit} of the requests: none is recommended."
    )


def winner(rows: Sequence[MeasuredRow], measured: int, groups: int, pairs: int) -> list[str]:
    """Return the findings on the eligible ones of the `measured` configurations. The first one is the result.

    All `groups` of the result, with `pairs` of configurations, share one error rate. If other programs used the cores,
    no configuration is better than another one: the noise may differ between their runs, and its effect too.
    """
    by = criterion(rows)
    if noise := noise_of(rows):
        text = noise.text if all(noise in row.noise for row in rows) else validity.up_to(noise.text)
        what = f"Too noisy to {'compare' if len(rows) > 1 else 'judge'} {_names(rows)}"
        figures = ", ".join(f"{row.configuration} {value_of(row, by)}" for row in rows)
        quality = f", {_quality(rows[0])}" if len(rows) == 1 else ""
        return [
            f"{what}: {text}; {noise.action}.",
            f"Measured next to this load: {figures}{quality}. Intervals do not cover its effect.",
        ]
    best, *others = sorted(rows, key=by.cost)
    if others and math.isinf(by.cost(best)):
        return [f"{_names(rows)}: {value_of(best, by)}."]
    if not others:
        if best.search and measured == 1:
            return search_findings.sentences(best.configuration, best.search)[:1]
        name = best.configuration if measured == 1 else f"Only {best.configuration} can be recommended"
        return [f"{name}: {value_of(best, by)}, {_quality(best)}."]
    compared = [compare(best, row, by, ERROR_RATE / groups) for row in others]
    if not all(comparison.faster for comparison in compared):
        compared = [compare(best, row, by, ERROR_RATE / pairs) for row in others]
    slower = [comparison for comparison in compared if comparison.faster]
    tied = [each for each in compared if not each.faster and (each.equal if by.tested else each.low is not None)]
    unclear = [comparison for comparison in compared if comparison not in slower and comparison not in tied]
    parts = []
    if slower:
        # A sentence of its own has the quality of all configurations without a clear difference.
        quality = "" if tied or unclear else f", {_at_quality(best)}"
        parts.append(f"{best.configuration} {_faster(best, slower, len(others), by)}{quality}")
    if tied:
        parts.append(_no_difference(best, tied, by))
    parts += [_unclear(best, comparison, by) for comparison in unclear]
    headline = "; ".join(parts)
    sentences = [f"{headline[0].upper() if tied and not slower else headline[0]}{headline[1:]}."]
    if quality := _better_quality([best, *(comparison.row for comparison in tied)]):
        sentences.append(quality)
    if by.figure == "p50":
        which = "run" if by.tested else "configuration"
        sentences.append(f"The p50 is compared, since not every {which} has the {_P99_NEEDS} responses of a p99.")
    if not by.tested and by.figure != "goodput":
        sentences.append(f"For a winner, run again with `--repeats {verdict.RECOMMENDED_REPEATS}`.")
    return sentences


def noise_of(rows: Sequence[MeasuredRow]) -> Noise | None:
    """Return the largest noise during the runs of `rows`; None if none is above its limit."""
    return max((found for row in rows for found in row.noise), key=lambda found: found.share, default=None)


def runs_of(by: Criterion) -> str:
    """Return the runs that were compared, in words: `this run`, `these 3 runs`."""
    return "this run" if len(by.repeats) <= 1 else f"these {len(by.repeats)} runs"


def _faster(best: MeasuredRow, slower: Sequence[Comparison], others: int, by: Criterion) -> str:
    """Return in words that `best` is faster than the `slower` ones; `others` is the number of all other ones."""
    if by.tested or len(slower) == others:
        verb = f"is fastest in {runs_of(by)}" if not by.tested else "wins" if len(slower) == others else "is faster"
    else:
        verb = f"is faster in {runs_of(by)}"
    ratios = [ratio_to(best, comparison, by, number == 0) for number, comparison in enumerate(slower[:NAMED])]
    more = f", and faster than {len(slower) - NAMED} more" if len(slower) > NAMED else ""
    return f"{verb}: {', '.join(ratios)}{more}"


def ratio_to(best: MeasuredRow, comparison: Comparison, by: Criterion, with_unit: bool = True) -> str:
    """Return `2.00x the requests/s of fp32 (1.90x to 2.10x)`, without the unit if another ratio has named it."""
    found = ratio(comparison.row, best, by)
    if not with_unit and found[0].isdigit():
        found = f"{found.rpartition('the ')[0]}that"
    return f"{found} of {named(comparison.row)}{interval_text(comparison, by)}"


def enumerated(parts: Sequence[str]) -> str:
    """Return `a`, `a and b`, or `a, b and c`."""
    return " and ".join(part for part in (", ".join(parts[:-1]), parts[-1]) if part)


def _names(rows: Sequence[MeasuredRow]) -> str:
    return enumerated([row.configuration for row in rows])


def _no_difference(best: MeasuredRow, tied: Sequence[Comparison], by: Criterion) -> str:
    """Name configurations without a clear difference, the one with the best quality first, with their ratios."""
    group = [best, *(comparison.row for comparison in tied)]
    if all(row.quality.get("checked") for row in group):
        group.sort(key=_distance)
    where = f"{len(by.repeats)} repeats" if by.tested else runs_of(by)
    ratios = [ratio_to(best, comparison, by, number == 0) for number, comparison in enumerate(tied)]
    return f"no clear difference between {_names(group)} in {where}: {named(best)} has {enumerated(ratios)}"


def _unclear(best: MeasuredRow, comparison: Comparison, by: Criterion) -> str:
    """Return what is known about a comparison without a verdict, and why there is none."""
    found = f"{best.configuration} has {ratio_to(best, comparison, by)}"
    if not by.tested:
        return f"{found} in {runs_of(by)}, which has too few samples for an interval"
    needed = comparison.repeats_needed or f"over {verdict.MAX_REPEATS}"
    return f"{found}, and it takes {needed} repeats to decide"


def _better_quality(tied: list[MeasuredRow]) -> str:
    """Return which of several configurations without a clear difference is closest to fp32; empty if none is."""
    if len(tied) < 2 or not _qualities_differ(tied):
        return ""
    closest = min(tied, key=_distance)
    return f"{closest.configuration} has the {'better' if len(tied) == 2 else 'best'} quality: {_quality(closest)}."


def _qualities_differ(rows: Sequence[MeasuredRow]) -> bool:
    return all(row.quality.get("checked") for row in rows) and len({_quality(row) for row in rows}) > 1


def compare(row: MeasuredRow, other: MeasuredRow, by: Criterion, error_rate: float) -> Comparison:
    """Compare two configurations over their repeats, which were measured in alternating order.

    `row` must have the smaller cost. With too few repeats, a difference is clear if the intervals do not overlap.
    """
    if not by.tested:
        return _compare_once(row, other, by)
    costs, other_costs = by.costs_of_runs(row), by.costs_of_runs(other)
    found = verdict.decide(
        verdict.effect_on_logs(costs, other_costs, interleaved=True),
        by.cost(row),
        True,
        verdict.Tolerance(MIN_DIFFERENCE),
        error_rate,
    )
    return Comparison(
        other,
        faster=found.outcome == "regression",
        equal=found.outcome == "no regression",
        low=1 + found.low,
        high=1 + found.high,
        repeats_needed=found.repeats_needed,
    )


def interval_text(comparison: Comparison, by: Criterion) -> str:
    """Return the interval of a ratio in parentheses, with the repeats of a test; empty without an interval."""
    low, high = comparison.low, comparison.high
    if low is None or high is None:
        return ""
    if by.figure in _LATENCIES:
        text = f"{1 / high:.0%} to {1 / low:.0%}" if low else f"{1 / high:.0%} or more"
    else:
        text = f"{times(low)} or more" if math.isinf(high) else f"{times(low)} to {times(high)}"
    return f" ({text}, {len(by.repeats)} repeats)" if by.tested else f" ({text})"


def named(row: MeasuredRow) -> str:
    """Return the name of a configuration; that of an emulated precision says so."""
    emulated = row.precision.get("level") == "emulated"
    return f"emulated {row.configuration}" if emulated else row.configuration


def _compare_once(row: MeasuredRow, other: MeasuredRow, by: Criterion) -> Comparison:
    """Compare by all runs together: a difference over 5% is clear if the intervals do not overlap.

    The interval of the ratio goes from the ratio of the nearest ends to that of the farthest ends. It contains 1 if
    the intervals overlap, and is at least as wide as a 95% interval of the ratio.
    """
    (low, high), (other_low, other_high) = interval_of(row, by), interval_of(other, by)
    if by.figure in _LATENCIES:
        low, high, other_low, other_high = other_low, other_high, low, high
    if low is None or other_low is None:
        return Comparison(other)
    least = low / other_high if other_high else 0.0
    most = high / other_low if high and other_low else math.inf
    clear = by.figure == "goodput" or by.cost(other) / by.cost(row) - 1 >= MIN_DIFFERENCE
    return Comparison(other, faster=clear and least > 1, low=least, high=most)


def interval_of(row: MeasuredRow, by: Criterion) -> tuple[float | None, float | None]:
    """Return the 95% interval (of a search: the band) of the compared figure of all runs of a configuration.

    None where it is unknown; of a band, an upper end of None is open.
    """
    if by.figure == "goodput":
        return _band(row.search or {})
    if by.figure in _LATENCIES:
        return row.p99_interval_ms if by.figure == "p99" else row.p50_interval_ms
    found = row.requests_per_s_interval
    if by.figure == "output_tokens_per_s" and row.generation:
        found = row.generation["output_tokens_per_s_interval"]
    return (found["low"], found["high"]) if found else (None, None)


def _band(search: JsonObject) -> tuple[float, float | None]:
    """Return the rates between which the highest rate within the SLO lies. Older receipts have probed rates only."""
    if band := search.get("band_rps"):
        return band[0], band[1]
    return search.get("max_goodput_rps") or 0.0, search.get("first_failing_rps")


def times(factor: float) -> str:
    """Return a factor with three digits: `1.04x`, `10.2x`, `297x`."""
    return f"{factor:.2f}x" if factor < 9.995 else f"{factor:.1f}x" if factor < 99.95 else f"{factor:.0f}x"


def ratio(slower: MeasuredRow, best: MeasuredRow, by: Criterion) -> str:
    """Return how two configurations differ, in words such as `2.00x the requests/s`."""
    factor = by.cost(slower) / by.cost(best)
    if by.figure == "goodput":
        return "requests/s within the SLO instead of none" if math.isinf(factor) else f"{times(factor)} the goodput"
    if name := _RATES.get(by.figure):
        return f"{times(factor)} the {name}"
    return f"{1 / factor:.0%} of the {by.figure}"


def value_of(row: MeasuredRow, by: Criterion) -> str:
    """Return the compared figure of all runs of a configuration, with its unit."""
    if by.figure == "goodput":
        best = row.search and row.search["max_goodput_rps"]
        within = f"within the SLO ({search_findings.slo_of(row.search or {})})"
        return f"{best:.1f} requests/s {within}" if best else f"no rate {within} was confirmed"
    value = row.p99_ms if by.figure == "p99" else row.p50_ms
    if by.figure in _RATES or not value:
        return f"{rate_of(row, by):.1f} {_RATES.get(by.figure, 'requests/s')}"
    return f"{by.figure} {value:.1f} ms"


def rate_of(row: MeasuredRow, by: Criterion) -> float:
    """Return the throughput of all runs of a configuration: output tokens/s if these are compared, else requests/s."""
    if by.figure == "output_tokens_per_s" and row.generation:
        return float(row.generation["output_tokens_per_s"])
    return row.requests_per_s


def _distance(row: MeasuredRow) -> tuple[float, float]:
    """Return the distance of a configuration to fp32: the smallest is the best quality."""
    if row.task in ("rerank", "classify"):
        return row.score_difference or 0.0, -(row.kendall or row.top_1 or 0.0)
    if row.task == "generate":
        return row.kl_mean or 0.0, -(row.top_1 or 0.0)
    return -(row.cosine_mean or 0.0), -(row.recall_at_10 or 0.0)


def _quality(row: MeasuredRow) -> str:
    if not row.quality.get("checked"):
        return f"quality not checked ({row.quality.get('reason')})"
    if row.task == "rerank":
        return f"scores within {row.score_difference:.2g} of fp32 and Kendall's tau {row.kendall:.3f}"
    if row.task == "classify":
        return f"scores within {row.score_difference:.2g} of fp32 and {row.top_1:.1%} of the labels the same"
    if row.task == "generate":
        return f"KL divergence {row.kl_mean:.4f} and top-1 agreement {row.top_1:.1%} to fp32"
    return f"cosine {row.cosine_mean:.5f} and recall@10 {row.recall_at_10:.3f} to fp32"


def _at_quality(row: MeasuredRow) -> str:
    return f"at {_quality(row)}" if row.quality.get("checked") else _quality(row)
