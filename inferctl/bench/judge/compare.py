"""Compare receipts of the same load: what became worse, and how certain that is.

    pair receipts ─► reject invalid pairs ─► judge each metric (verdict.py) and the quality ─► result

No numpy, so that a CI step can compare with the core package alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import geometric_mean

from inferctl.bench.judge import comparable, quality_drop, retrieval, run_metrics, verdict
from inferctl.bench.judge.comparable import ReceiptPair
from inferctl.bench.judge.compare_result import (
    CompareResult,
    MetricResult,
    PairOutcome,
    PairResult,
    PointsResult,
    SampleResult,
    facts,
)
from inferctl.bench.judge.run_metrics import METRICS, REJECTED, Metric, RunValues
from inferctl.core.errors import UsageError
from inferctl.receipts.noise import of_receipt


@dataclass(frozen=True)
class CompareOptions:
    """The smallest changes that count, and what to compare.

    `thresholds` are shares by metric; they replace the defaults in `METRICS`. The floors are minimum absolute
    differences: in ms, in MiB, in percentage points; `floor_ndcg` is one of nDCG@10, in points. `metrics` are judged;
    empty: all that were measured. `allow` lists accepted differences, from `comparable.ALLOWABLE`.
    """

    thresholds: Mapping[str, float] = field(default_factory=dict)
    floor_ms: float = 0.05
    floor_mib: float = 8.0
    floor_rejected: float = 0.1
    floor_ndcg: float = retrieval.MARGIN
    metrics: Sequence[str] = ()
    allow: Sequence[str] = ()

    def selected(self, pair: ReceiptPair) -> list[Metric]:
        """Return the metrics of a pair to judge by their ratio."""
        return [metric for name, metric in METRICS.items() if pair.old.task in metric.tasks and self.judges(name)]

    def judges(self, name: str) -> bool:
        """Return whether to judge a metric, by its name."""
        return not self.metrics or name in self.metrics

    def tolerance(self, metric: Metric) -> verdict.Tolerance:
        floor = {"ms": self.floor_ms, "MiB": self.floor_mib}.get(metric.unit, 0.0)
        return verdict.Tolerance(self.thresholds.get(metric.name, metric.threshold), floor)


def compare(pairs: Sequence[ReceiptPair], notes: Sequence[str], options: CompareOptions) -> CompareResult:
    """Return the result for all pairs. All metrics that are judged share one error rate.

    Raises `UsageError` if a pair is one receipt twice, or has none of the metrics that were requested.
    """
    for pair in pairs:
        if pair.new and pair.new.seal == pair.old.seal:
            what = f"{pair.old.path} and {pair.new.path} are the same receipt"
            raise UsageError(what, "give the baseline first, then the candidate")
        if options.metrics and not {REJECTED, retrieval.NAME} & {*options.metrics} and not options.selected(pair):
            known = [name for name, metric in METRICS.items() if pair.old.task in metric.tasks]
            what = f"{pair.name} has no figure {' or '.join(options.metrics)}: its task is {pair.old.task}"
            raise UsageError(what, f"use: {', '.join(known)}")
    reasons = [comparable.invalid_because(pair, options.allow) for pair in pairs]
    judged = [pair for pair, why in zip(pairs, reasons, strict=True) if not why]
    family = sum(run_metrics.is_sample(pair, metric) for pair in judged for metric in options.selected(pair))
    ndcg = options.judges(retrieval.NAME)
    family += sum(_judges_rejected(pair, options) + (ndcg and retrieval.is_judged(pair)) for pair in judged)
    family = max(1, family)
    results = [
        _invalid(pair, why, options.allow) if why else _judge_pair(pair, options, family)
        for pair, why in zip(pairs, reasons, strict=True)
    ]
    return CompareResult(results, notes, family)


def _judge_pair(pair: ReceiptPair, options: CompareOptions, family: int) -> PairResult:
    assert pair.new is not None  # `invalid_because` gives a reason otherwise
    rows = [judge(pair, metric, options, family) for metric in options.selected(pair)]
    rows = [_beside_noise(pair, row) for row in [*rows, *_judge_rejected(pair, options, family)]]
    rows += quality_drop.judge(pair, options.allow)
    if options.judges(retrieval.NAME):
        rows += retrieval.judge(pair, options.floor_ndcg, family, required=bool(options.metrics))
    outcomes = {row.outcome for row in rows}
    order: tuple[PairOutcome, ...] = ("regression", "not enough evidence", "improvement")
    return PairResult(
        pair.name,
        old=facts(pair.old),
        new=facts(pair.new),
        outcome=next((outcome for outcome in order if outcome in outcomes), "no regression"),
        interleaved=pair.interleaved,
        notes=_notes(pair, options),
        metrics=rows,
    )


def _invalid(pair: ReceiptPair, reasons: Sequence[str], allowed: Sequence[str]) -> PairResult:
    """Return the result of a pair that cannot be compared, with the values of `--allow` that would change this."""
    choices = (("precision",), ("hardware",), ("precision", "hardware"))
    allow = next((choice for choice in choices if not comparable.invalid_because(pair, [*allowed, *choice])), ())
    return PairResult(
        pair.name,
        old=facts(pair.old),
        new=facts(pair.new) if pair.new else None,
        outcome="invalid",
        reasons=reasons,
        allow=allow,
    )


def judge(pair: ReceiptPair, metric: Metric, options: CompareOptions, family: int) -> MetricResult:
    """Return the verdict on one metric, which shares the error rate with `family` metrics."""
    values, tolerance = run_metrics.values(pair, metric), options.tolerance(metric)
    if not values.missing and run_metrics.is_single_value(pair, metric):
        return _judge_single(metric, max(values.old), max(values.new), tolerance)
    if not run_metrics.is_sample(pair, metric):
        return _too_few(metric, values, tolerance, required=metric.name in options.metrics or metric.required)
    effect = verdict.effect_on_logs(values.old, values.new, pair.interleaved)
    old = geometric_mean(values.old)
    found = verdict.decide(effect, old, metric.higher_is_worse, tolerance, verdict.ERROR_RATE / family)
    return MetricResult(
        metric.name,
        metric.unit,
        outcome=found.outcome,
        reason=found.reason,
        old=round(old, 4),
        new=round(old * (1 + found.change), 4),
        repeats_needed=found.repeats_needed,
        sample=SampleResult(
            metric.higher_is_worse,
            tolerance.threshold,
            tolerance.floor,
            old_runs=[round(value, 4) for value in values.old],
            new_runs=[round(value, 4) for value in values.new],
            change=round(found.change, 5),
            interval=(round(found.low, 5), round(found.high, 5)),
            worse_at_most=round(found.worst_case, 5),
            spread=round(effect.spread, 5),
        ),
    )


def _beside_noise(pair: ReceiptPair, row: MetricResult) -> MetricResult:
    """Return a figure of speed or rejections without its verdict, if noise was above its limit in separate runs.

    In interleaved runs, the noise is in the differences within the repeats, and so in the interval.
    """
    noise = [found for sealed in (pair.old, pair.new) if sealed for found in of_receipt(sealed.data)]
    if pair.interleaved or not noise or row.unit not in ("ms", "/s", "%") or (row.change is None and not row.points):
        return row
    worst = max(noise, key=lambda found: found.share)
    reason = f"{worst.text}, and the runs do not alternate: measure both in one benchmark, or {worst.action}"
    return replace(row, outcome="not enough evidence", reason=reason, repeats_needed=None, seconds_needed=None)


def _too_few(metric: Metric, values: RunValues, tolerance: verdict.Tolerance, required: bool) -> MetricResult:
    """Return the result of a metric without enough values; only a `required` metric makes the result inconclusive."""
    runs = "1 run is" if values.fewest == 1 else f"{values.fewest} runs are"
    reason = f"{runs} not enough to estimate how runs differ: {verdict.RECOMMENDED_REPEATS} repeats are needed"
    return MetricResult(
        metric.name,
        metric.unit,
        outcome="not enough evidence" if required else "not compared",
        reason=values.missing or reason,
        old=round(geometric_mean(values.old), 4) if values.old else None,
        new=round(geometric_mean(values.new), 4) if values.new else None,
        repeats_needed=None if values.missing else verdict.RECOMMENDED_REPEATS,
        seconds_needed=values.seconds_needed,
        sample=SampleResult(metric.higher_is_worse, tolerance.threshold, tolerance.floor, values.old, values.new),
    )


def _judge_single(metric: Metric, old: float, new: float, tolerance: verdict.Tolerance) -> MetricResult:
    """Return the verdict on a metric that has one value per side: by its tolerance alone."""
    increase = new - old if metric.higher_is_worse else old - new
    worse = increase > max(tolerance.threshold * old, tolerance.floor)
    return MetricResult(
        metric.name,
        metric.unit,
        outcome="regression" if worse else "no regression",
        reason="one process per side: judged by the tolerance alone" if worse else "",
        old=round(geometric_mean([old]), 4),
        new=round(geometric_mean([new]), 4),
        sample=SampleResult(
            metric.higher_is_worse,
            tolerance.threshold,
            tolerance.floor,
            old_runs=[old],
            new_runs=[new],
            change=round(new / old - 1, 5),
        ),
    )


def _judge_rejected(pair: ReceiptPair, options: CompareOptions, family: int) -> list[MetricResult]:
    """Return the verdict on the share of rejected requests (429), as a list of one; empty if no side rejected any.

    It is judged by the difference in percentage points: a share of zero has no ratio.
    """
    if not _judges_rejected(pair, options):
        return []
    values, floor = run_metrics.rejected(pair), options.floor_rejected
    old, new = (round(math.fsum(side) / len(side), 4) for side in (values.old, values.new))
    sample = SampleResult(True, 0.0, floor, values.old, values.new)
    if values.fewest < verdict.MIN_RUNS:
        needed = verdict.RECOMMENDED_REPEATS
        reason = f"requests were rejected: {needed} repeats are needed to judge that"
        return [MetricResult(REJECTED, "%", "not enough evidence", reason, old, new, needed, sample=sample)]
    found = verdict.decide_difference(values.old, values.new, pair.interleaved, floor, verdict.ERROR_RATE / family)
    points = PointsResult(
        round(found.change, 4), (round(found.low, 4), round(found.high, 4)), round(found.worst_case, 4)
    )
    return [MetricResult(REJECTED, "%", found.outcome, found.reason, old, new, found.repeats_needed, sample, points)]


def _judges_rejected(pair: ReceiptPair, options: CompareOptions) -> bool:
    """Return whether to judge the share of rejected requests: if it is requested, or if a side rejected any."""
    values = run_metrics.rejected(pair)
    return options.judges(REJECTED) and (bool(options.metrics) or any(values.old) or any(values.new))


def _notes(pair: ReceiptPair, options: CompareOptions) -> list[str]:
    assert pair.new is not None
    old, new, notes = pair.old, pair.new, []
    if "precision" in options.allow and old.precision != new.precision:
        notes.append(f"different precisions, as allowed: {old.precision} and {new.precision}")
    if "hardware" in options.allow:
        notes += [f"as allowed: {difference}" for difference in comparable.hardware_differences(old, new)]
    if old.weights_sha256 != new.weights_sha256:
        notes.append("the weights differ (sha256): each quality is relative to the fp32 vectors of its own weights")
    if retrieval.is_weak(new):
        notes.append("nDCG@10 is that of weak queries: titles or first lines of documents")
    if closed := old.data.get("closed_loop"):
        notes.append(
            f"latencies: open loop at {old.load['rate']:g} requests/s, {old.load['capacity_percent']:g}% of the "
            f"capacity of the first target; requests/s: closed loop of {closed['users']} users"
        )
    runs = min(len(old.runs), len(new.runs))
    if not pair.interleaved and runs >= verdict.MIN_RUNS:
        notes.append(
            "measured separately: a change of the machine between them counts as a regression or improvement; measure "
            "both in one benchmark"
        )
    if verdict.MIN_RUNS <= runs < verdict.RECOMMENDED_REPEATS:
        notes.append(f"{runs} repeats show only large changes: use `--repeats {verdict.RECOMMENDED_REPEATS}`")
    for side, sealed in (("old", old), ("new", new)):
        notes += [f"{side}: {caution}" for caution in sealed.data["validity"]["cautions"]]
    return notes
